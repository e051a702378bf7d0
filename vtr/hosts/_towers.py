"""How one stack of blocks is entered: an LLM, or a vision tower whose patches become visual tokens. Functions, no attribute names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.hosts._layout import Grid, Kind, Layout
from vtr.ops.rotary import cell_rotation


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One stack of blocks and the parts of a block that the engine enters.

    Args:
        module: the module of the whole stack, called once per run; its `config` names the attention backend.
        blocks: its blocks in order.
        attention, mlp: `block -> module`, the two halves of a block.
        before_attention, before_mlp: `block -> module`, the norms in front of them.
        down: `block -> module`, the last projection of its MLP; None where nobody reads what enters it.
        norm: the norm behind the last block, or None.
        extra: makes what an attention must be called with beside hidden states, positions and mask.
    """

    module: Any
    blocks: Sequence[Any]
    attention: Callable[[Any], Any]
    mlp: Callable[[Any], Any]
    before_attention: Callable[[Any], Any]
    before_mlp: Callable[[Any], Any]
    down: Callable[[Any], Any] | None = None
    norm: Any = None
    extra: Callable[[], Mapping[str, Any]] = dict

    @property
    def backend(self) -> str:
        """The attention backend in use, e.g. `sdpa`."""
        return str(getattr(getattr(self.module, "config", None), "_attn_implementation", None) or "eager")


