"""Steps, signals, views and selections. Letters in shapes: `B` prompt rows, `G` image groups
(one image of one prompt row, all its views), `N` visual tokens of a group, `M` text tokens of its row, `K` kept, `D` width, `H` heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from vtr.types.naming import closest
from vtr.types.settings import check_choices, check_types

Stage = Literal["input", "tower", "boundary", "prefill", "decode"]
Action = Literal["remove", "merge", "restore", "freeze", "observe", "input"]
PositionOption = Literal["keep", "renumber"]
NewlineOption = Literal["rows", "all", "none"]

STAGES: tuple[Stage, ...] = ("input", "tower", "boundary", "prefill")  # `decode` is a word without an engine yet
ACTIONS: tuple[Action, ...] = ("remove", "merge", "restore", "freeze", "observe", "input")


class VtrError(RuntimeError):
    """A host, backend or checkpoint cannot do what was asked; the message says what can be done instead."""


@dataclass(frozen=True)
class Geometry:
    """What is fixed about a model when a method is applied to it.

    Args:
        host: name of the host, e.g. `llava`.
        tower_layers: number of layers of the vision tower.
        feature_layer: 0-based index of the tower layer whose output is the visual features; without an LLM the last block.
        prefix_tokens: CLS and registers in front of the patches inside the tower.
        has_cls: whether the first of them is a CLS token.
        patch_grid: `(rows, cols)` of patches of one view.
        llm_layers: number of LLM layers, 0 without an LLM.
        most_tokens: the most visual tokens (newlines excluded) that one image can have; without an LLM those of `patch_grid`.
        text_config: shape facts of the LLM (`hidden_size`, `num_attention_heads`, ...), for methods with published per-model lists.
        first_layer: first tower layer whose input may be merged.
        fixed_grid: every input has `patch_grid`; False: it is that of the model's own size, and others are possible.
        patch_norm: gives the Euclidean norm of the patch embedding's weights, which tells encoders of one shape apart; None = unknown.
    """

    host: str
    tower_layers: int
    feature_layer: int
    prefix_tokens: int
    has_cls: bool
    patch_grid: tuple[int, int]
    llm_layers: int
    most_tokens: int
    text_config: Mapping[str, Any] = field(default_factory=dict)
    fixed_grid: bool = True
    first_layer: int = 0
    patch_norm: Callable[[], float | None] | None = field(default=None, compare=False)


SignalKind = Literal[
    "cls_row",
    "cls_v",
    "pooled_row",
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
        cls_v: value vector of the CLS token of each view, `(G, V, H, d)`; a token's view is `cells[..., 0]`.
        rows: last -> `(G, N)`; text -> `(G, M, N)`; visual -> `(G, N, N)`; with heads an `H` after `G`; columns as `keys` says.
        q, k, v, next_q, next_k: tower `(G, N, H, d)`; LLM `PerToken` of `(G, N | M, H, d)`, after the rotary embedding.
        attention_io, mlp_io: pair (input, output) of that block, each as the tokens are.
        mlp_activation: what enters the MLP's last projection, as the tokens are.
        text_embedding: `TextEmbedding` of the question of the group's row, at the boundary.
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
        check_types(self, "Signal")
        kinds = list(get_args(SignalKind))
        if self.kind not in kinds:
            raise ValueError(f"Signal: unknown kind {self.kind!r}{closest(self.kind, kinds)}; kinds: {', '.join(kinds)}")
        check_choices(self, "Signal")


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


class Text(NamedTuple):
    """Text tokens of each group's prompt row at this point.

    `tokens (G, M, D)`, `real (G, M)` bool, `instruction (G, M)` bool (real text after the first visual token of this call; if there
    is none, all real text of this call); the rest is system text. Never another image's tokens.
    """

    tokens: Tensor
    real: Tensor
    instruction: Tensor


@dataclass
class View:
    """What a step sees: one row per image group (or per view, with `Step.per == "view"`). No batch rows, padding or newlines.

    Args:
        tokens: visual tokens `(G, N, D)` in position order (view, then raster; at the boundary thumbnail, then canvas raster).
        real: `(G, N)` bool, True where a row has a token that may be chosen.
        keep: `(G,)` int64, tokens this step is to leave (already limited to what the group has).
        counts, keeps: `real.sum(1)` and `keep` as Python ints, so that nothing has to wait for the device.
        most: the largest of `keeps`.
        row: `(G,)` int64, prompt row of the group.
        cells: `(G, N, 3)` int64: view (0 = thumbnail or the only view), row, column inside the view's patch grid.
        patch: `(G, N)` int64, original patch id `(view * rows + row) * cols + column`.
        patch_grid: `(rows, cols)` of one view.
        crop_grids: per group `(rows, cols)` of crops, `(0, 0)` without AnyRes.
        image_sizes: per group `(height, width)` in pixels of the original image, `(0, 0)` where the host does not know.
        sizes: `(G, N)` float32, how many original tokens a token stands for.
        checksum: `(G,)` int64 of the image's pixel values; the only seed a random choice may use besides its own.
        layer: layer the step is at.
        text: text of the row; None in the tower.
        signals: what `Step.needs` asked for.
        scaling: for signals `q`, `k`, `v`, `next_q` and `next_k`: the factor that the attention they belong to has on its logits, usually
            `d ** -0.5`; `view.scaling.get(signal)` is None where it is not known.
        memory: per-call notes from earlier steps of the same method; `memory.per_token` style entries live in `per_token`.
        per_token: name -> `(G, N, ...)` tensors that the host gathers at every later removal.
        final_norm: the LLM's final norm as a function of tokens; None in the tower.
    """

    tokens: Tensor
    real: Tensor
    keep: Tensor
    counts: list[int]
    keeps: list[int]
    most: int
    row: Tensor
    cells: Tensor
    patch: Tensor
    patch_grid: tuple[int, int]
    crop_grids: list[tuple[int, int]]
    image_sizes: list[tuple[int, int]]
    sizes: Tensor
    checksum: Tensor
    layer: int = 0
    text: Text | None = None
    signals: Mapping[Signal, Any] = field(default_factory=dict)
    scaling: Mapping[Signal, float] = field(default_factory=dict)
    memory: MutableMapping[str, Any] = field(default_factory=dict)
    per_token: MutableMapping[str, Tensor] = field(default_factory=dict)
    final_norm: Callable[[Tensor], Tensor] | None = None


@dataclass
class Selection:
    """What a step answers: which visual tokens stay, and optionally what they become.

    Args:
        keep: `(G, N)` bool; True stays. Exactly `view.keep` per row for a step with a budget.
        index: instead of `keep`: `(G, K)` int64 into N, distinct among the real ones.
        real: `(G, K)` bool for `index` rows that keep fewer than K; default all.
        tokens: new values: `(G, N, D)` beside `keep` (only kept rows are read), `(G, K, D)` beside `index`.
        assign: `(G, N)` int64 into N: the pivot a token was merged into (a kept token names itself), -1 pruned without trace
            (a ViT without an LLM has to give it back by a restoring step with a `select`).
        order: "position" (default) or "given": the order of `index` in the LLM, or in the later blocks of a ViT without one.
        grid: `(rows, cols)` where the K tokens of `index` form a smaller grid in raster order; needed by rotary and windowed ViTs.
    """

    keep: Tensor | None = None
    index: Tensor | None = None
    real: Tensor | None = None
    tokens: Tensor | None = None
    assign: Tensor | None = None
    order: Literal["position", "given"] = "position"
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.index is None):
            raise ValueError("Selection: give keep or index, exactly one of them")
        if self.order not in ("position", "given"):
            raise ValueError(f"Selection: order must be 'position' or 'given', got {self.order!r}")


@dataclass(frozen=True)
class Step:
    """One thing a method does at one place of the model.

    Args:
        stage: where; `input` is the pixel values in front of the tower.
        layer: 0-based; at layer k = gone from the input of layer k on. Ignored at the boundary.
        action: what `select` answers: `remove` and `merge` a Selection, `observe` None, `freeze` needs no `select`, `input` the new patch
            grid of a view as `(rows, cols)`, `restore` the values `(G, n, D)` of all tokens that the method's merge found (tower only; from
            the input of `layer` on, and for every output read before that; without a `select` each token gets its pivot's value).
        needs: signals read.
        select: `View -> Selection | None`.
        share: what an earlier removal of a schedule leaves, as the share of the way from keep (0) to N (1).
        counted: False = `view.keep` is not meant for this step: it decides how much stays.
        at: `layer` = at the input of the layer; `mlp` = between its attention and its MLP (tower merging).
        per: rows of the View are images (all their views) or single views with their quota.
        proportional: after this merge, keys weigh `log(size)` in the tower's attention.
        grid: `(rows, cols)` of tokens -> the smaller grid that this merge leaves of it; what windowed ViTs have to know before they run.
        side: boundary only: after the projector (LLM tokens) or before it (tower features); final_norm: `select` calls `view.final_norm`.
    """

    stage: Stage
    layer: int = 0
    action: Action = "remove"
    needs: tuple[Signal, ...] = ()
    select: Callable[[View], Any] | None = None
    share: float = 0.0
    counted: bool = True
    at: Literal["layer", "mlp"] = "layer"
    per: Literal["image", "view"] = "image"
    proportional: bool = True
    grid: Callable[[tuple[int, int]], tuple[int, int]] | None = None
    side: Literal["after_projector", "before_projector"] = "after_projector"
    final_norm: bool = False

    def __post_init__(self) -> None:
        if self.stage not in get_args(Stage):
            raise ValueError(f"Step: stage must be one of {', '.join(STAGES)}, got {self.stage!r}")
        if self.action not in ACTIONS:
            raise ValueError(f"Step: action must be one of {', '.join(ACTIONS)}, got {self.action!r}")
        if self.select is None and self.action not in ("freeze", "restore"):
            raise ValueError(f"Step: action {self.action!r} needs a select function, got None")
        check_types(self, "Step")
        check_choices(self, "Step")
