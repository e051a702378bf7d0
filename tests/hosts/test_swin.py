"""Swin: its clusterable stage, and the shapes in which timm and transformers hand it out."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests import windowed_models as models
from vtr.hosts._windows import smaller_bias
from vtr.types import VtrError

PIXELS = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("build", [models.timm_swin, models.hf_swin, models.mask2former])
@pytest.mark.parametrize("alpha", [0, 3, 10, 11])
def test_a_stage_that_is_not_clusterable_is_named(build, alpha) -> None:
    with pytest.raises(ValueError, match=f"alpha={alpha} must be from 4 to 9"):
        vtr.apply(build(), "expedit", alpha=alpha, grid=(3, 3))


@pytest.mark.parametrize("alpha", [4, 9])
def test_first_and_last_block_of_the_stage_may_be_clustered(alpha) -> None:
    model = models.timm_swin()
    with vtr.reduced(model, "expedit", alpha=alpha, grid=(2, 2)) as reduction:
        model(PIXELS)
    assert reduction.report().tokens_per_block == [1024, 1024, 256, 256, *[64] * (alpha - 4), *[16] * (10 - alpha), 16, 16]


def test_blocks_end_the_clusters_inside_the_stage() -> None:
    model = models.hf_swin()
    with vtr.reduced(model, "expedit", alpha=5, blocks=2, grid=(3, 3)) as reduction:
        model(PIXELS)
        sides = [block.window_size for block in model.encoder.layers[2].blocks]
    assert reduction.report().tokens_per_block[4:10] == [64, 36, 36, 64, 64, 64]
    assert sides == [4, 3, 3, 4, 4, 4]


def test_the_default_grid_is_the_published_one() -> None:
    model = models.timm_swin(img_size=384, window_size=12)
    with vtr.reduced(model, "expedit", alpha=5) as reduction:
        model(torch.zeros(1, 3, 384, 384))
    assert reduction.report().small_grid == (8, 8)


def test_shift_and_mask_of_clustered_blocks_belong_together() -> None:
    model = models.timm_swin()
    block = model.layers[2].blocks[1]
    with vtr.reduced(model, "expedit", alpha=4, grid=(3, 3)):
        assert block.shift_size == (1, 1)
        mask = block.get_attn_mask(torch.zeros(1, 6, 6, 1))
    regions = torch.tensor([0, 0, 0, 1, 1, 2])  # a window, then the two pieces that the roll by 3 // 2 brought together
    plane = (3 * regions[:, None] + regions).reshape(2, 3, 2, 3).transpose(1, 2).reshape(4, 9)
    assert torch.equal(mask == 0, plane[:, None] == plane[:, :, None])
    assert block.shift_size == (2, 2)


@pytest.mark.parametrize("kind", ["SwinBackbone", "SwinForImageClassification", "SwinForMaskedImageModeling"])
def test_every_swin_of_transformers(kind) -> None:
    model = models.hf_swin(kind, **({"out_features": ["stage2", "stage3", "stage4"]} if kind == "SwinBackbone" else {}))
    full = model(PIXELS)
    with vtr.reduced(model, "expedit", alpha=6, grid=(3, 3)) as reduction:
        short = model(PIXELS)
    assert reduction.report().tokens_per_block[6] == 36
    pairs = zip(full.feature_maps, short.feature_maps, strict=True) if kind == "SwinBackbone" else [(full[0], short[0])]
    same = [torch.equal(a, b) for a, b in pairs]
    assert same == ([True, False, False] if kind == "SwinBackbone" else [False])  # restored before the third stage's norm


def test_hidden_states_are_restored_at_every_stage() -> None:
    model = models.hf_swin()
    full = model(PIXELS, output_hidden_states=True)
    with vtr.reduced(model, "expedit", alpha=6, grid=(3, 3)):
        short = model(PIXELS, output_hidden_states=True)
    assert [a.shape for a in short.hidden_states] == [a.shape for a in full.hidden_states]
    assert [a.shape for a in short.reshaped_hidden_states] == [a.shape for a in full.reshaped_hidden_states]


def test_features_only() -> None:
    import timm

    sizes = {"img_size": 128, "window_size": 4, "embed_dim": 16, "num_heads": (1, 2, 4, 8), "depths": (2, 2, 4, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, features_only=True, **sizes).eval()
    full = model(PIXELS)
    with vtr.reduced(model, "expedit", alpha=5, grid=(2, 2)) as reduction:
        short = model(PIXELS)
    assert [torch.equal(a, b) for a, b in zip(full, short, strict=True)] == [True, True, False, False]
    assert [a.shape for a in full] == [a.shape for a in short]
    assert reduction.report().tokens_per_block[5] == 16


def test_what_cannot_be_clustered_is_named() -> None:
    import timm
    from transformers import ResNetConfig

    with pytest.raises(VtrError, match="holds no SwinTransformerStage"):
        vtr.apply(timm.create_model("resnet10t", pretrained=False, features_only=True), "expedit")
    with pytest.raises(VtrError, match="windows are 4 x 2"):
        vtr.apply(models.timm_swin(window_size=(4, 2)), "expedit", alpha=5)
    resnet = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    with pytest.raises(VtrError, match="backbone ResNetBackbone is not Swin"):
        vtr.apply(models.mask2former(resnet), "expedit", alpha=5)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_smaller_bias_is_a_function_of_the_offset_and_keeps_a_linear_one(side) -> None:
    window, heads = 4, 2
    at = torch.arange(2 * window - 1.0) - (window - 1)
    table = torch.stack([at[:, None] + 0 * at, 0 * at[:, None] + 2 * at], -1).flatten(
        0, 1
    )  # head 0 the rows apart, head 1 twice the columns
    bias = smaller_bias(table, window, side)()
    assert bias.shape == (1, heads, side * side, side * side)
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    apart = (cells[:, None] - cells).float()
    scale = (2 * window - 1) / (2 * side - 1)
    inside = apart.abs() < side - 1  # beyond the outermost centres bilinear resizing is constant
    for head, axis, factor in ((0, 0, 1), (1, 1, 2)):
        expected = factor * scale * apart[..., axis]
        assert torch.allclose(bias[0, head][inside[..., axis]], expected[inside[..., axis]], atol=1e-5)
