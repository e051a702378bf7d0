"""What is said before weights are loaded must be what is measured afterwards."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from tests.embedded import random_checkpoint, random_internvl, random_qwen, shared_model
from vtr.eval.run import results
from vtr.eval.run.asking import encode
from vtr.eval.run.cells import Cell
from vtr.eval.run.forecast import check_cells, estimate, forecast, misfits, sketch, tower_flops
from vtr.eval.run.runner import Runner
from vtr.eval.run.work import run_jobs
from vtr.eval.run.workers import Job, LocalPool, Setup, describe, load
from vtr.eval.tasks import get_task
from vtr.hosts._protocol import host_of
from vtr.models.loading import Checkpoint, find_checkpoint, identify
from vtr.models.pixels import PixelLimits
from vtr.registry import create_method
from vtr.types import VtrError

SHAPES = get_task("shapes")
METHODS = {
    "full": None,
    "none": create_method("none"),
    "random": create_method("random", keep=64),
    "fastv": create_method("fastv", keep=64, layer=1),
    "average": create_method("fastv", average_keep=300, layer=1),
    "tome": create_method("tome", keep_ratio=0.25),
    "plan": (create_method("divprune", keep=200), create_method("fastv", keep=64)),
}


@pytest.fixture(scope="module")
def setup():
    return Setup(str(random_checkpoint()), device="cpu")


def cell(method, **more):
    return Cell(method, SHAPES, **{"limit": 1, "max_new_tokens": 1, **more})


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_tokens_are_as_measured(setup, method):
    runner = Runner(*shared_model(setup.model, "cpu"), identify(find_checkpoint(setup.model)), "sdpa", "cpu")
    parts, said = runner.measure(cell(method)), forecast(setup, cell(method))
    assert (said.retained, said.average) == pytest.approx((parts["summary"]["retained"], parts["summary"]["average_tokens"]))
    assert not said.adaptive and said.tflops > parts["summary"]["tflops"], "the tower comes on top"
    assert describe(setup).fingerprint(cell(method)) == parts["fingerprint"]


def test_a_method_that_decides_for_itself_is_marked(setup):
    assert forecast(setup, cell(create_method("prumerge"))).adaptive


def test_a_sketch_has_no_weights(setup):
    assert {str(parameter.device) for parameter in sketch(setup).parameters()} == {"meta"}


def test_what_does_not_fit_is_known_before_anything_runs(setup):
    bad = [cell(create_method("fastv", keep=64, layer=99)), cell(create_method("random", keep=9999))]
    found = misfits(setup, [cell(None), *bad])
    assert [one for one, _ in found] == bad
    with pytest.raises(ValueError, match=r"fastv: layer.* 99 .* \(and 1 more\)"):
        check_cells(setup, [cell(None), *bad])
    check_cells(setup, [cell(method) for method in METHODS.values()])
    with pytest.raises((ValueError, VtrError), match="unknown name 'tiny-lava'"):
        sketch(Setup("tiny-lava"))


@pytest.mark.parametrize(("name", "most"), [("llava-1.5-7b", 576), ("llava-next-7b", 2880)])
def test_a_known_checkpoint_needs_no_download(name, most):
    full = forecast(Setup(name), cell(None))
    assert full.retained == most
    fastv = forecast(Setup(name), cell(create_method("fastv", average_keep=most / 3)))
    assert fastv.average == pytest.approx(most / 3, abs=1) and fastv.tflops < full.tflops


@pytest.fixture
def asked(monkeypatch):
    """What the hub is asked; it does not answer."""
    found = []

    def refuse(*where, **_more):
        found.append(where)
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return found


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"])
def test_a_checkpoint_with_a_recipe_is_estimated_without_the_hub(name, asked, tmp_path):
    setup = Setup(name, device="cpu", batch_size=3)
    found = estimate([Job(setup, cell(None)), Job(setup, cell(METHODS["random"]))], tmp_path)
    assert [line.forecast.retained for line in found.lines] == [576, 64]
    assert found.unseen == [name] and found.finished == 0 and asked == []


def test_what_is_stored_of_the_hub_tells_what_is_finished_without_asking_it(asked, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--llava-hf--llava-1.5-7b-hf"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text('{"model_type": "llava"}')
    setup = Setup("llava-1.5-7b", device="cpu", batch_size=4)
    around = describe(
        setup, Checkpoint("llava-1.5-7b", str(folder / "snapshots" / "abc")), {"name": "llava-hf/llava-1.5-7b-hf", "revision": "abc"}
    )
    fingerprint = around.fingerprint(cell(None))
    results.write_cell(tmp_path, fingerprint=fingerprint, conditions={"seconds": 1}, summary={"samples": 5}, samples=[])
    found = estimate([Job(setup, cell(None)), Job(setup, cell(METHODS["random"]))], tmp_path)
    assert (found.unseen, [line.finished for line in found.lines], asked) == ([], [True, False], [])


def test_a_checkpoint_that_nothing_is_known_of_is_asked_for_once(asked):
    with pytest.raises(VtrError, match="config of 'nobody/nothing' cannot be read"):
        sketch(Setup("nobody/nothing"))
    assert len(asked) <= 2


def test_an_estimate_counts_what_is_left(setup, tmp_path):
    jobs = [Job(setup, cell(None)), Job(setup, cell(METHODS["random"]))]
    before = estimate(jobs, tmp_path)
    assert (before.finished, before.time) == (0, "") and [line.samples for line in before.lines] == [5, 5]
    run_jobs(jobs[:1], tmp_path, LocalPool())
    after = estimate(jobs, tmp_path)
    assert after.finished == 1 and after.time.startswith(", about 0.0 h")
    assert after.tflops == pytest.approx(5 * after.lines[1].forecast.tflops)


@pytest.mark.parametrize(
    ("folder", "pixels", "methods"),
    [
        (random_qwen, PixelLimits(), (None, create_method("divprune", keep=7), create_method("fastv", keep=5, layer=1))),
        (random_qwen, PixelLimits(max_pixels=48 * 48), (None,)),
        (random_internvl, PixelLimits(), (None, create_method("divprune", keep=7))),
    ],
)
def test_the_images_of_a_task_decide_where_the_model_sets_no_limit(folder, pixels, methods):
    setup = Setup(str(folder()), device="cpu", pixels=pixels)
    runner = Runner(*load(setup), identify(find_checkpoint(setup.model)), "sdpa", "cpu", pixels=pixels)
    for method in methods:
        parts, said = runner.measure(cell(method)), forecast(setup, cell(method))
        assert (said.retained, said.average) == pytest.approx((parts["summary"]["retained"], parts["summary"]["average_tokens"]))
        assert not said.adaptive and {len(sample["visual_tokens"]) for sample in parts["samples"]} == {1}, "tiles are one image"
        assert describe(setup).fingerprint(cell(method)) == parts["fingerprint"]
        assert {name: parts["fingerprint"].get(name) for name in pixels.given} == pixels.given


def test_limits_of_pixels_are_another_experiment():
    prints = [
        describe(Setup(str(random_qwen()), device="cpu", pixels=PixelLimits(max_pixels=most))).fingerprint(cell(None))
        for most in (None, 4096)
    ]
    assert "max_pixels" not in prints[0] and prints[1] == {**prints[0], "max_pixels": 4096}
    with pytest.raises(ValueError, match="max_pixels: the processor of 'llava' has no such limit"):
        sketch(Setup(str(random_checkpoint()), pixels=PixelLimits(max_pixels=4096)))


@pytest.mark.parametrize(
    ("name", "pixels", "most", "of_shapes"),
    [
        ("qwen2.5-vl-7b", PixelLimits(), 16384, 196),
        ("Qwen/Qwen2.5-VL-7B-Instruct", PixelLimits(max_pixels=100 * 28**2), 100, 100),
        ("qwen3-vl-2b", PixelLimits(), 16384, 144),
        ("internvl3-1b", PixelLimits(), 3328, 3328),
    ],
)
def test_a_recipe_bounds_what_is_not_here(name, pixels, most, of_shapes):
    setup, far = Setup(name, pixels=pixels), replace(SHAPES, name="far", remote=True)
    found = [forecast(setup, Cell(None, task, limit=1)) for task in (SHAPES, far)]
    assert [one.retained for one in found] == [of_shapes, most] and all(one.adaptive for one in found)


def test_what_nothing_tells_is_unknown():
    far = Cell(None, replace(SHAPES, name="far", remote=True))
    assert forecast(Setup(str(random_internvl())), far) is None
    assert forecast(Setup(str(random_qwen())), far).retained == 24


@pytest.mark.parametrize("folder", [random_checkpoint, random_qwen, random_internvl])
def test_flops_of_the_tower_are_those_of_its_products(folder):
    model, processor = shared_model(str(folder()), "cpu", attention="eager")
    host, inputs = host_of(model), encode(processor, ["?"], [[Image.new("RGB", (96, 64))]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    names = {id(module): f"{type(model).__name__}.{name}" for name, module in model.named_modules()}
    counted = sum(sum(counter.get_flop_counts()[names[id(block)]].values()) for block in host.tower.blocks)
    (layout,) = host.images_of(inputs)
    assert tower_flops(host, layout.grids) == counted / 2
