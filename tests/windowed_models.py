"""Small random-initialised models with attention windows, of the real timm and transformers classes.

All take 128 x 128 pixels. Swin: patches of 4, windows of 4 x 4, stages of 2, 2, 6 and 2 blocks, so the third sees 8 x 8 tokens. SAM: 16 x 16
patches of 8 pixels, windows of 4 x 4, 6 blocks of which the third and the last are global.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

SWIN = {"depths": (2, 2, 6, 2), "embed_dim": 16, "num_heads": (1, 2, 4, 8), "window_size": 4, "patch_size": 4}
SAM_GLOBAL = [2, 5]
HEADS = {"hidden_size": 16, "num_attention_heads": 2}


def timm_swin(**changes: Any) -> Any:
    """`SwinTransformer` with a linear head of 5 classes."""
    from timm.models.swin_transformer import SwinTransformer

    return _spread(SwinTransformer, **{**SWIN, "img_size": 128, "num_classes": 5, **changes})


def timm_sam(**changes: Any) -> Any:
    """`VisionTransformerSAM` with decomposed relative positions and a neck."""
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    settings = {"img_size": 128, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 4, "num_classes": 5, "neck_chans": 16}
    return _spread(
        VisionTransformerSAM, **{**settings, "use_rel_pos": True, "window_size": 4, "global_attn_indexes": SAM_GLOBAL, **changes}
    )


def hf_swin(kind: str = "SwinModel", **changes: Any) -> Any:
    """A class of `transformers.models.swin`."""
    import transformers

    return _spread(getattr(transformers, kind), _swin_config(**changes))


def mask2former(backbone: Any = None) -> Any:
    """`Mask2FormerForUniversalSegmentation` on a Swin backbone, or on the backbone of another configuration."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    pytest.importorskip("scipy", reason="Mask2Former's loss, built with the model, needs scipy")
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 5, "num_labels": 4}
    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = backbone or _swin_config(out_features=stages)
    return _spread(Mask2FormerForUniversalSegmentation, Mask2FormerConfig(backbone_config=backbone, **sizes, **layers))


def hf_sam(kind: str = "SamModel", attention: str = "sdpa", **changes: Any) -> Any:
    """`SamModel` or `SamVisionModel`."""
    import transformers

    tower = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "mlp_dim": 64, "output_channels": 16, "num_pos_feats": 8}
    vision = transformers.SamVisionConfig(
        **{**tower, "image_size": 128, "patch_size": 8, "window_size": 4, "global_attn_indexes": SAM_GLOBAL, **changes}
    )
    config = vision
    if kind == "SamModel":
        prompts = transformers.SamPromptEncoderConfig(hidden_size=16, image_size=128, patch_size=8, image_embedding_size=16)
        decoder = transformers.SamMaskDecoderConfig(**HEADS, mlp_dim=32, iou_head_hidden_dim=16)
        config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    config._attn_implementation = attention
    return _spread(getattr(transformers, kind), config)


def _swin_config(**changes: Any) -> Any:
    from transformers import SwinConfig

    return SwinConfig(**{**{k: list(v) if isinstance(v, tuple) else v for k, v in SWIN.items()}, "image_size": 128, **changes})


def _spread(build: Any, *args: Any, **settings: Any) -> Any:
    """A model in `eval()` state whose matrices, position tables included, are far from zero."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(*args, **settings)
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.15)
    return model.eval().requires_grad_(False)
