"""SAM's encoders: blocks that are read in between, and what is refused."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests import windowed_models as models
from tests import windowed_reference as reference
from vtr.types import VtrError

PIXELS = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(5))
SETTINGS = {"alpha": 2, "grid": (3, 3), "tau": 0.02, "neighbours": 4}


def test_tapped_blocks_are_restored_with_the_same_weights() -> None:
    model = models.timm_sam()
    expected = reference.timm_sam(model, PIXELS, 2, 3, 0.02, 4, taps=(3, 5))
    with vtr.reduced(model, "expedit", **SETTINGS) as reduction:
        last, (third, fifth) = model.forward_intermediates(PIXELS, indices=[3, 5])
    for got, want in zip((third, fifth, last), expected, strict=True):
        assert (got - want).abs().max() < 1e-4
    assert reduction.report().tokens_per_block == [256, 256, 144, 144, 144, 144]


def test_features_only() -> None:
    import timm

    sizes = {"img_size": 128, "embed_dim": 32, "depth": 6, "num_heads": 4, "window_size": 4, "global_attn_indexes": (2, 5)}
    model = timm.create_model(
        "samvit_base_patch16", pretrained=False, features_only=True, patch_size=8, out_indices=(1, 3, 5), **sizes
    ).eval()
    full = model(PIXELS)
    with vtr.reduced(model, "expedit", **SETTINGS):
        short = model(PIXELS)
    assert [a.shape for a in full] == [a.shape for a in short]
    assert [torch.equal(a, b) for a, b in zip(full, short, strict=True)] == [True, False, False]


def test_hidden_states_of_transformers_have_the_full_grid() -> None:
    model = models.hf_sam("SamVisionModel")
    full = model(PIXELS, output_hidden_states=True)
    with vtr.reduced(model, "expedit", **SETTINGS):
        short = model(PIXELS, output_hidden_states=True)
        plain = model(PIXELS)
    assert [a.shape for a in short.hidden_states] == [a.shape for a in full.hidden_states]
    assert (short.last_hidden_state - plain.last_hidden_state).abs().max() < 1e-5
    assert torch.equal(short.hidden_states[2], full.hidden_states[2])


def test_both_attention_implementations_agree() -> None:
    got = []
    for attention in ("sdpa", "eager"):
        model = models.hf_sam(attention=attention)
        with vtr.reduced(model, "expedit", **SETTINGS):
            got.append(model.get_image_embeddings(PIXELS))
    assert (got[0] - got[1]).abs().max() < 1e-4


def test_masks_from_prompts() -> None:
    model = models.hf_sam()
    prompts = {"input_points": torch.tensor([[[[30.0, 40.0]]], [[[90.0, 20.0]]]])}
    full = model(pixel_values=PIXELS, **prompts)
    with vtr.reduced(model, "expedit", **SETTINGS) as reduction:
        short = model(pixel_values=PIXELS, **prompts)
    assert short.pred_masks.shape == full.pred_masks.shape
    assert not torch.equal(short.pred_masks, full.pred_masks)
    assert len(reduction.report().images) == 2


def test_parts_of_one_model_cannot_be_reduced_twice() -> None:
    model = models.hf_sam()
    with vtr.reduced(model, "expedit", **SETTINGS), pytest.raises(VtrError, match="reduced already"):
        vtr.apply(model.vision_encoder, "expedit", **SETTINGS)


def test_what_cannot_be_clustered_is_named() -> None:
    with pytest.raises(VtrError, match="no block with attention windows"):
        vtr.apply(models.timm_sam(window_size=0), "expedit", alpha=2)
    with pytest.raises(VtrError, match="rotary positions"):
        vtr.apply(models.timm_sam(use_rel_pos=False, use_rope=True), "expedit", alpha=2)
    model = models.hf_sam()
    with pytest.raises(VtrError, match="SamMaskDecoder has no vision encoder"):
        model.mask_decoder.config.model_type = "sam"
        vtr.apply(model.mask_decoder, "expedit", alpha=2)
