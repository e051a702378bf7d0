"""Mistral 3 and Pixtral inside LLaVA: images of any grid, rows closed by break tokens that are text, but no question."""

import pytest
import torch

import vtr
from tests import probes
from tests.oracles import Setup, against_masks
from tests.probes import EveryNth, Ragged
from tests.tiny_models import WITH_TEXT_ONLY, batch_of, build, model_of
from vtr.testing.pixtral import BREAK, END
from vtr.testing.watching import removed_and_cached

KINDS = ("mistral3", "llava_pixtral")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_any_grids_any_padding_and_rows_without_an_image(kind, pad):
    setup = Setup(kind, dtype=torch.float64)
    plan = [Ragged(), EveryNth(stage="prefill", layer=2)]
    assert against_masks(setup, plan, setup.batch(*WITH_TEXT_ONLY, pad=pad)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_break_tokens_stay_and_are_no_question(kind):
    model, batch = model_of(kind), batch_of(kind)
    probes.OBSERVED.clear()
    with torch.no_grad(), vtr.reduced(model, [EveryNth(stride=3), probes.Observe(stage="prefill", layer=2)]) as reduction:
        model(**batch.inputs)
    (view,) = probes.OBSERVED
    ids = batch.inputs["input_ids"]
    breaks = (ids == BREAK) | (ids == END)
    for row, kept in enumerate(reduction.report().positions):
        assert set(breaks[row].nonzero()[:, 0].tolist()) <= set(kept)
    asked = [int(view.text.instruction[group].sum()) for group in range(3)]
    assert asked == [6 + 1, 2 + 3 + 2, 2 + 3 + 2], "text behind the first image, and the end tokens of images"


def test_without_image_sizes_nothing_is_filler():
    model, batch = model_of("llava_pixtral"), batch_of("llava_pixtral")
    inputs = dict(batch.inputs)
    pixels = inputs["pixel_values"][:1, :, :48, :32]
    ids = torch.tensor([[5, *[100] * 24, 6, 7]])
    with vtr.reduced(model, "divprune", keep=5) as reduction, torch.no_grad():
        model(input_ids=ids, pixel_values=pixels)
    (image,) = reduction.report().images
    assert (image.visual_tokens, len(image.retained)) == (24, 5)


@pytest.mark.parametrize("name", ["divprune", "pool", "sparsevlm"])
def test_methods_leave_what_the_masked_model_sees(name):
    settings = {"keep_ratio": 0.3} if name == "sparsevlm" else {"keep": 5}
    removed, cached = removed_and_cached(vtr.create_method(name, **settings), "mistral3")
    assert removed < 1e-6 and cached < 1e-6


def test_a_tower_that_loses_its_first_patch_is_refused():
    with pytest.raises(vtr.VtrError, match="cuts off the first patch"):
        vtr.host_of(build("llava_pixtral", vision_feature_select_strategy="default"))
