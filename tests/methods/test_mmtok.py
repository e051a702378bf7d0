"""MMTok against a float64 loop of the card."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.methods.handmade import LLAVA, ONE, chosen, make_view, select_without_sync
from tests.tiny_models import Shot, batch_of, model_of
from vtr.methods.mmtok import FEATURES, MMTok, coverage_rows, mmtok
from vtr.types import Budget, Text

GRIDS = [(6, 6), (4, 5), (1, 1), (1, 7)]
WORDS = [6, 3, 2, 4]


def slow(tokens, features, words, keep, tau_text=0.02, tau_vision=0.2, alpha=0.5, first=None):
    """The card for one view: rows of text and image, then pick after pick in plain Python."""
    visual, own, said = (F.normalize(x.double(), dim=-1, eps=1e-8) for x in (tokens, features, words))
    n = len(visual)
    rows = [(row / tau_text).softmax(0) / len(said) for row in said @ visual.T]
    rows += [alpha * (row / tau_vision).softmax(0) / n for row in own @ own.T]
    rows = [row.tolist() for row in rows]
    covered, picked = [0.0] * len(rows), []
    while len(picked) < keep:
        left = [j for j in range(n) if j not in picked]
        left = [j for j in left if first is None or j in first] or left
        best = max(left, key=lambda j: (sum(max(0.0, row[j] - c) for row, c in zip(rows, covered)), -j))
        picked.append(best)
        covered = [max(c, row[best]) for row, c in zip(rows, covered)]
    return sorted(picked)


def view_of(keep, **more):
    view = make_view([ONE] * len(GRIDS), keep, grid=GRIDS, text=WORDS, **more)
    view.per_token[FEATURES] = torch.randn(*view.real.shape, 12, generator=torch.Generator().manual_seed(3))
    return view


def own(view, g):
    asked = view.text.instruction[g]
    return view.tokens[g, view.real[g]], view.per_token[FEATURES][g, view.real[g]], view.text.tokens[g, asked]


def choice(method=None, geometry=LLAVA):
    return (method or MMTok()).steps(geometry)[-1]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("keep", [1, 5, 35, 36, [36, 1, 1, 6], [35, 13, 1, 6]])
def test_rows_of_a_ragged_batch_are_the_card(keep, behind):
    view = view_of(keep, filler=3, behind=behind)
    kept = choice().select(view).keep
    assert torch.equal(kept.sum(1), view.keep) and not (kept & ~view.real).any()
    for g, got in enumerate(chosen(view, kept)):
        assert got.tolist() == slow(*own(view, g), int(view.keep[g]))
        tokens, features, words = (x[None] for x in own(view, g))
        real, asked = (torch.ones(x.shape[:2], dtype=torch.bool) for x in (tokens, words))
        most = int(view.keep[g])
        alone = mmtok(coverage_rows(tokens, features, words, real, asked), real, view.keep[g : g + 1], most)
        assert torch.equal(alone[0].nonzero()[:, 0], got)


@pytest.mark.parametrize("settings", [{"tau_text": 0.1}, {"tau_vision": 0.05}, {"alpha": 2.0}, {"alpha": 0.0}], ids=str)
def test_settings_are_those_of_the_card(settings):
    view = view_of(7)
    kept = chosen(view, choice(MMTok(**settings)).select(view).keep)
    assert [k.tolist() for k in kept[:2]] == [slow(*own(view, g), 7, **settings) for g in range(2)]


def test_qwen_has_a_temperature_of_its_own():
    view, qwen = view_of(9), replace(LLAVA, host="qwen2_5_vl", has_cls=False)
    assert chosen(view, choice(geometry=qwen).select(view).keep)[0].tolist() == slow(*own(view, 0), 9, tau_text=0.01)
    told = choice(MMTok(tau_text=0.05), qwen).select(view).keep
    assert chosen(view, told)[0].tolist() == slow(*own(view, 0), 9, tau_text=0.05)


def test_without_text_the_image_covers_itself():
    view = view_of(9)
    text = view.text
    view.text = Text(text.tokens, text.real, torch.zeros_like(text.instruction))
    kept = chosen(view, choice().select(view).keep)
    for g in range(2):
        tokens, features, _ = own(view, g)
        assert kept[g].tolist() == slow(tokens, features, tokens[:0], 9)


def test_projected_tokens_may_stand_for_features():
    (step,) = MMTok(features="projected").steps(LLAVA)
    view = view_of(9)
    tokens, _, words = own(view, 0)
    assert chosen(view, step.select(view).keep)[0].tolist() == slow(tokens, tokens, words, 9)


def test_tokens_that_go_first_are_exhausted_before_others():
    view = view_of(9)
    tokens, features, words = (x[None] for x in own(view, 0))
    real, asked = torch.ones(1, 36, dtype=torch.bool), torch.ones(1, words.shape[1], dtype=torch.bool)
    rows, first = coverage_rows(tokens, features, words, real, asked), torch.arange(36)[None] % 6 == 2
    for keep in (1, 5, 6, 9, 36):
        got = mmtok(rows, real, torch.tensor([keep]), keep, first)
        assert got[0].nonzero()[:, 0].tolist() == slow(tokens[0], features[0], words[0], keep, first=range(2, 36, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    dice = torch.Generator().manual_seed(0)
    values = [torch.randn(1, n, 16, generator=dice).to(dtype) for n in (30, 30, 4)]
    real, asked = torch.ones(1, 30, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    rows = coverage_rows(*values, real, asked)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, coverage_rows(*(v.float() for v in values), real, asked), rtol=0, atol=0)
    torch.testing.assert_close(rows.sum((1, 2)), torch.tensor([1.5]))


def test_identical_zero_and_broken_tokens_are_no_problem():
    real, asked = torch.ones(1, 10, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    for fill in (0.0, 1.0, torch.nan):
        tokens, words = torch.full((1, 10, 4), fill), torch.full((1, 3, 4), fill)
        for keep in (1, 5, 9, 10):
            kept = mmtok(coverage_rows(tokens, tokens, words, real, asked), real, torch.tensor([keep]), keep)
            assert kept[0, :keep].all() and kept.sum() == keep, "ties: lowest index"


def test_selections_never_wait_for_the_device():
    (step,) = MMTok(features="projected").steps(LLAVA)
    select_without_sync(step, make_view([ONE] * 4, [9, 2, 1, 3], grid=GRIDS, text=WORDS))
    select_without_sync(MMTok().steps(LLAVA)[0], make_view([ONE], 9))


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_on_a_model_the_features_are_those_in_front_of_the_projector(kind):
    model, batch, seen = model_of(kind), batch_of(kind, ((4, Shot(96, 96), 6),)), []
    method = MMTok(keep_ratio=7 / 36)

    class Watched(MMTok):
        def _select(self, view, tau):
            answer = super()._select(view, tau)
            seen.append((view, answer.keep))
            return answer

    with torch.no_grad(), vtr.reduced(model, Watched(keep_ratio=7 / 36)) as reduction:
        model(**batch.inputs)
        (image,) = reduction.report().to_dict()["images"]
    with torch.no_grad(), vtr.reduced(model, method) as reduction:
        model(**batch.inputs)
        assert reduction.report().to_dict()["images"][0]["retained"] == image["retained"]
    ((view, kept),) = seen
    features = model.model.vision_tower(
        batch.inputs["pixel_values"].reshape(-1, *batch.inputs["pixel_values"].shape[-3:]), output_hidden_states=True
    )
    features = features.hidden_states[model.config.vision_feature_layer][:, 1:].detach()
    for g, got in enumerate(chosen(view, kept)):
        torch.testing.assert_close(view.per_token[FEATURES][g], features[g])
        assert got.tolist() == slow(*own(view, g), 7)


def test_defaults_and_mistakes():
    assert MMTok().budget == Budget(keep_ratio=1 / 9) and Budget(keep_ratio=1 / 9).resolve(576) == 64
    assert [step.action for step in MMTok().steps(LLAVA)] == ["observe", "remove"]
    with pytest.raises(ValueError, match="tau_text must be above 0, got 0"):
        MMTok(tau_text=0.0)
    with pytest.raises(ValueError, match="tau_vision must be above 0, got -1"):
        MMTok(tau_vision=-1.0)
    with pytest.raises(ValueError, match="alpha must be 0 or more, got -1"):
        MMTok(alpha=-1.0)
    with pytest.raises(ValueError, match="features must be 'tower' or 'projected', got 'pixels'"):
        MMTok(features="pixels")
