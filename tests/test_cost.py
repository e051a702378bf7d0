"""Cost formulas against published numbers and against counting by hand."""

import pytest
import torch

from vtr.cost import GIGA, TERA, TransformerShape, average_tokens, clustering_flops, encoder_flops, kv_bytes, layer_flops, prefill_flops

LLAVA_7B = TransformerShape(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128)


@pytest.mark.parametrize(("visual_tokens", "tflops"), [(576, 3.82), (2880, 20.83)])
def test_published_llava_numbers(visual_tokens, tflops):  # TransPrune, table 1 and 2: full model
    assert round(prefill_flops(LLAVA_7B, [visual_tokens] * 32) / TERA, 2) == tflops


def test_layer_formula_is_the_gated_one():
    n, d, m = 17, 4096, 11008
    assert layer_flops(LLAVA_7B, n) == 4 * n * d * d + 2 * n * n * d + 3 * n * d * m


def test_kv_is_half_a_mebibyte_per_token_in_fp16():
    assert kv_bytes(LLAVA_7B, [1] * 32, 2) == 2**19


def test_grouped_query_attention_shrinks_cache_and_projections():
    grouped = TransformerShape(32, 4096, 11008, 32, 8, 128)
    assert kv_bytes(grouped, [1] * 32, 2) == 2**17
    assert layer_flops(LLAVA_7B, 10) - layer_flops(grouped, 10) == 2 * 10 * 4096 * (4096 - 1024)


def test_frozen_layer_matches_shortv_formula():
    t, v, h, m = 40, 576, 4096, 11008
    frozen = prefill_flops(LLAVA_7B, [t + v] * 32, frozen=range(32), text=t) / 32
    assert frozen == t * (4 * h + 3 * m) * h + 2 * v * h * h + 2 * t * (t + v) * h


def test_from_config_reads_mappings_and_objects():
    config = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    assert TransformerShape.from_config(config) == TransformerShape(2, 8, 16, 2, 2, 4)
    assert TransformerShape.from_config(type("C", (), {**config, "head_dim": 6})()).head_dim == 6


def test_wrong_number_of_layers_is_refused():
    with pytest.raises(ValueError, match=r"one number per layer \(32\), got 2"):
        prefill_flops(LLAVA_7B, [1, 2])
    with pytest.raises(ValueError, match="one number per layer"):
        kv_bytes(LLAVA_7B, [1], 2)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        TransformerShape(0, 1, 1, 1, 1, 1)


def test_average_over_layers():
    assert average_tokens([576, 576, 64, 64]) == 320
    with pytest.raises(ValueError, match="at least one layer"):
        average_tokens([])


def test_vit_l_of_segmenter():  # arXiv 2210.01035 publishes 659.0 GFLOPs with a decoder of two more layers
    shape = TransformerShape(24, 1024, 4096, 16, 16, 64, mlp_matrices=2)
    assert round(encoder_flops(shape, [1601] * 24, 1600, 3 * 16 * 16) / GIGA, 1) == 610.7


def test_dense_formulas_equal_the_flop_counter_of_torch():
    """A timm ViT with 8 x 12 tokens and CLS; clustering to 4 x 6 and reconstruction by the library's own functions."""
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    from vtr.ops.clusters import cluster, tiles_of
    from vtr.ops.reconstruct import nearest, reconstruct, reconstruction
    from vtr.ops.sharpness import LADDER, SKETCH, auto_tau

    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=(64, 96), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0
    ).eval()
    for block in vit.blocks:
        block.attn.fused_attn = False  # torch has no formula for every fused kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit.forward_features(torch.randn(1, 3, 64, 96))
    shape = TransformerShape(3, 32, 128, 2, 2, 16, mlp_matrices=2)
    assert counter.get_total_flops() / 2 == encoder_flops(shape, [97] * 3, 96, 3 * 8 * 8)

    tokens = torch.randn(1, 96, 32)
    with FlopCounterMode(display=False) as counter:
        centres = cluster(tokens, (8, 12), (4, 6), tau=0.1, iterations=3, window=3)
        weights = reconstruction(tokens, centres, tau=0.1, neighbours=5)
        for _ in range(2):
            reconstruct(weights, centres)
    tiles = tiles_of((8, 12), (4, 6), 3, torch.device("cpu"))
    compared = tiles.bias.numel() / 96
    assert 9 <= compared <= 24
    assert counter.get_total_flops() / 2 == clustering_flops(32, 96, 24, 3, compared, restored=2)
    with FlopCounterMode(display=False) as counter:
        auto_tau(tokens, (8, 12), (4, 6), 3, torch.zeros(1, dtype=torch.long))
    assert counter.get_total_flops() / 2 == clustering_flops(32, 96, 24, 0, compared, restored=0, tried=len(LADDER))
    with FlopCounterMode(display=False) as counter:
        auto_tau(torch.randn(1, 96, 80), (8, 12), (4, 6), 3, torch.zeros(1, dtype=torch.long))
    assert counter.get_total_flops() / 2 == clustering_flops(80, 96, 24, 0, compared, restored=0, tried=len(LADDER), sketch=SKETCH)
    with FlopCounterMode(display=False) as counter:
        nearest(tokens, centres, tau=0.1, neighbours=5)
    gathered = 5 * 96 * 32  # torch has no formula for the weighted sum of 5 rows
    assert counter.get_total_flops() / 2 + gathered == clustering_flops(32, 96, 24, 0, compared, neighbours=5)
