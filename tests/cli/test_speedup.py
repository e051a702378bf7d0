"""`vtr speedup` end to end with a calibration that is given, and what it refuses."""

import json

import pytest

from tests.cli.test_bad_input import refused
from tests.command_line import CliRunner
from vtr.bench import calibration
from vtr.bench.calibration import Calibration, Rates
from vtr.cli import app


@pytest.fixture
def given(monkeypatch):
    rates = Rates(((1, 1e9),), ((1, 1e9),))
    monkeypatch.setattr(calibration, "calibrate", lambda *sizes: Calibration(rates, rates, 1e9))


def speedup(*arguments):
    result = CliRunner().invoke(app, ["speedup", "--quiet", "--device", "cpu", *map(str, arguments)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return " ".join(result.output.split())


def test_it_prints_parts_factors_and_what_limits(given, tmp_path):
    file = tmp_path / "speedup.json"
    shown = speedup("--model", "llava-mid", "--method", "fastv", "--set", "layer=8", "--new-tokens", 1, "--json", file)
    for part in ("tower", "projector", "LLM, 8 layers before the cut", "decode", "kept floor", "KV cache", "ceiling (kept floor): prefill"):
        assert part in shown
    content = json.loads(file.read_text())
    assert content["factors"]["floor"]["prefill"] > content["factors"]["reduced"]["prefill"] > 1
    assert f"predicted: prefill {content['factors']['reduced']['prefill']:.2f} times faster" in shown
    assert content["limit"] in shown and "8 LLM layers before the cut" in content["limit"]
    assert "not in it: choosing the tokens" in shown and content["method"]["layer"] == 8
    assert content["calibration"]["bandwidth"] == 1e9


def test_it_says_where_numbers_are_bounds(given):
    assert "upper bounds" in speedup("--model", "llava-mid", "--method", "flowcut")
    assert "upper bounds" not in speedup("--model", "llava-mid", "--method", "divprune")
    assert "can be faster" in speedup("--model", "llava-mid", "--method", "resize")


def test_a_model_that_no_machine_here_holds_needs_no_weights(given):
    shown = speedup("--model", "llava-next-13b", "--method", "divprune", "--keep", 128, "--batch", 8, "--dtype", "float16")
    assert "llava-next-13b, divprune(keep=128" in shown


def test_a_machine_is_timed():
    assert "predicted: prefill" in speedup("--model", "llava-tiny", "--method", "divprune", "--keep", 9, "--new-tokens", 2)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("speedup: unknown shape 'llava-med'; did you mean 'llava-mid'", ("llava-med", "divprune")),
        ("unknown method 'divprun'; did you mean 'divprune'", ("llava-tiny", "divprun")),
        ("speedup: keep must be within 1 and 36, the visual tokens of an image of llava-tiny, got 64", ("llava-tiny", "divprune")),
        ("got 0", ("llava-tiny", "divprune", "--keep", 0)),
        ("fastv: unknown setting 'layr'; did you mean 'layer'", ("llava-tiny", "fastv", "--keep", 9, "--set", "layr=2")),
        ("--dtype: must be one of auto, float32", ("llava-tiny", "fastv", "--keep", 9, "--dtype", "int8")),
        ("--device: one device is calibrated, got auto", ("llava-tiny", "fastv", "--keep", 9, "--device", "auto")),
        ("--json: no folder 'nowhere'", ("llava-tiny", "fastv", "--json", "nowhere/x.json")),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(message, arguments, given):
    model, method, *others = arguments
    said = refused(2, message, "speedup", "--model", model, "--method", method, *others)
    assert said.count("error:") == 1
