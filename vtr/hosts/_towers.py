"""How one stack of blocks is entered: an LLM, or a vision tower whose rows of tokens are views. Functions, no attribute names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from vtr.hosts._layout import Grid


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
    """

    module: Any
    blocks: Sequence[Any]
    attention: Callable[[Any], Any]
    mlp: Callable[[Any], Any]
    before_attention: Callable[[Any], Any]
    before_mlp: Callable[[Any], Any]
    down: Callable[[Any], Any] | None = None
    norm: Any = None

    @property
    def backend(self) -> str:
        """The attention backend in use, e.g. `sdpa`."""
        return str(getattr(self.module.config, "_attn_implementation", None) or "eager")


@dataclass(frozen=True, kw_only=True)
class RowTower(Stack):
    """A tower of a multimodal LLM whose every row is one view and whose every patch becomes one visual token (CLIP, SigLIP).

    Args:
        embeddings: the module that makes patches of pixel values, with `interpolate_pos_encoding`.
        prefix_tokens: CLS and registers in front of the patches; has_cls: the first is a CLS token.
        patch_grid: patches of one view as `(rows, cols)`; patch_size: in pixels.
        feature_layers: 0-based blocks whose outputs become features (usually one).
    """

    embeddings: Any
    prefix_tokens: int
    has_cls: bool
    patch_grid: Grid
    patch_size: int
    feature_layers: tuple[int, ...]

    @property
    def area(self) -> int:
        """Patches of one view."""
        return self.patch_grid[0] * self.patch_grid[1]

    def units(self, hidden: Tensor) -> Tensor:
        """Returns the units of hidden states `(R, prefix + S, D)`, what becomes one visual token each: the patches `(R, S, D)`."""
        return hidden[:, self.prefix_tokens :]

    def hidden(self, units: Tensor, given: Tensor) -> Tensor:
        """Returns hidden states that hold `units (R, S', D)` and the prefix tokens of `given (R, prefix + S, D)`."""
        return torch.cat([given[:, : self.prefix_tokens], units], 1)

    def arguments(self, hidden: Tensor, args: tuple, kwargs: dict, run: Any) -> tuple[tuple, dict]:
        """Returns the arguments of a block behind the hidden states, with the mask of a run whose rows differ or whose tokens have sizes.

        Args:
            hidden: what the block gets, `(R, prefix + S, D)`.
            args, kwargs: the other arguments.
            run: what is left, see `vtr.engine.shrinking.Shrinking`.
        """
        if not run.masked:
            return args, kwargs
        if self.backend.startswith("flash"):
            mask = torch.nn.functional.pad(run.tokens.valid, (self.prefix_tokens, 0), value=True)
        else:
            mask = run.bias(self.prefix_tokens, hidden.dtype)[:, None, None].expand(-1, 1, hidden.shape[1], -1)
        return ((mask, *args[1:]), kwargs) if args else (args, {**kwargs, "attention_mask": mask})

    def full(self, output: Tensor, run: Any) -> Tensor:
        """Returns features `(R, S, D)` of the units that are left as rows of the full grid `(R, area, D)`, NaN where a unit is gone."""
        full = output.new_full((len(output), self.area + 1, output.shape[-1]), float("nan"))
        spot = torch.where(run.tokens.valid, run.tokens.column, self.area)
        return full.scatter(1, spot[..., None].expand(-1, -1, output.shape[-1]), output)[:, :-1]


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