@dataclass(frozen=True, kw_only=True)
class Tower(Stack):
    """A vision tower of a multimodal LLM. What becomes one visual token is a *unit*: one patch, or several that are joined.

    A run of the tower sees its hidden states as rows of units `(R, S, joins * D)`; `RowTower`, `JoinedTower` and `PackedTower` say how.

    Args:
        feature_layers: 0-based blocks whose outputs become features (usually one).
        patch_size: in pixels.
        patch_grid: units of one view as `(rows, cols)`, None where every image has a grid of its own.
        prefix_tokens: CLS and registers in front of the patches; has_cls: the first is a CLS token.
        joins: patches of a unit.
        embeddings: the module that makes patches of pixel values, with `interpolate_pos_encoding`; None = there is none.
        restore: modules whose output must have a row for every unit again.
        added: `(block, output of its MLP) -> what the block adds to the stream`, where that is not the output itself.
    """

    feature_layers: tuple[int, ...]
    patch_size: int
    patch_grid: Grid | None = None
    prefix_tokens: int = 0
    has_cls: bool = False
    joins: int = 1
    embeddings: Any = None
    restore: tuple[Any, ...] = ()
    added: Callable[[Any, Tensor], Tensor] | None = None

    by_views: ClassVar[bool] = True
    """Whether every row is one view."""
    edge: ClassVar[bool] = False
    """Whether the features of the tower, and not the projector's, are where all units come back."""

    padded: ClassVar[bool] = False
    """Whether pixel values of an image end at its size, and what is behind is filler."""

    @property
    def area(self) -> int:
        """Units of one view."""
        assert self.patch_grid is not None
        return self.patch_grid[0] * self.patch_grid[1]

    def keys(self, i: int, patches: int) -> int:
        """Returns how many tokens a token of block `i` sees, prefix tokens included, where its view has so many patches."""
        return patches + self.prefix_tokens

    def pixel_rows(self, layout: Layout) -> int:
        """Returns the first-axis entries of the pixel values that belong to an image."""
        return layout.inputs or layout.views

    def start(self, kind: Kind, arguments: Mapping[str, Any], layouts: Sequence[Layout], slots: int) -> Tensor:
        """Returns the global id of every unit `(R, S)` int64 on the CPU, as the tower will have them.

        Args:
            kind: what is encoded.
            arguments: of the encoding, by name.
            layouts: one per image; slots: global ids that each has.
        """
        if any(layout.inputs for layout in layouts):  # nobody reads the tower then
            return torch.full((sum(map(self.pixel_rows, layouts)), self.area), -1)
        starts = torch.tensor([image * slots + offset for image, layout in enumerate(layouts) for offset in layout.offsets])
        return starts[:, None] + torch.arange(layouts[0].areas[0])

    def units(self, hidden: Tensor, run: Any) -> Tensor:
        """Returns the units `(R, S, joins * D)` of hidden states as a block gets them."""
        raise NotImplementedError

    def hidden(self, units: Tensor, given: Tensor, run: Any) -> Tensor:
        """Returns hidden states that hold `units (R, S', joins * D)` and the prefix tokens of the hidden states `given`."""
        raise NotImplementedError

    def arguments(self, i: int, hidden: Tensor, args: tuple, kwargs: dict, run: Any) -> tuple[tuple, dict]:
        """Returns the arguments of block `i` behind the hidden states, for the units that are left.

        Args:
            i: which block.
            hidden: what it gets.
            args, kwargs: the other arguments.
            run: what is left, see `vtr.engine.shrinking.Shrinking`.
        """
        return args, kwargs

    def detour(self, i: int, current: Callable[[], Any]) -> Callable[..., Any] | None:
        """Returns what runs the attention function of block `i`, where a mask can reach it in no other way; `current()` is the run."""
        return None

    def full(self, output: Tensor, run: Any) -> Tensor:
        """Returns the output of a `restore` module with all units, NaN where one is gone (see `gone`)."""
        raise NotImplementedError

    def seen(self, i: int, query: Tensor, key: Tensor, value: Tensor, run: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns q, k, v `(R, H, prefix + S * joins, d)` of block `i`, units side by side, or None until all of it was seen.

        A packed tower has a row for every segment of its attention; it says which units they are in `run.segments`.
        """
        return query, key, value

    def _mask(self, run: Any, length: int, dtype: torch.dtype) -> Tensor:
        """Returns what hides filler and weighs merged units for `length` queries: `(R, keys)` bool for FlashAttention, else additive."""
        if self.backend.startswith("flash"):
            real = run.tokens.valid.repeat_interleave(self.joins, 1)
            return torch.nn.functional.pad(real, (self.prefix_tokens, 0), value=True)
        bias = torch.nn.functional.pad(run.bias(0, dtype).repeat_interleave(self.joins, 1), (self.prefix_tokens, 0))
        return bias[:, None, None].expand(-1, 1, length, -1)


@dataclass(frozen=True, kw_only=True)
class RowTower(Tower):
    """A tower whose every row is one view and whose every patch becomes one visual token (CLIP, SigLIP)."""

    def units(self, hidden: Tensor, run: Any) -> Tensor:
        return hidden[:, self.prefix_tokens :]

    def hidden(self, units: Tensor, given: Tensor, run: Any) -> Tensor:
        return torch.cat([given[:, : self.prefix_tokens], units], 1)

    def arguments(self, i: int, hidden: Tensor, args: tuple, kwargs: dict, run: Any) -> tuple[tuple, dict]:
        if not run.masked:
            return args, kwargs
        mask = self._mask(run, hidden.shape[1], hidden.dtype)
        return ((mask, *args[1:]), kwargs) if args else (args, {**kwargs, "attention_mask": mask})

    def full(self, output: Tensor, run: Any) -> Tensor:
        return _scattered(output, run)


@dataclass(frozen=True, kw_only=True)
class JoinedTower(Tower):
    """A tower whose every row is one view, and whose features are joined to visual tokens behind its blocks (pixel shuffle, pooling).

    Its attention has no positions of its own: patches are put side by side, unit by unit, when the first unit goes.

    Args:
        members: `(S, joins)` int64, the patches of every unit.
        restore: the one module whose output are the features of the tower.
    """

    members: Tensor

    edge: ClassVar[bool] = True

    def units(self, hidden: Tensor, run: Any) -> Tensor:
        patches = hidden[:, self.prefix_tokens :]
        if not run.arranged:
            patches = patches[:, self.members.flatten().to(patches.device)]
        return patches.reshape(len(patches), -1, self.joins * patches.shape[-1])

    def hidden(self, units: Tensor, given: Tensor, run: Any) -> Tensor:
        run.arranged = True
        return torch.cat([given[:, : self.prefix_tokens], units.reshape(len(units), -1, given.shape[-1])], 1)

    def detour(self, i: int, current: Callable[[], Any]) -> Callable[..., Any]:
        def attend(function: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
            run = current()
            if run is not None and run.short:  # a mask of whole views is as long as they are, and hides nothing
                mask = self._mask(run, query.shape[2], query.dtype) if run.masked else None
            return function(module, query, key, value, mask, *args, **kwargs)

        return attend

    def full(self, output: Tensor, run: Any) -> Tensor:
        units = _scattered(self.units(output, run), run, gone())
        patches = units.reshape(len(units), -1, output.shape[-1])[:, self.members.flatten().argsort().to(output.device)]
        return torch.cat([output[:, : self.prefix_tokens], patches], 1)

    def seen(self, i: int, query: Tensor, key: Tensor, value: Tensor, run: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        if run.arranged:
            return query, key, value
        prefix = torch.arange(self.prefix_tokens)
        order = torch.cat([prefix, self.members.flatten() + self.prefix_tokens]).to(query.device)
        return query[:, :, order], key[:, :, order], value[:, :, order]


@dataclass(frozen=True, kw_only=True)
class PackedTower(Tower):
    """A tower that takes all images as one sequence `(S * joins, D)`, the patches of a unit side by side (Qwen-VL, GLM-V).

    Segments of its attention (images, frames, windows) are borders in `cu_seqlens`; patches have rotary positions. Both follow what is left.

    Args:
        order: `(kind, arguments, ids of all units (S,)) -> ids in the order of the tower`; None = the same.
        windows: patches of a window, of the blocks that attend inside windows.
    """

    order: Callable[[Kind, Mapping[str, Any], Tensor], Tensor] | None = None
    windows: Mapping[int, int] = field(default_factory=dict)

    by_views: ClassVar[bool] = False

    def keys(self, i: int, patches: int) -> int:
        return min(self.windows.get(i, patches), patches)

    def pixel_rows(self, layout: Layout) -> int:
        return layout.slots * self.joins

    def start(self, kind: Kind, arguments: Mapping[str, Any], layouts: Sequence[Layout], slots: int) -> Tensor:
        ids = torch.cat([torch.arange(layout.slots) + image * slots for image, layout in enumerate(layouts)])
        return (ids if self.order is None else self.order(kind, arguments, ids))[None]

    def units(self, hidden: Tensor, run: Any) -> Tensor:
        return hidden.reshape(1, -1, self.joins * hidden.shape[-1])

    def hidden(self, units: Tensor, given: Tensor, run: Any) -> Tensor:
        return units.reshape(-1, given.shape[-1])

    def arguments(self, i: int, hidden: Tensor, args: tuple, kwargs: dict, run: Any) -> tuple[tuple, dict]:
        borders = kwargs["cu_seqlens"]
        if run.short:
            borders = self._followed(run, borders)
            kwargs = {**kwargs, "cu_seqlens": borders, "position_embeddings": self._followed(run, kwargs["position_embeddings"])}
        run.borders[i] = borders
        return args, kwargs

    def _followed(self, run: Any, given: Any) -> Any:
        """Returns segment borders, or a rotary table, of the units that are left; made once for all blocks between two removals."""
        if id(given) not in run.followed:
            left = run.tokens.column[0]
            patches = (left[:, None] * self.joins + torch.arange(self.joins, device=left.device)).flatten()
            if isinstance(given, Tensor):
                before = torch.zeros(run.tokens.gid_of.shape[1] * self.joins + 1, dtype=torch.int64, device=left.device)
                before[patches + 1] = 1
                borders = before.cumsum(0)[given.long()].to(given.dtype)
                made: Any = borders if self.backend.startswith("flash") else borders.unique_consecutive()  # no empty segments
            else:
                made = self._rotary(run, given, torch.arange(len(given[0]), device=left.device))
            run.followed[id(given)] = given, made  # an id is that of no other object while the object lives
        return run.followed[id(given)][1]

    def _rotary(self, run: Any, tables: tuple[Tensor, ...], members: Tensor) -> tuple[Tensor, ...]:
        """Returns the rotary tables of the units that are left; clusters have the mean coordinates of their units.

        Args:
            run: what is left.
            tables: cos and sin `(S * joins, d)`.
            members: `(S * joins,)` int64, the patches unit by unit.
        """
        width, left = tables[0].shape[-1], run.tokens.column[0]
        cos, sin = (table[members].view(-1, self.joins * width) for table in tables)
        short = cos[left], sin[left]
        if run.cells is not None:
            for grid, cells, before, now in run.clusters():
                short[0][now], short[1][now] = cell_rotation(cos[before], sin[before], grid, cells)
        return tuple(table.view(-1, width) for table in short)

    def detour(self, i: int, current: Callable[[], Any]) -> Callable[..., Any] | None:
        def attend(function: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
            run = current()
            if run is not None and run.sized:  # called once per segment
                start = run.asked.get(i, 0)
                run.asked[i] = start + key.shape[2]
                mask = self._mask(run, query.shape[2], query.dtype)[..., start : run.asked[i]]
            return function(module, query, key, value, mask, *args, **kwargs)

        return attend

    def full(self, output: Tensor, run: Any) -> Tensor:
        full = output.new_full((run.tokens.gid_of.shape[1], output.shape[-1]), float("nan"))
        return full.index_copy(0, run.tokens.column[0], output)

    def seen(self, i: int, query: Tensor, key: Tensor, value: Tensor, run: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        parts = run.parts.setdefault(i, [])
        parts.append((query, key, value))
        if sum(part[0].shape[2] for part in parts) < run.tokens.column.shape[1] * self.joins:
            return None
        del run.parts[i]
        borders = run.borders.pop(i)
        lengths = [part[0].shape[2] for part in parts] if len(parts) > 1 else borders.diff().tolist()
        counts = torch.tensor(lengths)
        index, width = (counts.cumsum(0) - counts)[:, None] + torch.arange(max(lengths)), torch.arange(max(lengths))
        real = width < counts[:, None]
        index, real = torch.where(real, index, 0).to(query.device), real.to(query.device)
        run.segments[i] = index, real
        q, k, v = (torch.cat([part[n] for part in parts], 2)[0][:, index].transpose(0, 1) for n in range(3))
        return q, k, v


@dataclass(frozen=True)
class Pooling:
    """How a model makes fewer tokens of the features of every frame of a video.

    Args:
        tokens: `(V, S, C) -> (V, P, C)`, what it does to features that stand for patches.
        grid: `(rows, cols)` of tokens of a frame.
        behind_projector: it does so behind the projector, so that steps in front of that one run behind the pooling.
    """

    tokens: Callable[[Tensor], Tensor]
    grid: Grid
    behind_projector: bool


def gone() -> float:
    """What stands for a unit that is gone in front of the projector: NaN, or zero where NaN would reach the gradients of its weights."""
    return 0.0 if torch.is_grad_enabled() else float("nan")


def _scattered(units: Tensor, run: Any, blank: float = float("nan")) -> Tensor:
    """Returns the units `(R, S', D)` that are left as rows of the full grid `(R, S, D)`, `blank` where a unit is gone."""
    area = run.tokens.gid_of.shape[1]
    full = units.new_full((len(units), area + 1, units.shape[-1]), blank)
    spot = torch.where(run.tokens.valid, run.tokens.column, area)
    return full.scatter(1, spot[..., None].expand(-1, -1, units.shape[-1]), units)[:, :-1]


def transformers_blocks(module: Any, blocks: Sequence[Any], norms: tuple[str, str]) -> dict[str, Any]:
    """Returns the part of a Stack that most models of transformers share, by the names of the two norms of a block."""
    return dict(
        module=module,
        blocks=blocks,
        attention=attrgetter("self_attn"),
        mlp=attrgetter("mlp"),
        before_attention=attrgetter(norms[0]),
        before_mlp=attrgetter(norms[1]),
    )


def llm_stack(llm: Any, before_mlp: str = "post_attention_layernorm", extra: Callable[[], Mapping[str, Any]] = dict) -> Stack:
    """Returns an LLM of transformers as a stack, by the name of the norm in front of the MLP of its layers.

    Args:
        llm: with `layers`, and `norm` behind them.
        before_mlp: name of that norm.
        extra: see `Stack`.
    """
    dense = all(hasattr(getattr(layer, "mlp", None), "down_proj") for layer in llm.layers)
    return Stack(
        **transformers_blocks(llm, llm.layers, ("input_layernorm", before_mlp)),
        down=attrgetter("mlp.down_proj") if dense else None,
        norm=getattr(llm, "norm", None),
        extra=extra,
    )
