"""What steps read beside the tokens: attention rows, q, k, v, block inputs and outputs, gathered from taps for a View."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtr.engine.tokens import Places
from vtr.ops.attention_rows import attention_rows
from vtr.ops.received import attention_received
from vtr.types import PerToken, Signal


@dataclass
class Tap:
    """What was seen at one layer of one call: q, k, v `(R, H, S, d)`, block inputs and outputs, and where the tokens stood then.

    `keys (R, K)` bool says which key columns are real, or is None when all are; `bias (R, K)` is added to logits (proportional attention);
    `first` is the key column of the first token of this call (tokens of earlier turns come before). In a sliding-window layer whose window is
    shorter than the prompt, `where (R, K)` has the logical column of every key, and a query sees those less than `window` before it.
    `joins` patches of a tower stand side by side for one visual token.
    """

    places: Places
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    scaling: float = 1.0
    keys: Tensor | None = None
    where: Tensor | None = None
    window: int = 0
    bias: Tensor | None = None
    first: int = 0
    joins: int = 1
    blocks: dict[str, Any] = field(default_factory=dict)

    def by_segments(self, index: Tensor, real: Tensor, bias: Tensor | None) -> None:
        """Gives every segment of a packed row a row of its own, as q, k and v have already.

        Args:
            index, real: `(segments, L)`, patches of each segment in the packed row, and which of them are no filler.
            bias: `(S,)`, added to logits of the units of the packed row.
        """
        unit = index[:, :: self.joins] // self.joins
        gid = torch.where(real[:, :: self.joins], self.places.gid()[0][unit], -1)
        column = torch.arange(gid.shape[1], device=gid.device).expand_as(gid)
        self.places = Places(column, gid >= 0, gid)
        self.keys = real
        self.bias = None if bias is None else bias[unit].repeat_interleave(self.joins, 1)


def tower_signal(
    signal: Signal, tap: Tap, gid: Tensor, prefix: int, total: int, rows: Tensor, pool: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """A signal of the tower for the tokens `gid (G, N)`.

    Args:
        signal: what.
        tap: of its layer.
        gid: global ids, below `total`.
        prefix: prefix tokens in front of the patches.
        total: number of global ids.
        rows: `(G, V)` int64, tower row of each view of a group (of view 0 where it has fewer), for `cls_v`.
        pool: makes the tokens `(R, P, C)` of the LLM of patches `(R, S, C)`; then the ids are counted over tokens, row by row.
    """
    if signal.kind == "cls_v":
        assert tap.value is not None
        return tap.value[:, :, 0].repeat(1, 1, tap.joins)[rows]  # once for every patch of a token
    if pool is not None:
        return _pooled(_of_patches(signal, tap, torch.arange(tap.places.gid_of.numel(), device=gid.device)[None], prefix), tap, gid, pool)
    return _of_patches(signal, tap, _positions(tap.places, gid, total), prefix)


def _of_patches(signal: Signal, tap: Tap, spot: Tensor, prefix: int) -> Any:
    """A signal of the tower at flat positions `spot (G, N)`."""
    if signal.kind not in ("cls_row", "pooled_row", "received"):
        return _per_token(signal, tap, spot, prefix)
    assert tap.query is not None and tap.key is not None
    if signal.kind == "received":
        real = torch.ones_like(tap.key[:, 0, :, 0], dtype=torch.bool) if tap.keys is None else tap.keys
        query, key = tap.query.transpose(1, 2), tap.key.transpose(1, 2)
        row = attention_received(query, key, real, scaling=tap.scaling, bias=tap.bias, heads=True)[..., prefix:]
    else:
        query = tap.query[:, :, :1]
        if signal.kind == "pooled_row":
            weight = torch.ones_like(tap.query[:, :1, :, :1]) if tap.keys is None else tap.keys[:, None, :, None].to(tap.query.dtype)
            weight = torch.cat([torch.zeros_like(weight[:, :, :prefix]), weight[:, :, prefix:]], 2)
            query = (tap.query.float() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp_min(1)
        row = attention_rows(query, tap.key, tap.scaling, keys=tap.keys, bias=tap.bias, softmax=signal.softmax)[:, :, 0, prefix:]
    row = row if tap.joins == 1 else row.unflatten(-1, (-1, tap.joins)).sum(-1)  # what a visual token gets
    value = row if signal.heads else row.mean(1, keepdim=True)  # (R, H or 1, S)
    table = value.transpose(1, 2).flatten(0, 1)[spot]  # (G, N, H or 1)
    return table.transpose(1, 2) if signal.heads else table[..., 0]


def _pooled(every: Any, tap: Tap, gid: Tensor, pool: Callable[[Tensor], Tensor]) -> Any:
    """What single patches `(1, R * S, ...)` have (heads in front of them where there is a third dimension alone), for pooled tokens `gid (G, N)`."""
    if isinstance(every, tuple):
        return tuple(_pooled(part, tap, gid, pool) for part in every)
    by_heads = every.ndim == 3 and every.shape[1] != tap.places.gid_of.numel()
    values = every.transpose(1, 2) if by_heads else every
    shape = values.shape[2:]
    tokens = pool(values.reshape(*tap.places.gid_of.shape, -1)).flatten(0, 1)[gid]
    tokens = tokens.reshape(*gid.shape, *shape)
    return tokens.transpose(1, 2) if by_heads else tokens


def llm_signal(signal: Signal, tap: Tap, visual: Tensor, text: Tensor, row: Tensor, read: Tensor | None, in_turn: bool = False) -> Any:
    """A signal of the LLM.

    Args:
        signal: what.
        tap: of its layer.
        visual, text: `(G, N)` and `(G, M)` int64, original columns of the group's visual tokens and of its row's text tokens.
        row: `(G,)` prompt row of each group.
        read: `(B, q)` bool over original columns, tokens that a method may read; the last of them is the prompt's last. None = all.
        in_turn: the groups are the prompt rows, in their order, so that nothing has to be copied for them.
    """
    places, length = tap.places, tap.places.column.shape[1]
    inverse = None if places.whole else places.inverse() if in_turn else places.inverse()[row]

    def spots(columns: Tensor) -> Tensor:
        """Returns where the tokens of original columns `(G, n)` are in their rows."""
        return columns if inverse is None else inverse.gather(1, columns)

    if signal.kind != "rows":
        both = [_per_token(signal, tap, spots(columns) + row[:, None] * length, 0) for columns in (visual, text)]
        if isinstance(both[0], tuple):
            return tuple(PerToken(v, t) for v, t in zip(both[0], both[1], strict=True))
        return PerToken(both[0], both[1])
    assert tap.query is not None and tap.key is not None
    columns_of = {"visual": visual, "text": text}
    columns, last = spots(columns_of[signal.keys]), signal.queries == "last"
    columns = columns + tap.first if tap.first else columns
    key, keys = tap.key, tap.keys
    where = None if tap.where is None else tap.where.clamp_min(0).cummax(1).values
    if not last and not in_turn:
        key, keys, where = key[row], None if keys is None else keys[row], None if where is None else where[row]
    found = []
    for query, positions in _queries(tap, None if last else spots(columns_of[signal.queries]), row, read):
        since = None
        if where is not None and positions is not None:  # physical column of the first key inside the window of each query
            since = torch.searchsorted(where, where.gather(1, positions) - tap.window, right=True)
        weights = attention_rows(query, key, tap.scaling, keys=keys, positions=positions, since=since, softmax=signal.softmax)
        weights = weights[row] if last and not in_turn else weights
        weights = weights if signal.heads else weights.mean(1, keepdim=True)
        picked = weights.gather(3, columns[:, None, None, :].expand(-1, weights.shape[1], weights.shape[2], -1))
        found.append(picked if signal.heads else picked[:, 0])
    rows = found[0] if len(found) == 1 else torch.cat(found, dim=-2)
    return rows[..., 0, :] if last else rows


def _queries(tap: Tap, wanted: Tensor | None, row: Tensor, read: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields queries `(R, H, q, d)` and the key columns `(R, q)` behind which they see nothing, None where they see all.

    Args:
        tap: of the layer.
        wanted: `(G, q)` int64, where they are in the rows `row (G,)`; None = the last token of every prompt, whatever its images are.
        read: as `llm_signal` has it.
    """
    places, length = tap.places, tap.places.column.shape[1]
    assert tap.query is not None and tap.key is not None
    if wanted is None:
        if places.whole and read is None and tap.where is None and tap.key.shape[2] == tap.first + length:
            yield tap.query[:, :, -1:], None
            return
        there = places.valid if read is None else places.valid & read.gather(1, places.column)
        wanted = torch.where(there, torch.arange(length, device=row.device), -1).argmax(1)[:, None]
        row = torch.arange(len(tap.query), device=row.device)
    for chunk in wanted.split(128, dim=1):  # a chunk of rows over all keys is below one layer's activations
        yield tap.query[row[:, None], :, chunk].transpose(1, 2), chunk + tap.first


