"""Removed = masked, cached = recomputed, batch = single: every oracle on every host and precision. See vtr/testing/oracles.py."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import vtr
from tests import oracles, probes, reference, tiny_models
from tests.fake_flash import flash_attention
from tests.marks import quick_only
from tests.oracles import DISCRETE, ONLY_SDPA, ORACLES, Setup
from tests.probes import EveryNth, Ragged

LONG_TEXT = ((4, tiny_models.Shot(40, 90), 6), (400,))
"""The prompt without an image is the longest: removal does not make the batch shorter."""
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


def check(name: str, setup: Setup) -> None:
    found = oracles.judged(name, setup)
    assert found <= oracles.tolerance(name, setup.dtype, setup.kind), f"{name} on {setup}: {found:.3g}"


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("kind", quick_only(tiny_models.KINDS, tiny_models.ALL_KINDS))
def test_sdpa_in_float64(name, kind):
    check(name, Setup(kind, dtype=FP64))


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("kind", quick_only(set(tiny_models.MECHANISMS) - {"llava_onevision_max"}, tiny_models.OTHER_KINDS))
def test_other_families(name, kind):
    check(name, Setup(kind, dtype=FP32 if kind.endswith("moe") else FP64))


@pytest.mark.parametrize("name", ["O4", "O9"])
@pytest.mark.parametrize("kind", tiny_models.MECHANISMS)
def test_other_families_eager(name, kind):
    check(name, Setup(kind, "eager", FP32))


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("kind", quick_only((), tiny_models.KINDS))
def test_sdpa_in_float32(name, kind):
    check(name, Setup(kind, dtype=FP32))


@pytest.mark.parametrize("name", [name for name in ORACLES if name not in ONLY_SDPA])
@pytest.mark.parametrize("kind", quick_only(("llava_siglip", "llava_next"), tiny_models.KINDS))
def test_eager_in_float32(name, kind):
    check(name, Setup(kind, "eager", FP32))


@pytest.mark.parametrize("name", [name for name in ORACLES if name not in DISCRETE])
@pytest.mark.parametrize("kind", quick_only((), ("llava", "llava_next")))
def test_sdpa_in_bfloat16(name, kind):
    check(name, Setup(kind, dtype=BF16))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ORACLES if name not in DISCRETE])
@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_other_families_in_bfloat16(name, kind):
    check(name, Setup(kind, dtype=BF16))


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_5", "glm4v"])
def test_merging_in_bfloat16_rounds_as_the_masked_model_does(kind):
    """The reduced model is about as far from its float64 result as the masked model is from its own: what O9b finds there is rounding."""
    plan = [probes.MergePairs(stage="tower", layer=0), probes.MergePairs(stage="tower", layer=1), EveryNth(stride=2)]
    found = {}
    for dtype in (FP64, BF16):
        setup = Setup(kind, dtype=dtype)
        run = oracles.run(setup, plan, setup.batch())
        masked = reference.masked_logits(setup.model, setup.batch(), oracles.expected_of(setup.batch(), run.choices))
        found[dtype] = [logits[:, -3:].double() for logits in (run.logits, masked)]  # text behind the last image
    reduced, masked = (float((half - exact).square().mean().sqrt()) for half, exact in zip(found[BF16], found[FP64], strict=True))
    assert 0 < reduced < 1.5 * masked


@pytest.mark.parametrize("newlines", ["rows", "all", "none"])
@pytest.mark.parametrize("plan", [[EveryNth(stride=5)], [EveryNth(stride=3), EveryNth(stage="prefill", layer=2, stride=4)]])
def test_newlines_follow_their_option(newlines, plan):
    setup = Setup("llava_next", dtype=FP64)
    plan = [replace(method, newlines=newlines) for method in plan]
    assert oracles.against_masks(setup, plan, setup.batch(), newlines=newlines) < 1e-6


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@pytest.mark.parametrize("rows", [tiny_models.ONE, tiny_models.WITH_TEXT_ONLY, LONG_TEXT])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_any_padding_and_rows_without_an_image(kind, rows, pad):
    setup = Setup(kind, dtype=FP64)
    plan = [Ragged(), EveryNth(stage="prefill", layer=2)]
    assert oracles.against_masks(setup, plan, setup.batch(*rows, pad=pad)) < 1e-6


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_freezing_with_any_padding_and_rows_without_an_image(kind, pad):
    setup = Setup(kind, dtype=FP64)
    batch = setup.batch(*tiny_models.WITH_TEXT_ONLY, pad=pad)
    assert oracles.against_masks(setup, [EveryNth(stride=3), probes.Freeze()], batch, freeze=(1, 3)) < 1e-6


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_frozen_tokens_can_be_removed_later(kind):
    setup = Setup(kind, dtype=FP64)
    plan = [Ragged(), probes.Freeze(layers=(0, 1, 4)), EveryNth(stage="prefill", layer=3)]
    assert oracles.against_masks(setup, plan, setup.batch(), freeze=(0, 1, 4)) < 1e-6


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_scores_of_the_tower_decide_at_the_boundary(kind):
    setup = Setup(kind, dtype=FP64)
    batch = setup.batch()
    assert oracles.against_masks(setup, [probes.Carried()], batch) < 1e-6
    plan = [probes.TowerTop(layer=1), probes.Carried()]  # what is carried is gathered by the tower's own removal
    assert oracles.against_masks(setup, plan, batch) < 1e-6


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_ragged_removal_in_the_tower(kind):
    """Views of one batch keep different numbers of patches."""
    setup = Setup(kind, dtype=FP64)
    plan = [Ragged(stage="tower", layer=1), EveryNth(stage="tower", layer=2, stride=2), EveryNth(stride=2)]
    assert oracles.against_masks(setup, plan, setup.batch()) < 1e-6
    merges = [probes.MergePairs(stage="tower", layer=layer) for layer in (0, 2)]  # with images of which unpadding cuts off patches
    assert oracles.against_masks(setup, merges, setup.batch(*tiny_models.WITH_TEXT_ONLY)) < 1e-6


def test_nothing_visual_left_at_the_boundary():
    for kind in tiny_models.KINDS:
        setup = Setup(kind, dtype=FP64)
        assert oracles.against_masks(setup, [probes.DropAll()], setup.batch()) < 1e-6
        assert oracles.against_masks(setup, [probes.DropAll()], setup.batch(*tiny_models.WITH_TEXT_ONLY)) < 1e-6


def test_attention_rows_are_those_of_the_eager_model():
    """The signal `rows` equals what `output_attentions` of the eager model shows, padding and grouped queries included."""
    setup = Setup("llava", "eager")
    model, batch = setup.model, setup.batch()
    signal = vtr.Signal("rows", heads=True)
    probes.OBSERVED.clear()
    with torch.no_grad(), vtr.reduced(model, probes.Observe(stage="prefill", layer=2, signals=(signal,))):
        model(**batch.inputs, position_ids=batch.positions)
    (view,) = probes.OBSERVED
    with torch.no_grad():
        weights = model(**batch.inputs, position_ids=batch.positions, output_attentions=True).attentions[1]
    for group, spot in enumerate(reference.spots(batch)):
        expected = weights[spot.row, :, -1, spot.positions]
        torch.testing.assert_close(view.signals[signal][group][:, : len(spot.positions)], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_a_view_shows_tokens_patches_and_text_of_its_own_prompt(kind):
    setup = Setup(kind)
    model, batch = setup.model, setup.batch()
    merged: list[torch.Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: merged.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch.inputs)
    handle.remove()
    probes.OBSERVED.clear()
    with torch.no_grad(), vtr.reduced(model, probes.Observe()):
        model(**batch.inputs)
    (view,) = probes.OBSERVED
    assert view.counts == batch.counts() and view.row.tolist() == [0, 1, 1]
    for group, spot in enumerate(reference.spots(batch)):
        real = view.real[group]
        assert torch.equal(view.patch[group][real], spot.patches)
        assert torch.equal(view.tokens[group][real], merged[0][spot.row, spot.positions])
        text = batch.valid[spot.row] & ~batch.visual[spot.row]
        assert view.text is not None
        shown = view.text.real[group]
        assert torch.equal(view.text.tokens[group][shown], merged[0][spot.row, text])
        first = batch.visual[spot.row].nonzero()[0, 0]
        behind = text.nonzero()[:, 0] > first
        assert torch.equal(view.text.instruction[group][shown], behind)


def test_the_oracles_have_teeth():
    """A planted bug of each kind is seen: positions re-indexed by accident, one survivor too many, a missed layer."""
    setup = Setup("llava")
    batch = setup.batch()
    assert oracles.against_masks(setup, [EveryNth(stride=3, position_ids="renumber")], batch) > 0.1
    result = oracles.run(setup, [EveryNth(stride=3)], batch)
    expected = oracles.expected_of(batch, result.choices)
    keep = expected.drops[0][1]
    spot = reference.spots(batch)[0]
    more = keep.clone()
    more[spot.row, spot.positions[1]] = True
    wrong = reference.masked_logits(setup.model, batch, reference.Expected(drops=[(0, more)]))
    assert reference.difference(batch, keep, result.logits, wrong) > 0.05
    late = reference.masked_logits(setup.model, batch, reference.Expected(drops=[(1, keep)]))
    assert reference.difference(batch, keep, result.logits, late) > 0.05


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@torch.no_grad()
def test_freezing_one_sample_under_flash_attention_equals_sdpa(kind):
    setup = Setup(kind)
    row = setup.batch().row(1)  # on llava two images with text between them: three stretches
    plan = [EveryNth(stride=3), probes.Freeze(), probes.ByAttention(layer=4, keep=5)]
    found = []
    for switch in (nullcontext(), flash_attention(setup.model)):
        with switch, vtr.reduced(setup.model, plan):
            found.append((setup.model(**row.inputs, use_cache=False).logits, tiny_models.generate(setup.model, row, 4)))
    (sdpa, slow), (flash, fast) = found
    torch.testing.assert_close(flash, sdpa, atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(slow.logits), atol=2e-5, rtol=0)
