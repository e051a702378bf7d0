"""SmolVLM and Idefics 3: tiles of a prompt are one image, filler tiles are none, and the tower is entered in the order of tokens."""

import pytest
import torch

import vtr
from tests.oracles import Setup, against_masks
from tests.probes import EveryNth, Ragged, TowerTop
from tests.tiny_models import Shot, batch_of, build, generate, model_of
from vtr.testing.watching import removed_and_cached

ROWS = ((4, Shot(96, 96), 6), (3, Shot(48, 96), 5), (7,))
"""An image of four tiles, one of two tiles, and a prompt of text."""


def packed_rows(kind):
    """The same prompts with the pixel values of a processor: a row per prompt, also where there is only text."""
    batch = batch_of(kind, ROWS, dtype=torch.float64)
    pixels = batch.inputs["pixel_values"]
    pixels = torch.cat([pixels, torch.zeros_like(pixels[:1])])
    return batch.changed(pixel_values=pixels, pixel_attention_mask=(pixels != 0).any(2).long())


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
@pytest.mark.parametrize("plan", [[Ragged(), EveryNth(stage="prefill", layer=2)], [TowerTop(), EveryNth()]], ids=["llm", "tower"])
def test_tiles_of_a_prompt_are_one_image_and_filler_is_none(kind, plan):
    assert against_masks(Setup(kind, dtype=torch.float64), plan, packed_rows(kind)) < 1e-6


def test_a_budget_is_that_of_a_prompt():
    model, batch = model_of("smolvlm"), batch_of("smolvlm", ((4, Shot(96, 96), 2, Shot(48, 48), 6), (5, Shot(48, 96), 3)))
    pixels = batch.inputs["pixel_values"]
    first = torch.cat([pixels[0], pixels[1, :1]])
    filler = torch.zeros_like(first)
    filler[:2] = pixels[2, :2]
    inputs = {**batch.inputs, "pixel_values": torch.stack([first, filler])}
    for call in (model, lambda **inputs: generate(model, batch.changed(**inputs), 2)):
        with vtr.reduced(model, "divprune", keep=6) as reduction, torch.no_grad():
            call(**inputs)
        images = reduction.report().images
        assert [(image.row, image.views, image.visual_tokens, len(image.retained)) for image in images] == [(0, 5, 80, 6), (1, 2, 32, 6)]


@pytest.mark.parametrize("name", ["visionzip", "tome", "fastv"])
def test_methods_leave_what_the_masked_model_sees(name):
    removed, cached = removed_and_cached(vtr.create_method(name, keep=5), "smolvlm")
    assert removed < 1e-6 and cached < 1e-6


def test_patches_in_raster_order_would_be_found(monkeypatch):
    from vtr.hosts import hf_smolvlm

    setup, plan = Setup("smolvlm", dtype=torch.float64), [TowerTop(layer=1), EveryNth(stride=2)]
    right = hf_smolvlm.JoinedTower

    def raster(**facts):
        return right(**{**facts, "members": torch.arange(facts["members"].numel()).view_as(facts["members"])})

    monkeypatch.setattr(hf_smolvlm, "JoinedTower", raster)
    assert not against_masks(setup, plan, setup.batch()) < 0.01


@pytest.mark.parametrize("kind", ["internvl", "smolvlm", "gemma3", "mistral3"])
def test_gradients_of_the_projector_have_nothing_of_what_is_gone(kind):
    """In these families all units come back in front of the projector, where gaps are no values."""
    model, batch = build(kind).requires_grad_(True), batch_of(kind)
    labels = batch.inputs["input_ids"].masked_fill(batch.visual | ~batch.valid, -100)
    with vtr.reduced(model, [TowerTop(), EveryNth(stride=2)]):
        model(**batch.inputs, labels=labels).loss.backward()
    wrong = [name for name, weight in model.named_parameters() if weight.grad is not None and not bool(weight.grad.isfinite().all())]
    assert not wrong


def test_hidden_pixels_close_the_tower():
    model, batch = model_of("smolvlm", dtype=torch.float64), packed_rows("smolvlm")
    mask = batch.inputs["pixel_attention_mask"].clone()
    mask[0, 0, :, 24:] = 0
    with vtr.reduced(model, "visionzip", keep=6), pytest.raises(vtr.VtrError, match="pixel_attention_mask hides pixels"):
        model(**{**batch.inputs, "pixel_attention_mask": mask})
    setup = Setup("smolvlm", dtype=torch.float64)
    assert against_masks(setup, [EveryNth(stride=3)], batch.changed(pixel_attention_mask=mask)) < 1e-6


def test_what_it_cannot_do_is_refused_by_name():
    model, batch = model_of("smolvlm"), batch_of("smolvlm")
    for name, reason in [("globalcom2", "tiles"), ("fastervlm", "CLS"), ("resize", "stage 'input'")]:
        with pytest.raises(vtr.VtrError, match=reason):
            vtr.plan(model, name, keep=5)
    features = model.model.get_image_features(batch.inputs["pixel_values"]).pooler_output
    features = features if isinstance(features, torch.Tensor) else torch.cat(features)  # one by one from transformers 5.23 on
    tokens = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    with vtr.reduced(model, "divprune", keep=5):
        with pytest.raises(vtr.VtrError, match="got a tensor"):
            model(**tokens, mm_encoder_outputs=features)
        with pytest.raises(vtr.VtrError, match="size of the checkpoint"):
            model(**{**batch.inputs, "pixel_values": torch.randn(1, 1, 3, 48, 64)})
