"""Closed-form cost of a prefill or of a dense encoder: FLOPs and KV-cache bytes from the number of tokens at each layer.

Convention: a multiply-add counts once, as in this literature. LLaVA-1.5-7B with 576 visual tokens in all 32 layers: 3.82 TFLOPs.
Attention is counted as the full square, causality not subtracted, and in a sliding window as that many keys for every token; norms, softmax,
rotary embedding, gates and the vocabulary projection are left out. Real hardware does about twice these operations per multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TERA = 1e12
GIGA = 1e9
CONVENTION = "a multiply-add counts once"
CHUNK = 64
"""Tokens that a gated delta net computes at once in a prefill; `torch_chunk_gated_delta_rule` of transformers and the kernels of FLA."""


@dataclass(frozen=True)
class LinearShape:
    """What the formulas need to know about a gated delta net, whose state does not grow with the prompt (arXiv 2412.06464).

    Args:
        key_heads, value_heads: heads of queries and keys, and of values.
        key_dim, value_dim: width of one of them.
        kernel: taps of the convolution in front of the recurrence.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def channels(self) -> int:
        """Returns the numbers of a token that the convolution sees: its query, key and value."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def flops(self, hidden: int, tokens: float) -> float:
        """Returns the multiply-adds for `tokens` of width `hidden`: projections (query, key, value, gate, decay, write strength, output), the
        convolution, and the recurrence in chunks, triangular systems counted as full products."""
        inner = self.value_heads * self.value_dim
        projections = hidden * (self.channels + 2 * inner + 2 * self.value_heads)
        inside = CHUNK * (3 * self.key_dim + 2 * self.value_dim) + 3 * self.key_dim * self.value_dim
        return tokens * (projections + self.kernel * self.channels + self.value_heads * inside)

    def state_bytes(self, bytes_per_value: int) -> int:
        """Returns the bytes that stay in a cache: the state, which is float32 whatever the model's dtype, and the last inputs of the convolution."""
        return 4 * self.value_heads * self.key_dim * self.value_dim + bytes_per_value * self.kernel * self.channels


