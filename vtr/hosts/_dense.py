"""What the engine must know about a ViT without an LLM: its blocks, its token grid, and where tokens must be full length again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtr.hosts._protocol import patch_norm
from vtr.ops.rotary import cell_rotation
from vtr.types import Geometry, VtrError

Grid = tuple[int, int]
Taps = Callable[[Mapping[str, Any]], Sequence[int] | None]


def _hides_nothing(value: Any) -> bool:
    """Whether it is a bool mask without a False, which transformers makes for compiled code where it leaves the mask out otherwise."""
    return isinstance(value, Tensor) and value.dtype == torch.bool and bool(value.all())


def last_only(_arguments: Mapping[str, Any]) -> Sequence[int]:
    """Of an entry that reads the last block alone."""
    return ()


@dataclass(frozen=True)
class MergePoint:
    """Where a block lets tokens merge between its attention and its MLP.

    Args:
        keys: `block -> module` whose output is the keys, `(B, heads, S, d)` or `(B, S, heads * d)`.
        norm: `block -> module` that gets the residual stream behind the attention.
        branch: `block -> module` whose output is added to that stream, the last of the MLP's branch.
        mask: name of the block's first argument after the hidden states if that is an additive attention mask `(B, 1, 1, S)`, else None.
        heads: attention heads, where the keys come with them joined.
        project: `(block, output of keys) -> keys`, where no module gives the keys themselves.
        attention: `block -> module` that takes `mask` as a keyword `(B, S)`, where the block does not.
    """

    keys: Callable[[Any], Any]
    norm: Callable[[Any], Any]
    branch: Callable[[Any], Any]
    mask: str | None = None
    heads: int = 1
    project: Callable[[Any, Tensor], Tensor] | None = None
    attention: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class DenseHost:
    """One ViT seen through its family. About ten lines per family fill it; windowed families override the methods.

    Args:
        name: model type, or library and class.
        model: what the user calls.
        blocks: transformer blocks in order; each gets and returns hidden states, alone or as the first of a tuple.
        patches: module whose output `(B, D, rows, cols)` begins every run and shows its token grid.
        prefix_tokens: CLS and registers in front of the patches; has_cls: the first of them is a CLS token.
        patch_grid: `(rows, cols)` of an input of the model's own size.
        dynamic: other sizes of input are possible.
        entries: methods of `model` that run the blocks: name -> the blocks (0-based) whose outputs a call with these arguments reads beside
            the last; None = all. `forward` is hooked, others are wrapped on the instance. Calls that come in another way read all blocks;
            without any entry nobody can read single blocks.
        rotary: keyword of the blocks that holds the rotary table of the patches, a pair (cos, sin) `(..., rows*cols, d)` or both joined in
            the last dimension; "" for none.
        merge_point: where tokens merge inside a block, None when that is not known.
    """

    name: str
    model: Any
    blocks: Sequence[Any]
    patches: Any
    prefix_tokens: int
    has_cls: bool
    patch_grid: Grid
    dynamic: bool = False
    entries: Mapping[str, Taps] = field(default_factory=dict)
    rotary: str = ""
    merge_point: MergePoint | None = None

    llm_layers: int = 0
    renumber: bool = True
    has_video: bool = False
    default_layout: Any = None
    stages: tuple[str, ...] = ("tower",)

    @property
    def base(self) -> Any:
        """The module a reduction belongs to."""
        return self.model

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The block whose output is used."""
        return (len(self.blocks) - 1,)

    @property
    def most_tokens(self) -> int:
        """The most tokens that an image can have; nothing limits those of a dynamic model, whose images are looked at one by one."""
        return 2**31 if self.dynamic else self.patch_grid[0] * self.patch_grid[1]

    def geometry(self) -> Geometry:
        """The facts that methods may build their steps from."""
        return Geometry(
            host=self.name,
            tower_layers=len(self.blocks),
            feature_layer=len(self.blocks) - 1,
            prefix_tokens=self.prefix_tokens,
            has_cls=self.has_cls,
            patch_grid=self.patch_grid,
            llm_layers=0,
            most_tokens=self.patch_grid[0] * self.patch_grid[1],
            fixed_grid=not self.dynamic,
            patch_norm=partial(patch_norm, self.patches),
        )

    def at(self, grid: Grid) -> DenseHost:
        """The same host for inputs of this token grid."""
        return replace(self, patch_grid=grid, dynamic=False)

    def attention_name(self, tower: bool) -> str:
        """Attention backend in use, as far as transformers knows it."""
        return str(getattr(getattr(self.model, "config", None), "_attn_implementation", None) or "sdpa")

    # ---- what a windowed family overrides
    def row_grid(self, grid: Grid) -> Grid:
        """Returns the token grid of a row, which is clustered on its own, in a run of the token grid `grid`."""
        return grid

    def units(self, hidden: Tensor, run: Any) -> Tensor:
        """Returns the tokens `(R, S, D)` of what a block gets or returns, in raster order of their rows.

        Args:
            hidden: hidden states, `(B, prefix + rows*cols, D)` while they are full.
            run: with the token `grid` of the images, whether tokens are `short`, and the grid that they form then in `small`.

        Raises:
            VtrError: the input has another number of tokens than the grid.
        """
        expected = self.prefix_tokens + run.grid[0] * run.grid[1]
        if not run.short and (hidden.ndim != 3 or hidden.shape[1] != expected):
            raise VtrError(
                f"{self.name}: a block should get {expected} tokens ({self.prefix_tokens} prefix tokens and a grid of "
                f"{run.grid[0]} x {run.grid[1]}), got {tuple(hidden.shape)}; tokens were dropped or added outside the reduction, switch that off"
            )
        return hidden[:, self.prefix_tokens :]

    def hidden(self, units: Tensor, given: Tensor, run: Any, full: bool = False) -> Tensor:
        """Returns hidden states that hold `units`, the opposite of `units`.

        Args:
            units: `(R, S, D)`, short as the run is now, or all tokens of a row.
            given: hidden states whose prefix tokens pass by.
            run: as in `units`; full: `units` are all tokens.
        """
        return torch.cat([given[:, : self.prefix_tokens], units], 1)

    def swaps(self, method: str, first: int, end: int, small: Grid | None) -> Iterable[tuple[Any, str, Any]]:
        """Attributes that blocks need for fewer tokens (window size, bias tables), swapped while the reduction is installed.

        Args:
            method: name of the method that merges; first, end: its blocks, `end` exclusive.
            small: what is left of `geometry().patch_grid`, None where that is not a grid.

        Returns:
            `(owner, attribute, value)`, each computed before the first is set.
        """
        return ()

    def arguments(self, run: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The other arguments of a block while tokens are short: the rotary table of the smaller grid.

        Args:
            run: state with the full `grid`, the `small` one (None where the tokens left form none) and `notes`, a dict of this run.
            args: positional arguments after the hidden states.
            kwargs: keyword arguments.

        Raises:
            VtrError: a mask over the full grid was given, or tokens left form no grid that could have rotary positions.
        """
        args = tuple(None if _hides_nothing(value) else value for value in args)
        kwargs = {name: None if _hides_nothing(value) else value for name, value in kwargs.items()}
        masks = [name for name in ("attn_mask", "attention_mask", "head_mask") if isinstance(kwargs.get(name), Tensor)]
        if masks or any(isinstance(value, Tensor) for value in args):
            raise VtrError(
                f"{self.name}: {masks[0] if masks else 'an argument'} spans the full token grid and cannot follow it; leave it out"
            )
        if not self.rotary or kwargs.get(self.rotary) is None:
            return args, kwargs
        if run.small is None:
            raise VtrError(f"{self.name}: its rotary positions need tokens that form a grid; use 'expedit' or 'pool'")
        table = kwargs[self.rotary]
        key = ("rotary", id(table[0] if isinstance(table, tuple) else table))
        if key not in run.notes:
            cos, sin = table if isinstance(table, tuple) else table.chunk(2, -1)  # cell_rotation treats both alike, in any order
            short = cell_rotation(cos, sin, run.grid, run.small)
            run.notes[key] = (table, short if isinstance(table, tuple) else torch.cat(short, -1))
        return args, {**kwargs, self.rotary: run.notes[key][1]}
