"""Predictions with a calibration that is given, against numbers counted by hand; lengths against those of a run."""

import pytest
import torch

from vtr.bench.calibration import Calibration, Rates, calibrate, rate_at
from vtr.bench.predict import PARTS, full_schedule, planned_schedule, predict, sizes_of, transformers_of
from vtr.bench.schedule import decides_itself, kept_schedule, measure_schedule
from vtr.bench.session import Asked, make
from vtr.bench.shapes import build, find_shape, prompts
from vtr.hosts._protocol import host_of
from vtr.planning import make_plan
from vtr.registry import create_method, list_methods, method_class
from vtr.types.errors import WrongValue

TINY = find_shape(
    "llava-tiny"
)  # 36 patches and a CLS token, 12 tokens of text; tower 4 layers of 32 / 64, LLM 4 layers of 64 / 128, 1000 ids
MID = find_shape("llava-mid")


def flat(tower=1e9, llm=1e9, bandwidth=1e9):
    """A machine with one rate for products of every size."""
    return Calibration(Rates(((1, tower),), ((1, tower),)), Rates(((1, llm),), ((1, llm),)), bandwidth)


def planned(shape, name, **settings):
    model = build(shape, torch.float32, "meta")
    return make_plan(host_of(model), create_method(name, **settings)), sum(p.nbytes for p in model.parameters())


def predicted(shape, name, keep, calibration, batch=1, new_tokens=1, **settings):
    plan, weights = planned(shape, name, keep=keep, **settings)
    return predict(shape, plan, keep, batch, new_tokens, calibration, weights, 4)


def tower_layer(n):
    return 4 * n * 32 * 32 + 2 * n * 64 * 32 + 2 * n * n * 32


def llm_layer(n):
    return 4 * n * 64 * 64 + 3 * n * 128 * 64 + 2 * n * n * 64


HEAD = 1000 * 64 * 4  # bytes of the vocabulary projection
LAYER_BYTES = 4 * (4 * 64 * 64 + 3 * 64 * 128)


def test_milliseconds_are_those_of_the_formulas():
    found = predicted(TINY, "divprune", 9, flat(tower=1e9, llm=2e9, bandwidth=4e9), new_tokens=3)
    tower = (36 * 3 * 64 * 32 + 4 * tower_layer(37)) / 1e9
    projector = 36 * 64 * (32 + 64) / 2e9
    kv = 2 * 64 * 4 * 4  # bytes of a token in all layers
    for costs, length in ((found.full, 48), (found.reduced, 21), (found.floor, 21)):
        decode = sum(4 * LAYER_BYTES + HEAD + 3 * kv * (length + step) for step in (1, 2)) / 4e9
        expected = (tower, projector, 0, 4 * llm_layer(length) / 2e9 + HEAD / 4e9, decode)
        assert [costs.ms[part] for part in PARTS] == pytest.approx([1e3 * seconds for seconds in expected])
        assert costs.kv_bytes == kv * (length + 2)
        assert costs.total == pytest.approx(costs.prefill + 1e3 * decode)
    assert found.factor("prefill") == found.full.prefill / found.reduced.prefill > 1
    assert found.factor("total") == found.factor("total", "floor"), "a boundary method runs on the kept floor's lengths"


def test_layers_before_the_cut_are_counted_apart():
    found = predicted(TINY, "fastv", 9, flat(), layer=1)
    assert found.cut == 1 and found.reduced.visual == 9
    head = HEAD / 1e9
    assert found.reduced.ms["LLM before the cut"] == pytest.approx(1e3 * llm_layer(48) / 1e9)
    assert found.reduced.ms["LLM"] == pytest.approx(1e3 * (3 * llm_layer(21) / 1e9 + head))
    assert found.full.ms["LLM"] == pytest.approx(1e3 * (3 * llm_layer(48) / 1e9 + head))
    assert found.reduced.kv_bytes == 2 * 64 * 4 * (48 + 3 * 21)


def test_a_batch_costs_its_products_and_reads_weights_once():
    one, two = (predicted(TINY, "divprune", 9, flat(), batch=batch, new_tokens=2) for batch in (1, 2))
    assert two.full.ms["tower"] == pytest.approx(2 * one.full.ms["tower"])
    cache = 1e3 * 3 * one.full.kv_bytes / 1e9
    assert two.full.ms["decode"] == pytest.approx(one.full.ms["decode"] + cache)
    assert two.full.weight_bytes == one.full.weight_bytes and two.full.kv_bytes == 2 * one.full.kv_bytes


