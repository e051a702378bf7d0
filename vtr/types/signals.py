"""What a step may read beside the tokens.

Letters in shapes: `B` prompt rows, `G` image groups (one image of one prompt row, all its views), `N` visual tokens of a group, `M` text tokens
of its row, `K` kept, `D` width, `H` heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from vtr.types.errors import WrongValue
from vtr.types.naming import closest, named
from vtr.types.settings import check_choices, check_types

SignalKind = Literal[
    "cls_row",
    "cls_v",
    "pooled_row",
    "received",
    "rows",
    "q",
    "k",
    "v",
    "next_q",
    "next_k",
    "attention_io",
    "mlp_io",
    "mlp_activation",
    "text_embedding",
    "frame_score",
]


@dataclass(frozen=True)
class Signal:
    """One thing a step reads beside the tokens; computed only when asked for.

    Args:
        kind: what; shapes below. In the LLM, per-token signals come as `PerToken`.
        layer: 0-based layer whose attention or MLP is read; None = the layer before the step's (`next_*`: the step's own).
        tower: True reads the vision tower also for a step at the boundary or prefill; a tower step always reads the tower.
        heads: keep the head dimension instead of the mean over heads.
        softmax: False gives scaled logits instead of attention weights (`cls_row`, `pooled_row`).
        queries: for `rows`: the last real token, the text tokens or the visual tokens of the group's row.
        keys: for `rows`: columns returned; the softmax always runs over every key that a query may see.
        source: for `text_embedding`: hub id or folder of the CLIP checkpoint whose text tower embeds the question.

    Shapes:
        cls_row, pooled_row: `(G, N)` or `(G, H, N)`, float32; softmax over all tokens of the view, prefix tokens then cut off.
        received: `(G, N)` or `(G, H, N)` float32, the mean over all queries of what they pay to a token; the softmax runs over all tokens of the
            view, or of the window where the layer attends in windows.
        frame_score: `(G, T)` float32, what the caller gave for the frames of a video, see `vtr.apply`.
        cls_v: value vector of the CLS token of each view, `(G, V, H, d)`; a token's view is `cells[..., 0]`.
        rows: last -> `(G, N)`; text -> `(G, M, N)`; visual -> `(G, N, N)`; with heads an `H` after `G`; columns as `keys` says.
        q, k, v, next_q, next_k: tower `(G, N, H, d)`; LLM `PerToken` of `(G, N | M, H, d)`, after the rotary embedding.
        attention_io, mlp_io: pair (input, output) of that block, each as the tokens are.
        mlp_activation: what enters the MLP's last projection, as the tokens are.
        text_embedding: `TextEmbedding` of the question of the group's row, at the boundary.
        Where the model pools a tower's features to fewer tokens (videos of LLaVA-OneVision), signals of single tokens are pooled in the same way.
        Where the tower joins patches to a token (`Geometry.joins`), rows are sums over them, and q, k, v (of CLS: repeated) lie side by side in `d`.
    """

    kind: SignalKind
    layer: int | None = None
    tower: bool = False
    heads: bool = False
    softmax: bool = True
    queries: Literal["last", "text", "visual"] = "last"
    keys: Literal["visual", "text"] = "visual"
    source: str | None = None

    def __post_init__(self) -> None:
        who = named(self)
        check_types(self, who)
        kinds = list(get_args(SignalKind))
        if self.kind not in kinds:
            raise WrongValue(f"{who}: unknown kind {self.kind!r}{closest(self.kind, kinds)}; kinds: {', '.join(kinds)}")
        check_choices(self, who)

    def __str__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "kind" and getattr(self, f.name) != f.default)
        return f"Signal({', '.join([repr(self.kind), *given])})"


class PerToken(NamedTuple):
    """A per-token signal of the LLM: `visual (G, N, ...)` and `text (G, M, ...)`."""

    visual: Tensor
    text: Tensor


class TextEmbedding(NamedTuple):
    """The question in the joint space of a CLIP checkpoint.

    `text (G, M, C)` float32, one row per segment of the question, `real (G, M)` bool; `joint` takes features of the vision tower
    `(..., D)` to that space `(..., C)` float32.
    """

    text: Tensor
    real: Tensor
    joint: Callable[[Tensor], Tensor]


LAST: Literal["last"] = "last"
TEXT: Literal["text"] = "text"
VISUAL: Literal["visual"] = "visual"


def attention(
    layer: int | None = None,
    queries: Literal["last", "text", "visual"] = LAST,
    keys: Literal["visual", "text"] = VISUAL,
    *,
    heads: bool = False,
    softmax: bool = True,
) -> Signal:
    """Asks for attention rows of an LLM layer: what some tokens of a prompt pay to others.

    Args:
        layer: LLM layer; None = the layer before the step's.
        queries: the prompt's last token, its text tokens or the visual tokens of the group.
        keys: tokens whose columns are returned; the softmax runs over every key that a query may see.
        heads: keep the head dimension instead of the mean over heads.
        softmax: False gives scaled logits.

    Returns:
        A signal of `(G, N)` for the last token, `(G, M, N)` for text, `(G, N, N)` for visual tokens; an `H` after `G` with heads.
    """
    return Signal("rows", layer=layer, heads=heads, softmax=softmax, queries=queries, keys=keys)


def cls_row(layer: int | None = None, *, heads: bool = False, softmax: bool = True) -> Signal:
    """Asks for the attention that the CLS token of a tower layer pays to the patches: `(G, N)`, or `(G, H, N)` with heads."""
    return Signal("cls_row", layer=layer, tower=True, heads=heads, softmax=softmax)


def cls_values(layer: int | None = None) -> Signal:
    """Asks for the value vector of the CLS token of each view in a tower layer: `(G, V, H, d)`."""
    return Signal("cls_v", layer=layer, tower=True)


def pooled_row(layer: int | None = None, *, heads: bool = False, softmax: bool = True) -> Signal:
    """Asks for the attention that the mean query of a tower layer pays to the patches: `(G, N)`, or `(G, H, N)` with heads."""
    return Signal("pooled_row", layer=layer, tower=True, heads=heads, softmax=softmax)


def received(layer: int | None = None, *, heads: bool = False) -> Signal:
    """Asks for the attention that each patch of a tower layer gets from all tokens of its view, mean over these: `(G, N)`."""
    return Signal("received", layer=layer, tower=True, heads=heads)


def queries(layer: int | None = None, *, tower: bool = False) -> Signal:
    """Asks for the queries of a layer: `(G, N, H, d)` in the tower, `PerToken` of that in the LLM."""
    return Signal("q", layer=layer, tower=tower)


def keys(layer: int | None = None, *, tower: bool = False) -> Signal:
    """Asks for the keys of a layer: `(G, N, H, d)` in the tower, `PerToken` of that in the LLM."""
    return Signal("k", layer=layer, tower=tower)


def values(layer: int | None = None, *, tower: bool = False) -> Signal:
    """Asks for the values of a layer: `(G, N, H, d)` in the tower, `PerToken` of that in the LLM."""
    return Signal("v", layer=layer, tower=tower)


def next_queries() -> Signal:
    """Asks for the queries that the step's own LLM layer will compute: `PerToken` of `(G, N, H, d)`."""
    return Signal("next_q")


def next_keys() -> Signal:
    """Asks for the keys that the step's own LLM layer will compute: `PerToken` of `(G, N, H, d)`."""
    return Signal("next_k")


def attention_io(layer: int | None = None, *, tower: bool = False) -> Signal:
    """Asks for the input and the output of a layer's attention, without the residual: a pair."""
    return Signal("attention_io", layer=layer, tower=tower)


def mlp_io(layer: int | None = None, *, tower: bool = False) -> Signal:
    """Asks for the input and the output of a layer's MLP, without the residual: a pair."""
    return Signal("mlp_io", layer=layer, tower=tower)


def mlp_activation(layer: int | None = None) -> Signal:
    """Asks for what enters the last projection of an LLM layer's MLP: `PerToken`."""
    return Signal("mlp_activation", layer=layer)


def text_embedding(source: str) -> Signal:
    """Asks for the question in the joint space of the CLIP checkpoint `source`, a hub id or folder: `TextEmbedding`, at the boundary."""
    return Signal("text_embedding", source=source)


def frame_score() -> Signal:
    """Asks for the relevance of every frame that the caller gave: `(G, T)`, at the boundary."""
    return Signal("frame_score")