@dataclass(frozen=True)
class TransformerShape:
    """What the formulas need to know about a stack of transformer layers, which are equal where `kinds` and `shared` say nothing else.

    Args:
        layers: number of layers.
        hidden: width d.
        intermediate: inner width m of the MLP.
        heads, kv_heads, head_dim: attention heads, key/value heads (grouped-query attention) and the width of one head.
        mlp_matrices: 3 for a gated MLP (Llama, Qwen), 2 for a plain one (CLIP, SigLIP).
        kinds: type of every layer as configurations name it, e.g. `sliding_attention`; empty = full attention everywhere.
        window: tokens that a layer with sliding attention sees.
        linear: what layers with linear attention are like.
        query_matrices: 2 where the query projection makes a gate, too (Qwen3.5).
        heads_by_layer: `(kv_heads, head_dim)` of every layer where they differ (Gemma 4).
        tied: keys of layers with full attention are their values, too.
        shared: last layers that use keys and values of earlier ones.
        shared_intermediate: inner width of the MLP of those, None = as the others.
        embedded: width of an embedding of the token that every layer is given for itself, 0 = none (Gemma 4 E2B, E4B).
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_matrices: int = 3
    kinds: tuple[str, ...] = ()
    window: int | None = None
    linear: LinearShape | None = None
    query_matrices: int = 1
    heads_by_layer: tuple[tuple[int, int], ...] = ()
    tied: bool = False
    shared: int = 0
    shared_intermediate: int | None = None
    embedded: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"TransformerShape: {name} must be at least 1, got {getattr(self, name)}")
        if self.kinds and len(self.kinds) != self.layers:
            raise ValueError(f"TransformerShape: kinds must have one entry per layer ({self.layers}), got {len(self.kinds)}")

    def is_linear(self, layer: int) -> bool:
        """Returns whether a layer is a recurrence, without keys."""
        return bool(self.kinds) and "linear" in self.kinds[layer] and self.linear is not None

    def window_of(self, layer: int) -> int | None:
        """Returns how many tokens a layer sees, None = all."""
        slides = bool(self.kinds) and "sliding" in self.kinds[layer]
        return self.window if slides else None

    def heads_of(self, layer: int) -> tuple[int, int]:
        """Returns the key heads of a layer and the width of a head."""
        return self.heads_by_layer[layer] if self.heads_by_layer else (self.kv_heads, self.head_dim)

    def borrows(self, layer: int) -> bool:
        """Returns whether a layer uses keys and values of an earlier one."""
        return layer >= self.layers - self.shared

    @classmethod
    def from_config(cls, config: Any, mlp_matrices: int = 3) -> TransformerShape:
        """From a Hugging Face text or vision config, or a mapping with the same keys."""
        own = () if isinstance(config, Mapping) else tuple(getattr(config, "per_layer_config", None) or ())  # Gemma 4
        first = own[0] if own else config
        get: Callable[..., Any] = config.get if isinstance(config, Mapping) else lambda name, default=None: getattr(first, name, default)
        heads = get("num_attention_heads")
        hidden = get("hidden_size")
        experts = (get("num_experts_per_tok") or 0) * (get("moe_intermediate_size") or 0)  # those that a token goes through
        intermediate = experts + (get("shared_expert_intermediate_size") or 0) if experts else get("intermediate_size")
        layers, window, kinds = get("num_hidden_layers"), get("sliding_window"), get("layer_types")
        if not kinds and window and get("use_sliding_window", True):
            kinds = ["sliding_attention"] * layers  # Mistral
        linear = tuple(
            get(f"linear_{name}") for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
        )
        shared = get("num_kv_shared_layers") or 0
        by_layer = tuple(
            (getattr(one, "num_key_value_heads", None) or heads, getattr(one, "head_dim", None) or hidden // heads) for one in own
        )
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            kv_heads=get("num_key_value_heads") or heads,
            head_dim=get("head_dim") or hidden // heads,
            mlp_matrices=mlp_matrices,
            kinds=tuple(kinds or ()),
            window=window,
            linear=LinearShape(*linear) if all(linear) else None,
            query_matrices=2 if all(linear) else 1,
            heads_by_layer=by_layer if len(set(by_layer)) > 1 else (),
            tied=bool(get("attention_k_eq_v")),
            shared=shared,
            shared_intermediate=2 * intermediate if shared and get("use_double_wide_mlp") else None,
            embedded=get("hidden_size_per_layer_input") or 0,
        )


def layer_flops(shape: TransformerShape, tokens: float, keys: float | None = None, layer: int = 0) -> float:
    """Multiply-adds of one layer for `tokens` queries over `keys` keys (default: the same tokens); `layer` says which, where they differ.

    With as many key heads as heads and a gated MLP this is 4nd^2 + 2n^2d + 3ndm (SparseVLM, arXiv 2410.04417; FastV, arXiv 2403.06764,
    counts two MLP matrices). Keys and values are projected for `keys` tokens, everything else runs for `tokens`. In a sliding window of w a token
    meets min(keys, w) keys.
    """
    keys = tokens if keys is None else keys
    borrows = shape.borrows(layer)
    mlp = shape.mlp_matrices * tokens * shape.hidden * ((shape.shared_intermediate if borrows else None) or shape.intermediate)
    mlp += 2 * tokens * shape.hidden * shape.embedded  # into its width and back
    if shape.is_linear(layer):
        assert shape.linear is not None
        return shape.linear.flops(shape.hidden, tokens) + mlp
    kv_heads, head_dim = shape.heads_of(layer)
    inner, kv_inner, full = shape.heads * head_dim, kv_heads * head_dim, shape.window_of(layer) is None
    made = 0 if borrows else 1 if shape.tied and full else 2
    projections = (1 + shape.query_matrices) * tokens * shape.hidden * inner + made * keys * shape.hidden * kv_inner
    return projections + 2 * tokens * min(keys, shape.window_of(layer) or keys) * inner + mlp


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
    embedding = lengths[0] * shape.hidden * shape.layers * shape.embedded  # of every layer, made in front of the first
    return embedding + sum(
        layer_flops(shape, texts[i], n, i) if i in frozen else layer_flops(shape, n, None, i) for i, n in enumerate(lengths)
    )


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

    For LLaVA-1.5-7B in float16 this is 0.5 MiB per token that stays in all layers. A layer with a sliding window of w keeps the last w - 1 tokens,
    one with linear attention a state of one size, one that uses the keys of another layer nothing.
    """
    if len(lengths) != shape.layers:
        raise ValueError(f"kv_bytes: lengths must have one number per layer ({shape.layers}), got {len(lengths)}")
    total = 0.0
    for layer, length in enumerate(lengths):
        if shape.is_linear(layer):
            assert shape.linear is not None
            total += shape.linear.state_bytes(bytes_per_value)
        elif not shape.borrows(layer):
            kv_heads, head_dim = shape.heads_of(layer)
            window = shape.window_of(layer)
            total += 2 * kv_heads * head_dim * bytes_per_value * (length if window is None else min(length, window - 1))
    return total


def average_tokens(per_layer: Sequence[float]) -> float:
    """Mean over layers of the visual tokens of a layer, the number that makes methods of different stages comparable."""
    if not per_layer:
        raise ValueError("average_tokens: needs at least one layer, got none")
    return sum(per_layer) / len(per_layer)
