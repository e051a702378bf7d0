"""Plain ViTs of Hugging Face transformers: ViT, DeiT, DINOv2 and v3, I-JEPA, CLIP and SigLIP towers, and the depth and segmentation models
that read several of their blocks (DPT, Depth Anything).

Internals used: `embeddings.{patch_embeddings, patch_embedding, projection}`, `layers` or `encoder.{layer, layers}` or `model.layer`,
`config.{image_size, patch_size, num_register_tokens, backbone_out_indices, output_hidden_states}`, `out_indices` of backbones, the keyword
`position_embeddings` of DINOv3's layers; for merging `attention.k_proj`, `layernorm_after` and `mlp`, or `norm2` and `layer_scale2`, CLIP's
and SigLIP's `self_attn.k_proj`, `layer_norm2` and `mlp`, DPT's `attention.attention.key`, `layernorm_after` and `output.dense`. Read at
transformers 5.17 and 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from inspect import signature
from typing import Any

from torch import nn

from vtr.hosts._dense import DenseHost, Grid, MergePoint
from vtr.registry import register_host
from vtr.types import VtrError

PREFIX = {
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "dpt": 1,
    "ijepa": 0,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
}
"""CLS and distillation tokens by model type; register tokens come on top."""
LAYERS = ("layers", "layer", "encoder.layer", "encoder.layers", "model.layer")
PATCHES = ("patch_embeddings.projection", "patch_embeddings", "patch_embedding", "projection")


@register_host(*PREFIX, "depth_anything")
def hf_vit(model: Any) -> DenseHost:
    """A plain ViT, alone or inside a model for depth, segmentation or classification."""
    outer = model.config
    inner = next(
        (m for m in model.modules() if isinstance(getattr(m, "embeddings", None), nn.Module) and _first(m, LAYERS) is not None), None
    )
    kind = getattr(getattr(inner, "config", None), "model_type", None)
    if inner is None or kind not in PREFIX:
        raise VtrError(f"{outer.model_type}: its encoder is {kind!r}, not a plain ViT; known: {', '.join(PREFIX)}")
    blocks, patches = _first(inner, LAYERS), _first(inner.embeddings, PATCHES, nn.Conv2d)
    if patches is None:
        raise VtrError(
            f"{outer.model_type}: its {type(inner.embeddings).__name__} shows no token grid; only patches made by a convolution do"
        )
    config = inner.config
    return DenseHost(
        name=outer.model_type,
        model=model,
        blocks=blocks,
        patches=patches,
        prefix_tokens=PREFIX[kind] + int(getattr(config, "num_register_tokens", 0) or 0),
        has_cls=PREFIX[kind] > 0,
        patch_grid=_grid(config),
        dynamic=True,  # positions can be interpolated to other sizes
        entries={"forward": _reader(model, inner)},
        rotary="position_embeddings" if kind == "dinov3_vit" else "",
        merge_point=_merge_point(kind, config, blocks[0]),
    )


def _merge_point(kind: str, config: Any, block: Any) -> MergePoint | None:
    """ViT, DeiT, DINOv2, CLIP, SigLIP and DPT, where no dropout shared by both branches is in the way."""
    attention = getattr(block, "attention", None)
    if kind in ("clip_vision_model", "siglip_vision_model"):
        norm, branch, attention = "layer_norm2", "mlp", getattr(block, "self_attn", None)
    elif kind == "dpt" and not config.hidden_dropout_prob:  # its blocks take no mask
        norm, branch, attention = "layernorm_after", "output.dense", getattr(attention, "attention", None)
    elif kind in ("vit", "deit") and not config.hidden_dropout_prob:
        norm, branch = "layernorm_after", "mlp"
    elif kind.startswith("dinov2") and not config.drop_path_rate:
        norm, branch = "norm2", "layer_scale2"
    else:
        return None
    keys = next((name for name in ("k_proj", "key") if hasattr(attention, name)), None)
    if keys is None or any(_first(block, (name,), nn.Module) is None for name in (norm, branch)):
        return None  # an older layout
    where = f"{next(name for name, module in block.named_modules() if module is attention)}.{keys}"
    takes_mask = list(signature(block.forward).parameters)[1:2] == ["attention_mask"]
    return MergePoint(
        keys=lambda block: block.get_submodule(where),
        norm=lambda block: block.get_submodule(norm),
        branch=lambda block: block.get_submodule(branch),
        mask="attention_mask" if takes_mask else None,
        heads=config.num_attention_heads,
    )


def _reader(model: Any, inner: Any) -> Any:
    """Which blocks a forward reads: those of the head or the backbone, all when hidden states are asked for."""
    config = model.config

    def read(arguments: Mapping[str, Any]) -> Sequence[int] | None:
        asked = arguments.get("output_hidden_states")
        if asked if asked is not None else getattr(config, "output_hidden_states", False):
            return None
        if getattr(inner, "out_indices", None):  # counts the embeddings as 0
            return [i - 1 if i >= 0 else i + len(inner.stage_names) - 1 for i in inner.out_indices if i != 0]
        heads = getattr(config, "backbone_out_indices", None) or () if config.model_type == "dpt" else ()
        return list(heads[2 if getattr(config, "is_hybrid", False) else 0 :])

    return read


def _first(owner: Any, paths: Sequence[str], kind: type = nn.ModuleList) -> Any:
    """The first of these attributes (dots go deeper) that is a module of that kind, or None."""
    found = (reduce(lambda at, name: getattr(at, name, None), path.split("."), owner) for path in paths)
    return next((module for module in found if isinstance(module, kind)), None)


def _grid(config: Any) -> Grid:
    size, patch = (value if isinstance(value, (list, tuple)) else (value, value) for value in (config.image_size, config.patch_size))
    return int(size[0] // patch[0]), int(size[1] // patch[1])
