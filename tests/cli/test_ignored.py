"""An option that a command would ignore is refused, before anything is loaded or written."""

from pathlib import Path

import pytest
import typer

from tests.cli.test_bad_input import refused
from tests.command_line import CliRunner
from vtr.cli import app, bench
from vtr.cli._common import refuse_unused

VALUES = {
    "model": "tiny-llava",
    "methods": "fastv",
    "keep": "64",
    "batch": "1",
    "new_tokens": "8",
    "repeats": "2",
    "minutes": "1",
    "floors": None,
    "compiled": None,
    "schedule": "own",
    "settings": "fastv.layer=3",
    "ops": None,
    "longest": "1",
    "threads": "1",
    "file": "{new}",
    "min_pixels": "9",
    "max_pixels": "9",
    "device": "cpu",
    "dtype": "float32",
    "attention": "sdpa",
    "quiet": None,
}


def parameters(command):
    found = typer.main.get_command(app).commands[command].params
    return {parameter.name: parameter for parameter in found if parameter.name != "help"}


def test_every_option_of_bench_is_read_in_some_mode():
    assert set().union(*bench.USED.values()) == set(VALUES) == set(parameters("bench"))


@pytest.mark.parametrize(
    ("mode", "option"),
    [(mode, option) for mode, used in bench.USED.items() for option in VALUES if option not in used and option not in ("model", "ops")],
)
def test_bench_refuses_what_a_mode_does_not_read(mode, option, tmp_path):
    new, shown = tmp_path / "new.md", parameters("bench")[option].opts[0]
    chosen = {"--ops": ("--ops",), "--model": ("--model", "tiny-llava")}[mode]
    value = () if VALUES[option] is None else (VALUES[option].replace("{new}", str(new)),)
    way = "; models are timed with --model" * (mode == "--ops")
    refused(2, f"error: bench: {mode} does not use {shown}; leave it out{way}", "bench", *chosen, shown, *value)
    assert not new.exists()


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (
            "bench: --ops does not use --keep, --floors; leave them out; models are timed with",
            ("--ops", "--keep", 64, "--floors"),
        ),
        ("bench: --ops and --model are timed one by one, got both (--model tiny-llava)", ("--ops", "--model", "tiny-llava")),
        ("--schedule: is for shapes with random weights, got --model tiny-llava", ("--model", "tiny-llava", "--schedule", "own")),
        (
            "--set: 'dart' is not among the methods that are run (fastv)",
            ("--model", "tiny-llava", "--methods", "fastv", "--set", "dart.layer=3"),
        ),
        ("--set: 'drat' is not among the methods that are run", ("--model", "tiny-llava", "--set", "drat.layer=3")),
    ],
)
def test_bench_refuses_what_does_not_go_together(message, arguments):
    refused(2, message, "bench", *arguments)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("--keep: none of the methods (full, none) has a budget that --set leaves open; leave it out", ("full,none", "--keep", 64)),
        ("--keep-ratio: none of the methods (full) has a budget", ("full", "--keep-ratio", "0.5")),
        ("--keep: none of the methods (fastv) has a budget that", ("fastv", "--keep", 64, "--set", "fastv.keep=32")),
        ("--seeds: none of the methods (fastv) has random choices that --set leaves open", ("fastv", "--keep", 64, "--seeds", "0,1")),
        ("--visuals: none of the tasks (shapes) has videos; leave it out", ("fastv", "--keep", 64, "--visuals", "each")),
        (
            "--frame-scores: none of the methods (fastv) reads scores of frames on shapes-video; leave it out, or ask quota",
            ("fastv", "--keep", 64, "--frame-scores", "tiny-llava", "--tasks", "shapes-video"),
        ),
        ("reads scores of frames on shapes; leave it out", ("quota", "--keep", 64, "--frame-scores", "tiny-llava")),
        (
            "--seeds: none of the methods (random) has random choices that",
            ("random", "--keep", 64, "--seeds", "0", "--set", "random.seed=3"),
        ),
    ],
)
def test_eval_refuses_budgets_and_seeds_that_no_method_reads(message, arguments, tmp_path):
    refused(2, message, "eval", "--model", "tiny-llava", "--out", tmp_path / "new", "--methods", *arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", [("--resume",), ("--ray", "local"), ("--jobs", "2")], ids=lambda option: option[0])
def test_a_dry_run_refuses_what_is_for_a_run(option):
    refused(2, f"sweep: --dry-run does not use {option[0]}; leave it out", "sweep", "eval/sweeps/main-table.yaml", "--dry-run", *option)


@pytest.mark.parametrize("option", ["--times", "--speed"])
def test_a_report_without_timings_reads_no_times(option, tmp_path):
    refused(2, f"report: --no-timings does not use {option}; leave it out", "report", tmp_path, "--no-timings", option, tmp_path)


def test_calibrate_refuses_what_an_encoder_has_not(tmp_path):
    target = tmp_path / "tau.yaml"
    message = "--attention: an encoder has one way to attend, got --attention eager for 'tiny-vit-seg'; leave it out"
    refused(2, message, "calibrate", "expedit", "--model", "tiny-vit-seg", "--out", target, "--attention", "eager")
    refused(
        2, "--samples: must be at least 1, got 0", "calibrate", "expedit", "--model", "x", "--out", target, "--samples", 0, "--images", "."
    )
    assert not target.exists()


def test_defaults_are_not_what_was_given():
    small, found = typer.Typer(), []

    @small.command()
    def command(context: typer.Context, path: Path = Path(), loud: bool = False, number: int = 3) -> None:
        refuse_unused(context, "this", ("path",))
        found.append(number)

    runner = CliRunner()
    assert runner.invoke(small, []).exit_code == 0 and found == [3]
    said = runner.invoke(small, ["--loud", "--number", "3"]).exception
    assert "this does not use --loud, --number; leave them out" in str(said)