def test_the_prefill_peak_is_the_layer_with_the_most():
    found = predicted(TINY, "fastv", 9, flat(), layer=1)
    token, inside = 2 * 64 * 4, (8 * 64 + 3 * 128) * 4
    assert found.full.peak_bytes == 48 * (4 * token + inside)
    assert found.reduced.peak_bytes == 48 * (token + inside), "at the last layer in front of the cut"
    assert found.full.memory == found.full.weight_bytes + found.full.peak_bytes


@pytest.mark.parametrize(
    ("name", "settings", "calibration", "new_tokens", "says"),
    [
        ("divprune", {}, flat(tower=1e8), 1, ("the tower is 9", "% of the rest: a tower method would help")),
        ("resize", {}, flat(tower=1e7, llm=1e12, bandwidth=1e12), 1, ("the tower is", "although the method cuts inside it")),
        ("divprune", {}, flat(), 500, ("decode is", "each of the 500 new tokens reads all weights")),
        ("fastv", {"layer": 10}, flat(tower=1e12), 1, ("the 10 LLM layers before the cut are", "a method at the boundary")),
        ("divprune", {}, flat(tower=1e12, bandwidth=1e12), 1, ("the LLM is", "75 of its tokens are text, 64 visual")),
        ("divprune", {"keep": 500}, flat(tower=1e12, bandwidth=1e12), 1, ("the LLM is", "a smaller keep would help")),
    ],
    ids=["tower", "cut-tower", "decode", "late-cut", "text", "keep"],
)
def test_the_sentence_names_what_takes_most(name, settings, calibration, new_tokens, says):
    settings = {"keep": 64, **settings}
    limit = predicted(MID, name, settings.pop("keep"), calibration, new_tokens=new_tokens, **settings).limit()
    assert all(part in limit for part in says), limit


def test_weights_or_tokens_take_the_memory():
    assert "weights are 98 % of the memory" in predicted(MID, "divprune", 64, flat()).memory_limit()
    assert "cache and activations the rest" in predicted(MID, "divprune", 64, flat(), batch=64).memory_limit()


def test_a_rate_lies_between_those_of_its_neighbours():
    table = ((10, 1.0), (1000, 3.0))
    assert [rate_at(table, size) for size in (1, 10, 100, 1000, 5000)] == pytest.approx([1, 1, 2, 3, 3])


@pytest.mark.parametrize("name", [name for name in list_methods() if not method_class(name).card.needs_video])
def test_lengths_of_one_view_are_those_of_a_run(name):
    """Upper bounds of them where a step decides itself how much stays."""
    model, inputs = build(TINY, torch.float32), prompts(TINY, torch.float32, "cpu", 1, 1)[0]
    plan = make_plan(host_of(model), make(name, 9, Asked(), 4))
    ours, seen = planned_schedule(TINY, plan), measure_schedule(model, inputs, plan)
    if not decides_itself(plan):
        assert ours == seen
    else:
        assert all(most >= length for most, length in zip((*ours.tower, *ours.llm), (*seen.tower, *seen.llm), strict=True)), name


@pytest.mark.parametrize("name", ["divprune", "fastv", "visionzip", "pyramiddrop"])
def test_lengths_of_several_views_are_close(name):
    shape = find_shape("llava-next-tiny")
    model, inputs = build(shape, torch.float32), prompts(shape, torch.float32, "cpu", 1, 1)[0]
    assert full_schedule(shape) == measure_schedule(model, inputs, None)
    plan = make_plan(host_of(model), create_method(name, keep=36))
    ours, seen = planned_schedule(shape, plan), measure_schedule(model, inputs, plan)
    assert ours.tower == seen.tower
    assert all(abs(a - b) <= 6 for a, b in zip(ours.llm, seen.llm, strict=True)), (ours.llm, seen.llm)


def test_a_calibration_has_a_rate_for_every_size():
    full = full_schedule(TINY)
    sizes = sizes_of(TINY, (full, kept_schedule(full, TINY.text, 9)), 2)
    assert sizes == ([(2, 37)], [(2, 21), (2, 48)])
    found = calibrate(*transformers_of(TINY), *sizes, torch.float32, "cpu")
    assert [rows for rows, _ in found.llm.linear] == [42, 96] and [tokens for tokens, _ in found.llm.attention] == [21, 48]
    assert [rows for rows, _ in found.tower.linear] == [74]
    rates = [rate for kind in (found.tower, found.llm) for table in (kind.linear, kind.attention) for _, rate in table]
    assert min(*rates, found.bandwidth) > 0


@pytest.mark.parametrize("keep", [0, 37])
def test_a_keep_that_is_no_part_of_an_image_is_refused(keep):
    plan, weights = planned(TINY, "divprune", keep=9)
    with pytest.raises(WrongValue, match=f"speedup: keep must be within 1 and 36, .*, got {keep}"):
        predict(TINY, plan, keep, 1, 1, flat(), weights, 4)
