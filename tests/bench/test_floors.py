"""The hand-cut floors compute what the model computes when it is given the same tokens, and schedules say how many those were."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from transformers import StaticCache

import vtr
from tests.tiny_models import Shot, batch_of, model_of
from vtr.bench import floors, schedule
from vtr.bench.measure import image_span
from vtr.bench.shapes import build, find_shape, prompts
from vtr.hosts._protocol import host_of
from vtr.types import Boundary, Budget, Layer, Remove, Selection, Tower


@dataclass(frozen=True, kw_only=True)
class First(vtr.Method):
    """Keeps the first tokens of every image, as the floors do."""

    stage: str = "boundary"
    layer: int = 0

    name: ClassVar[str] = "first"
    default_budget: ClassVar[Budget] = Budget(keep_ratio=0.5)

    def steps(self, geometry):
        where = {"tower": Tower(self.layer), "boundary": Boundary(), "prefill": Layer(self.layer)}[self.stage]
        return (Remove(where, lambda view: Selection(keep=view.real.cumsum(1) <= view.keep[:, None])),)


@dataclass(frozen=True, kw_only=True)
class Half(First):
    """Decides for itself: drops every second token it gets, in two steps."""

    def steps(self, geometry):
        return tuple(Remove(Layer(layer), lambda view: Selection(keep=view.patch % 2 == 0), counted=False) for layer in (1, 3))


@pytest.fixture(scope="module")
def llava():
    shape = find_shape("llava-tiny")
    model = build(shape, torch.float32)
    return model, host_of(model), prompts(shape, torch.float32, "cpu", 2, 1)[0]


@torch.no_grad()
def cut(host, lengths, inputs, static=None):
    visual = floors.encode(host, lengths, inputs)
    logits, cache = floors.prefill(host, lengths, inputs, visual, image_span(host, inputs["input_ids"]), static)
    return logits, [layer.keys.shape[2] for layer in cache.layers]


def test_the_floor_of_the_full_model_is_the_full_model(llava):
    model, host, inputs = llava
    lengths = schedule.measure_schedule(model, inputs, None)
    assert lengths.llm == (48,) * 4 and lengths.tower == ((37, 37),) * 4 and lengths.projector == 36
    with torch.no_grad():
        assert torch.equal(cut(host, lengths, inputs)[0], model(**inputs, logits_to_keep=1).logits)


@pytest.mark.parametrize(
    "method",
    [
        First(keep=9, position_ids="renumber"),
        First(keep=9, position_ids="renumber", stage="tower", layer=2),
        First(keep=9, stage="prefill", layer=2),
        vtr.create_method("shortv", layers=(1, 3)),
    ],
    ids=lambda m: getattr(m, "stage", m.name),
)
@torch.no_grad()
def test_a_floor_gives_the_logits_of_the_reduction_it_stands_for(llava, method):
    model, host, inputs = llava
    lengths = schedule.measure_schedule(model, inputs, method)
    with vtr.reduced(model, method) as reduction:
        expected = model(**inputs, logits_to_keep=1)
        counts = reduction.report().sequence_lengths
    logits, held = cut(host, lengths, inputs)
    static = StaticCache(config=model.config.text_config, max_cache_len=60)
    torch.testing.assert_close(cut(host, lengths, inputs, static)[0], logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
    assert list(lengths.llm) == counts == held
    assert (logits - model(**inputs, logits_to_keep=1).logits).abs().max() > 1e-3


def test_merging_inside_a_layer_and_smaller_images_are_seen(llava):
    model, host, inputs = llava
    tome = schedule.measure_schedule(model, inputs, vtr.create_method("tome", keep=9))
    assert tome.tower == ((37, 28), (28, 19), (19, 10), (10, 10)) and tome.llm == (21,) * 4
    small = schedule.measure_schedule(model, inputs, vtr.create_method("resize", keep=9))
    assert small.grid == (3, 3) and small.tower[0] == (10, 10)
    assert cut(host, tome, inputs)[1] == [21] * 4
    assert not host.projector._forward_pre_hooks and not any(layer._forward_pre_hooks for layer in host.language.blocks)


def test_frozen_layers_under_another_backend_have_no_floor(llava):
    model, host, inputs = llava
    lengths = schedule.measure_schedule(model, inputs, vtr.create_method("shortv", layers=(1,)))
    assert lengths.frozen == (1,) and floors.can_cut(host, lengths, lengths)
    model.set_attn_implementation("eager")
    try:
        assert not floors.can_cut(host, lengths, lengths) and floors.can_cut(host, replace(lengths, frozen=()), lengths)
    finally:
        model.set_attn_implementation("sdpa")


def test_counts_are_measured_and_followed(llava):
    model, _, inputs = llava
    shares = schedule.measure_shares(model, [inputs], Half())
    assert shares == (0.5, 0.5)  # what the second step leaves of what the first one got
    followed = schedule.forced(vtr.plan(model, Half()), (0.5, 0.25))
    assert schedule.measure_schedule(model, inputs, followed).llm == (48, 30, 30, 21)
    assert schedule.measure_shares(model, [inputs], First(keep=9)) == ()
    assert schedule._stretch([1.0, 0.0], 4) == [1.0, 0.75, 0.25, 0.0]


def test_a_budget_is_scaled_to_other_images():
    assert schedule.scaled(First(keep=160), 2880, 576).keep == 32
    assert schedule.scaled(First(keep_ratio=0.1), 2880, 576) == First(keep_ratio=0.1)


def test_images_at_different_places_are_refused(llava):
    _, host, inputs = llava
    ids = inputs["input_ids"].clone()
    ids[1] = ids[1].roll(1)
    with pytest.raises(vtr.VtrError, match="one image at the same place"):
        image_span(host, ids)


@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_a_floor_of_another_tower_is_the_model_with_the_first_tokens(kind):
    """Positions are counted through, as the floors do, and so are those of the model here; Qwen3-VL adds features behind LLM layers."""
    model, host = model_of(kind), host_of(model_of(kind))
    inputs = batch_of(kind, ((4, Shot(96, 48), 5), (4, Shot(96, 48), 5))).inputs
    full = schedule.measure_schedule(model, inputs, None)
    length = inputs["input_ids"].shape[1]
    given = {"position_ids": torch.arange(length).expand(3, 2, -1)} if host.next_positions is not None else {}
    with torch.no_grad():
        expected = model(**inputs, **given, logits_to_keep=1).logits
    assert (cut(host, full, inputs)[0] - expected).abs().max() < 1e-5
    kept = schedule.kept_schedule(full, length - 18, 5)
    assert set(cut(host, kept, inputs)[1]) == {length - 13}


def test_a_tower_that_runs_as_a_whole_has_no_floor_with_removals_inside():
    model, inputs = model_of("qwen2_5_vl"), batch_of("qwen2_5_vl", ((4, Shot(96, 48), 5),)).inputs
    host, full = host_of(model), schedule.measure_schedule(model, inputs, None)
    tower = schedule.measure_schedule(model, inputs, First(keep=5, stage="tower", layer=2))
    assert tower.tower[:2] == full.tower[:2] and tower.tower[-1] == (20, 20)
    assert not floors.can_cut(host, tower, full)
    assert floors.can_cut(host, schedule.measure_schedule(model, inputs, First(keep=5)), full)


def test_an_llm_of_another_kind_has_no_floors():
    with pytest.raises(vtr.VtrError, match="bench: no floors can be cut by hand for 'gemma3'.*give --no-floors"):
        floors.check_floors(host_of(model_of("gemma3")))