def scaling_of(signal: Signal, tap: Tap) -> dict[Signal, float]:
    """Factor on the logits of the attention that a signal of single tokens belongs to; empty for other signals."""
    return {signal: tap.scaling} if signal.kind in ("q", "k", "v", "next_q", "next_k") else {}


def _positions(places: Places, gid: Tensor, total: int) -> Tensor:
    """Flat positions `(G, N)` of global ids (below `total`) in a tower places."""
    rows, columns = places.gid_of.shape
    original = torch.zeros(total + 1, dtype=torch.int64, device=gid.device)
    own = torch.where(places.gid_of >= 0, places.gid_of, total)
    original.scatter_(0, own.flatten(), torch.arange(rows * columns, device=gid.device))
    where = original[gid]
    return where // columns * places.column.shape[1] + places.inverse().flatten()[where]


def _per_token(signal: Signal, tap: Tap, flat: Tensor, prefix: int) -> Any:
    """q, k, v `(G, N, H, d)` or block inputs and outputs `(G, N, D)` at flat positions (patches only in the tower)."""
    if signal.kind in ("q", "k", "v", "next_q", "next_k"):
        source = {"q": tap.query, "k": tap.key, "v": tap.value, "next_q": tap.query, "next_k": tap.key}[signal.kind]
        assert source is not None
        first = prefix + (tap.first if signal.kind in ("k", "v", "next_k") else 0)
        length = tap.places.column.shape[1] * tap.joins
        tokens = source[:, :, first : first + length].transpose(1, 2)  # (R, L, H, d)
        if tap.joins > 1:
            tokens = tokens.unflatten(1, (-1, tap.joins)).transpose(2, 3).flatten(3)
        return tokens.flatten(0, 1)[flat]
    stored = tap.blocks[signal.kind]
    if isinstance(stored, tuple):
        return tuple(part[:, prefix:].flatten(0, 1)[flat] for part in stored)
    return stored[:, prefix:].flatten(0, 1)[flat]


def io_recorder(kind: str, tap_of: Callable[[], Tap | None]) -> Callable[..., None]:
    """A forward hook that files (input, output) of a block under `kind` in the tap that `tap_of()` gives, if any."""

    def hook(_module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        tap = tap_of()
        if tap is not None:
            tap.blocks[kind] = (args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output)

    return hook
