"""Gemma 3 and 4: images that see themselves, windows, layers that share keys, and models that can be reduced in part."""

import pytest
import torch

import vtr
from tests.oracles import Setup, against_masks
from tests.probes import EveryNth
from tests.tiny_models import ONE_EACH, Shot, batch_of, model_of
from vtr.testing.watching import removed_and_cached

ALONE = ONE_EACH[0]
"""A prompt without padding: where every token sees what is before it, the model makes no mask."""


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "gemma4_unified"])
@pytest.mark.parametrize("plan", [[EveryNth(stride=3)], [EveryNth(stage="prefill", layer=2)]], ids=["boundary", "prefill"])
def test_images_see_themselves_with_padding_and_without(kind, plan):
    setup = Setup(kind, dtype=torch.float64)
    assert against_masks(setup, plan, setup.batch(ALONE)) < 1e-6
    assert against_masks(setup, plan, setup.batch(*ONE_EACH, pad="right")) < 1e-6


def test_a_causal_mask_instead_of_the_models_own_would_be_found(monkeypatch):
    monkeypatch.setattr("vtr.engine.llm.hooks.own_masks", lambda host, given, before: {})
    setup = Setup("gemma3", dtype=torch.float64)
    assert against_masks(setup, [EveryNth(stride=3)], setup.batch()) > 0.01


@pytest.mark.parametrize("kind, name", [("gemma3", "fastv"), ("gemma3", "tome"), ("gemma4", "pyramiddrop"), ("gemma4_small", "divprune")])
def test_methods_leave_what_the_masked_model_sees(kind, name):
    removed, cached = removed_and_cached(vtr.create_method(name, keep=3), kind)
    assert removed < 1e-6 and cached < 1e-6


def test_every_image_of_gemma_4_has_its_own_grid():
    model, batch = model_of("gemma4"), batch_of("gemma4", ((4, Shot(96, 64), 3, Shot(32, 80), 2),))
    with vtr.reduced(model, "random", keep_ratio=0.5) as reduction:
        model(**batch.inputs)
    assert [(image.patch_grid, len(image.retained)) for image in reduction.report().images] == [((6, 4), 12), ((2, 5), 5)]


@pytest.mark.parametrize(
    "kind, name, reason",
    [
        ("gemma3", "shortv", "see each other"),
        ("gemma3", "fastervlm", "CLS token"),
        ("gemma4", "visionzip", "pads images"),
        ("gemma4_unified", "visionzip", "there is none"),
        ("gemma4_small", "fastv", "at the boundary only"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(kind, name, reason):
    with pytest.raises(vtr.VtrError, match=reason):
        vtr.plan(model_of(kind), name, **({"layers": [1]} if name == "shortv" else {"keep": 3}))


def test_flash_attention_takes_no_such_mask():
    from tests.fake_flash import flash_attention

    model, batch = model_of("gemma3"), batch_of("gemma3")
    with (
        pytest.raises(vtr.VtrError, match="use attn_implementation='sdpa'"),
        flash_attention(model),
        vtr.reduced(model, "divprune", keep=3),
    ):
        model(**batch.inputs)
