"""Small random dense ViTs of every plain host: six blocks wide 32, with 6 x 6 patches unless the input says otherwise."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

SMALL = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 96, "patch_size": 16}
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
SHARP = {"alpha": 2, "grid": (6, 6), "tau": 1e6, "neighbours": 1}
COARSE = {"alpha": 2, "grid": (4, 4)}


def timm_model(name: str, **settings) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, embed_dim=32, num_heads=4, depth=6, img_size=96, patch_size=16, **settings)


def hf_model(name: str, **settings) -> nn.Module:
    import transformers

    return getattr(transformers, name)(getattr(transformers, name.removesuffix("Model") + "Config")(**SMALL, **settings))


def clip_model() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    tower = open_clip.transformer.VisionTransformer(96, 16, 32, 6, 4, 2.0, output_dim=16, output_tokens=True)
    return tower


def depth_model(hybrid: bool) -> nn.Module:
    from transformers import DPTConfig, DPTForDepthEstimation

    settings = {"is_hybrid": True, "readout_type": "project"} if hybrid else {"is_hybrid": False}
    return DPTForDepthEstimation(DPTConfig(**SMALL, **NECK, backbone_out_indices=[1, 2, 4, 5], **settings))


def depth_anything() -> nn.Module:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    inner = Dinov2Config(**SMALL, out_indices=[2, 3, 5, 6], reshape_hidden_states=False)
    return DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=inner, **NECK, reassemble_hidden_size=32, patch_size=16))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm_model("vit_tiny_patch16_224"),
    "timm no CLS": lambda: timm_model("vit_tiny_patch16_224", class_token=False, global_pool="avg"),
    "timm DINOv2 registers": lambda: timm_model("vit_small_patch14_reg4_dinov2", init_values=0.5),
    "timm EVA02 rotary": lambda: timm_model("eva02_tiny_patch14_224"),
    "timm DINOv3 rotary": lambda: timm_model("vit_small_patch16_dinov3"),
    "timm features_only": lambda: timm_model("vit_tiny_patch16_224", features_only=True, out_indices=(1, 3, 5)),
    "open_clip": clip_model,
    "ViT": lambda: hf_model("ViTModel"),
    "DeiT": lambda: hf_model("DeiTModel"),
    "DINOv2": lambda: hf_model("Dinov2Model"),
    "DINOv2 registers": lambda: hf_model("Dinov2WithRegistersModel", num_register_tokens=4),
    "DINOv3": lambda: hf_model("DINOv3ViTModel", num_register_tokens=4),
    "CLIP": lambda: hf_model("CLIPVisionModel"),
    "SigLIP": lambda: hf_model("SiglipVisionModel"),
    "DPT": lambda: depth_model(False),
    "Depth Anything": depth_anything,
}


@cache
def model_of(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MODELS[kind]()
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.15)
    return model.eval().requires_grad_(False)


def images(count: int = 2, height: int = 96, width: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(7)).to(dtype)


def outputs(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """All tensors that a call returns."""
    made = model(pixels)
    made = list(made.values()) if isinstance(made, dict) else [made] if isinstance(made, Tensor) else list(made)
    return [value for value in made if isinstance(value, Tensor)]
