"""V2Drop against a loop of the card, and on a real LLM."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vtr
from tests.methods.handmade import IMAGES, LLAVA, ONE, chosen, make_view, select_without_sync
from tests.tiny_models import ROWS, batch_of, model_of
from vtr.methods.v2drop import ENTERED, V2Drop, v2drop, variation
from vtr.ops.blocks import all_at_once
from vtr.types import Budget

DEEP = replace(LLAVA, llm_layers=32, most_tokens=576)


def moved(view, seed=5):
    """The View in front of the layer before: other tokens, the same for the same image."""
    before = view.tokens.clone()
    for g, real in enumerate(view.real):
        n = int(real.sum())
        before[g, real] += torch.randn(n, before.shape[2], generator=torch.Generator().manual_seed(seed + n))
    return replace(view, tokens=before, per_token={})


def slow(before, now, keep):
    """The tokens with the largest norm of the difference, in float64."""
    change = [float((a - b).double().square().sum().sqrt()) for a, b in zip(now, before)]
    return sorted(sorted(range(len(change)), key=lambda i: (-change[i], i))[:keep])


@pytest.mark.parametrize("keep", [1, 9, 35, 36, [35, 36, 60, 2]])
def test_those_that_change_most_stay_in_every_image_of_a_ragged_batch(keep):
    observe, remove = V2Drop().steps(LLAVA)[:2]
    view = make_view(IMAGES, keep, filler=3)
    before = moved(view)
    assert observe.select(before) is None
    view.per_token = before.per_token
    kept = remove.select(view).keep
    assert torch.equal(kept.sum(1), view.keep) and not (kept & ~view.real).any()
    assert view.per_token[ENTERED].numel() == 0, "nothing is held longer than it is needed"
    for g, got in enumerate(chosen(view, kept)):
        real, count = view.real[g], int(view.keep[g])
        assert got.tolist() == slow(before.tokens[g, real], view.tokens[g, real], count)
        alone = make_view([IMAGES[g]], count)
        assert torch.equal(chosen(alone, v2drop(moved(alone).tokens, alone.tokens, alone.real, alone.keep))[0], got)


def test_ties_and_low_precision():
    tokens, real = torch.zeros(1, 5, 4), torch.ones(1, 5, dtype=torch.bool)
    assert v2drop(tokens, tokens, real, torch.tensor([2]))[0].tolist() == [True, True, False, False, False]
    a, b = torch.randn(2, 1, 40, 8).to(torch.bfloat16)
    there, keep = torch.ones(1, 40, dtype=torch.bool), torch.tensor([9])
    assert torch.equal(v2drop(a, b, there, keep), v2drop(a.float(), b.float(), there, keep))


def test_selections_never_wait_for_the_device():
    observe = V2Drop().steps(LLAVA)[0]
    select_without_sync(observe, make_view([ONE], 9))
    with all_at_once(), FakeTensorMode():
        v2drop(torch.empty(2, 5, 4), torch.empty(2, 5, 4), torch.empty(2, 5, dtype=torch.bool), torch.empty(2, dtype=torch.int64))


@pytest.mark.parametrize(("table", "counts", "average"), [(192, (288, 86, 1), 193.8), (128, (161, 40, 1), 131.0), (64, (28, 1, 1), 66.7)])
def test_the_published_schedules(table, counts, average):
    method = V2Drop(table=table)
    assert method.budget == Budget(keep_ratio=1 / 576) and method.budget.resolve(576) == 1
    removals = [step for step in method.steps(DEEP) if step.action == "remove"]
    assert [step.layer for step in removals] == [3, 17, 22]
    assert [step.layer for step in method.steps(DEEP) if step.action == "observe"] == [2, 16, 21]
    left = [1 + round(step.share * 575) for step in removals]
    assert tuple(left) == counts
    assert round((3 * 576 + 14 * left[0] + 5 * left[1] + 10 * left[2]) / 32, 1) == average


def test_defaults_and_mistakes():
    assert V2Drop().steps(DEEP)[1].share == V2Drop(table=192).steps(DEEP)[1].share
    assert V2Drop(counts=[288, 144, 1]).budget == Budget(keep=1)
    assert V2Drop().published_positions == "keep"
    with pytest.raises(ValueError, match="table must be one of 192, 128, 64, got 32"):
        V2Drop(table=32)
    with pytest.raises(ValueError, match="a schedule of 3 removals needs an LLM of at least 4 layers, this one has 3"):
        V2Drop().steps(replace(LLAVA, llm_layers=3))


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
def test_in_a_model_the_variation_is_what_the_layer_before_added(row):
    model = model_of("llava", "eager", torch.float64)
    batch = batch_of("llava", ROWS, dtype=torch.float64).row(row)
    hidden = model(**batch.inputs, output_hidden_states=True).hidden_states  # [l] enters layer l
    with vtr.reduced(model, V2Drop(counts=(9, 9, 9), layers=(2, 3, 4))) as reduction:  # everything goes at the first drop
        model(**batch.inputs)
    columns = batch.visual[0].nonzero()[:, 0].split(36)
    for own, image in zip(columns, reduction.report().to_dict()["images"], strict=True):
        assert image["per_layer"] == [36, 36, 9, 9, 9]
        assert image["retained"] == slow(hidden[1][0, own], hidden[2][0, own], 9)


@torch.no_grad()
def test_every_stage_measures_the_layer_before_it_on_the_survivors():
    model = model_of("llava", "eager", torch.float64)
    batch = batch_of("llava", ROWS, dtype=torch.float64).row(0)
    with vtr.reduced(model, V2Drop(counts=(20, 12, 5), layers=(1, 2, 4))) as reduction:
        short = model(**batch.inputs, output_hidden_states=True)
    for image in reduction.report().to_dict()["images"]:
        assert image["per_layer"] == [36, 20, 12, 12, 5] and len(image["retained"]) == 5
    assert short.logits.isfinite().all()


def test_a_buffer_changes_nothing(monkeypatch):
    """A CPU takes large inputs in parts."""
    before, after = torch.randn(2, 300, 8), torch.randn(2, 300, 8)
    expected = (after - before).norm(dim=-1)
    assert torch.equal(variation(before, after), expected)
    monkeypatch.setattr("vtr.methods.v2drop.CACHE", 0)
    assert torch.equal(variation(before, after), expected)
