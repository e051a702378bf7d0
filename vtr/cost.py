"""Closed-form cost of a prefill or of a dense encoder: FLOPs and KV-cache bytes from the number of tokens at each layer.

Convention: a multiply-add counts once, as in this literature. LLaVA-1.5-7B with 576 visual tokens in all 32 layers: 3.82 TFLOPs.
Attention is counted as the full square, causality not subtracted; norms, softmax, rotary embedding and the vocabulary projection are left
out. Real hardware does about twice these operations per multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TERA = 1e12
GIGA = 1e9
CONVENTION = "a multiply-add counts once"


@dataclass(frozen=True)
class TransformerShape:
    """What the formulas need to know about a stack of equal transformer layers.

    Args:
        layers: number of layers.
        hidden: width d.
        intermediate: inner width m of the MLP.
        heads, kv_heads, head_dim: attention heads, key/value heads (grouped-query attention) and the width of one head.
        mlp_matrices: 3 for a gated MLP (Llama, Qwen), 2 for a plain one (CLIP, SigLIP).
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_matrices: int = 3

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"TransformerShape: {name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def from_config(cls, config: Any, mlp_matrices: int = 3) -> TransformerShape:
        """From a Hugging Face text or vision config, or a mapping with the same keys."""
        get: Callable[..., Any] = config.get if isinstance(config, Mapping) else lambda name, default=None: getattr(config, name, default)
        heads = get("num_attention_heads")
        hidden = get("hidden_size")
        experts = (get("num_experts_per_tok") or 0) * (get("moe_intermediate_size") or 0)  # those that a token goes through
        intermediate = experts + (get("shared_expert_intermediate_size") or 0) if experts else get("intermediate_size")
        return cls(
            layers=get("num_hidden_layers"),
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            kv_heads=get("num_key_value_heads") or heads,
            head_dim=get("head_dim") or hidden // heads,
            mlp_matrices=mlp_matrices,
        )


def layer_flops(shape: TransformerShape, tokens: float, keys: float | None = None) -> float:
    """Multiply-adds of one layer for `tokens` queries over `keys` keys (default: the same tokens).

    With as many key heads as heads and a gated MLP this is 4nd^2 + 2n^2d + 3ndm (SparseVLM, arXiv 2410.04417; FastV, arXiv 2403.06764,
    counts two MLP matrices). Keys and values are projected for `keys` tokens, everything else runs for `tokens`.
    """
    keys = tokens if keys is None else keys
    inner, kv_inner = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    projections = 2 * tokens * shape.hidden * inner + 2 * keys * shape.hidden * kv_inner
    return projections + 2 * tokens * keys * inner + shape.mlp_matrices * tokens * shape.hidden * shape.intermediate


def prefill_flops(
    shape: TransformerShape, lengths: Sequence[float], frozen: Collection[int] = (), text: float | Sequence[float] = 0
) -> float:
    """Multiply-adds of one prompt through all layers.

    Args:
        shape: the LLM.
        lengths: tokens of the prompt at each layer (text and visual), one number per layer.
        frozen: layers in which visual tokens only give keys and values: t(4h + 3m)h + 2vh^2 + 2t(t + v)h with t text and v visual tokens
            (ShortV, arXiv 2504.00502, halved to this convention).
        text: text tokens of the prompt, for the frozen layers.

    Raises:
        ValueError: not one length per layer.
    """
    if len(lengths) != shape.layers:
        raise ValueError(f"prefill_flops: lengths must have one number per layer ({shape.layers}), got {len(lengths)}")
    texts = text if isinstance(text, Sequence) else [text] * shape.layers
    return sum(layer_flops(shape, texts[i], n) if i in frozen else layer_flops(shape, n) for i, n in enumerate(lengths))


def encoder_flops(
    shape: TransformerShape, lengths: Sequence[float], patches: int, patch_values: int, mlp_lengths: Sequence[float] | None = None
) -> float:
    """Multiply-adds of a ViT: patch embedding and every layer, without a head.

    Args:
        shape: the encoder, `mlp_matrices=2` for a plain MLP.
        lengths: tokens at each layer, prefix tokens included.
        patches: tokens of the picture.
        patch_values: numbers in a patch, e.g. 3 * 16 * 16.
        mlp_lengths: tokens at the MLP of each layer, where tokens merge inside layers; as `lengths` when None.

    ViT-L/16 at 640 pixels, as in Segmenter (1601 tokens, 24 layers): 610.7 GFLOPs.
    """
    merged = sum(lengths) - sum(mlp_lengths or lengths)
    inside = merged * shape.mlp_matrices * shape.hidden * shape.intermediate
    return patches * patch_values * shape.hidden + prefill_flops(shape, lengths) - inside


def clustering_flops(
    hidden: int,
    tokens: int,
    clusters: int,
    iterations: int,
    compared: float,
    restored: int = 1,
    tried: int = 0,
    sketch: int | None = None,
    neighbours: int | None = None,
) -> float:
    """Multiply-adds of clustering a token grid and restoring it (arXiv 2210.01035, both layers).

    Args:
        hidden: width of a token.
        tokens, clusters: before and after.
        iterations: of the clustering; each compares and averages.
        compared: centres that a token is compared with; window^2 at least, more where tokens are compared in tiles.
        restored: how often the full grid is restored with the same weights; 0 = never, and no weights are needed.
        tried: values of tau that are tried for each image first, with one comparison and an average for each; 0 = tau is known.
        sketch: width to which tokens are projected before they are averaged for a tau; None = as they are, also where they are no wider.
        neighbours: clusters that a restored token is made of; None = a product with the weights of all.

    Pooling, norms and the softmax are left out as they are elsewhere.
    """
    finding = 0.0
    if tried:
        width = min(hidden if sketch is None else sketch, hidden)
        projecting = width if width < hidden else 0
        finding = compared * hidden + projecting * hidden + tried * compared * width
    one = (clusters if neighbours is None else min(neighbours, clusters)) * hidden
    restoring = clusters * hidden + restored * one if restored else 0
    return tokens * (2 * iterations * compared * hidden + finding + restoring)


def matching_flops(shape: TransformerShape, lengths: Sequence[float]) -> float:
    """Multiply-adds of comparing half of the tokens with the other half by head-averaged keys, at each layer that merges (ToMe)."""
    return sum((n // 2) * (n - n // 2) * shape.head_dim for n in lengths)


def kv_bytes(shape: TransformerShape, lengths: Sequence[float], bytes_per_value: int) -> float:
    """Bytes of the KV cache after the prefill: a key and a value of every token at every layer.

    For LLaVA-1.5-7B in float16 this is 0.5 MiB per token that stays in all layers.
    """
    if len(lengths) != shape.layers:
        raise ValueError(f"kv_bytes: lengths must have one number per layer ({shape.layers}), got {len(lengths)}")
    return 2 * shape.kv_heads * shape.head_dim * bytes_per_value * sum(lengths)


def average_tokens(per_layer: Sequence[float]) -> float:
    """Mean over layers of the visual tokens of a layer, the number that makes methods of different stages comparable."""
    if not per_layer:
        raise ValueError("average_tokens: needs at least one layer, got none")
    return sum(per_layer) / len(per_layer)
