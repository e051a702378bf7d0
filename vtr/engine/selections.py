"""Checks what a method answers, and counts what it keeps; the same for towers, LLMs and dense ViTs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.ops.gather import index_to_mask
from vtr.types import Selection, View, VtrError
from vtr.types.errors import WrongType, WrongValue


def check_selection(name: str, selection: Selection, view: View) -> None:
    """Refuses an answer that does not fit its View; values of an index are looked at on the CPU only, where that costs no sync.

    Raises:
        TypeError: not a Selection, or a wrong dtype.
        ValueError: a wrong shape or an index out of range.
    """
    if not isinstance(selection, Selection):
        raise WrongType(
            f"{name}: select must return a vtr.Selection, got {type(selection).__name__}; wrap the keep mask in Selection(keep=...)"
        )
    groups, n = view.real.shape
    keep, index, values = selection.keep, selection.index, selection.tokens
    for part, given in (("keep", keep), ("index", index), ("tokens", values)):
        if given is not None and not isinstance(given, Tensor):
            raise WrongType(f"{name}: {part} must be a tensor, got {type(given).__name__}; see vtr.Selection")
    if values is not None and (values.ndim != 3 or len(values) != groups or values.shape[2] != view.tokens.shape[2]):
        raise WrongValue(
            f"{name}: tokens must be ({groups}, tokens, {view.tokens.shape[2]}), got {tuple(values.shape)}; return values as view.tokens has them"
        )
    if keep is not None and (keep.dtype != torch.bool or keep.shape != view.real.shape):
        kind = WrongType if keep.dtype != torch.bool else WrongValue
        raise kind(
            f"{name}: keep must be a bool mask {(groups, n)}, got {keep.dtype} {tuple(keep.shape)}; return one entry per token of the view"
        )
    if index is not None:
        if index.dtype != torch.int64 or index.ndim != 2 or len(index) != groups:
            raise WrongValue(f"{name}: index must be int64 ({groups}, K), got {index.dtype} {tuple(index.shape)}; return one row per group")
        looked = index.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < n:
            raise WrongValue(
                f"{name}: index must be 0 to {n - 1}, got {int(index.min())} to {int(index.max())}; it counts tokens of the view"
            )


def chosen_mask(selection: Selection, view: View) -> Tensor:
    """Returns the keep mask `(G, N)` bool of a Selection over the tokens of its View."""
    if selection.keep is not None:
        return selection.keep
    return index_to_mask(selection.index, selection.real, view.real.shape[1])  # type: ignore[arg-type]


def limited(chosen: Tensor, keep: Tensor, item: Any, asked: list[int], checks: list[tuple[Any, Tensor, list[int]]]) -> Tensor:
    """Returns a keep mask without what a method kept above its budget, so that nothing else has to make room for it.

    Counts are left on the device, as `(item, kept (G,), asked)` in `checks`; a report compares them and refuses, see `check_counts`.

    Args:
        chosen: `(G, N)` bool, of tokens that are real.
        keep: `(G,)` int64, tokens asked for; `asked`: the same on the host.
        item: the plan's step, for the message.
        checks: gets one entry.
    """
    rank = chosen.cumsum(1)
    checks.append((item, rank[:, -1], asked))
    return chosen & (rank <= keep[:, None])


def check_counts(checks: list[tuple[Any, Tensor, list[int]]]) -> None:
    """Compares what every step kept with what it was asked for; waits for the device.

    Raises:
        VtrError: a method kept another number.
    """
    for item, kept, asked in checks:
        got = kept.tolist()
        wrong = [(g, k) for g, k in zip(got, asked, strict=True) if g != k]
        if wrong:
            at = f"{item.step.stage} layer {item.step.layer}" if item.step.stage in ("tower", "prefill") else f"the {item.step.stage}"
            raise VtrError(
                f"{item.name}: select kept {wrong[0][0]} visual tokens of an image at {at}, keep was {wrong[0][1]}; return exactly view.keep True "
                "entries per row of the view, and nothing that was measured with this method counts"
            )
