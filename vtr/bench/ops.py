"""Time of each selection function of `vtr/ops` by itself, on random tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.bench.shapes import GIB, free_gib
from vtr.bench.stopwatch import Stopwatch
from vtr.models.devices import synchronize
from vtr.ops import (
    bipartite,
    clusters,
    density_peaks,
    distances,
    dpp,
    farthest,
    fused,
    kmedoids,
    maxsum,
    nearest_sum,
    redundancy,
    spectral,
    topk,
)

TOKENS, BATCHES, KEPT_SHARE, WIDTH = (576, 2880, 12544), (1, 16), 9, 1024
"""Token counts and batch sizes of the table; one token of nine is kept; tokens are 1024 wide."""


class Made(NamedTuple):
    """Random tokens `(B, N, D)`, all real, scores `(B, N)`, and the keep count as tensor and int."""

    tokens: Tensor
    score: Tensor
    real: Tensor
    keep: Tensor
    most: int


def _max_min(made: Made) -> Any:
    row, alone = farthest.cosine_distance_rows(made.tokens, made.real)
    return farthest.farthest_first(alone.argmax(1), row, made.real, made.most)


def _bipartite(made: Made) -> Any:
    rank = bipartite.dense_rank(torch.arange(made.real.shape[1], device=made.real.device).expand(made.real.shape), made.real)
    destination = bipartite.alternate_destinations(rank, made.real, made.keep)
    match = bipartite.bipartite_match(made.tokens, made.real & ~destination, destination, made.real.sum(1) - made.keep)
    return bipartite.merge_tokens(made.tokens, torch.ones_like(made.score), match.assign)


def _medoids(made: Made) -> Any:
    distance = distances.euclidean(made.tokens)
    return kmedoids.kmedoids(distance, made.tokens.norm(dim=-1), made.real, made.keep, made.most, iterations=10)


def _spectral(made: Made) -> Any:
    return spectral.laplacian_eigen(spectral.heat_affinity(made.tokens, made.real), made.real)


def _nearest(made: Made) -> Any:
    index = made.score.topk(made.most, dim=1).indices
    return nearest_sum.add_nearest(made.tokens, made.tokens, made.score, index, made.real, 32)


def _windowed(made: Made) -> Any:
    count = made.tokens.shape[1]
    rows = max(side for side in range(1, math.isqrt(count) + 1) if count % side == 0)
    grid = rows, count // rows
    return clusters.cluster(made.tokens, grid, (-(-grid[0] // 3), -(-grid[1] // 3)), tau=1 / WIDTH)


class Op(NamedTuple):
    """What is timed.

    Args:
        name, run: of the selection.
        pairs: `(N, N)` float32 matrices it holds at once, at most.
        growth: power of N that its work grows with.
        kernel: has one in Triton.
    """

    name: str
    run: Callable[[Made], Any]
    pairs: float
    growth: float
    kernel: bool = False


OPS = (
    Op("top-k", lambda m: topk.topk_mask(m.score, m.real, m.keep), 0, 1, True),
    Op("farthest first (max-min)", _max_min, 4, 2, True),
    Op("greedy max-sum", lambda m: maxsum.greedy_max_sum(m.tokens, m.real, m.score.argmax(1), m.most), 1, 2, True),
    Op("greedy DPP", lambda m: dpp.greedy_dpp(m.tokens, m.score + 0.1, m.real, m.most), 1.2, 3, True),
    Op("bipartite match and merge", _bipartite, 1, 2, True),
    Op("density peaks", lambda m: density_peaks.density_peaks(m.tokens, m.real, m.keep, m.most), 16, 2),
    Op("k-medoids, 10 iterations", _medoids, 8, 3, True),
    Op("spectral embedding", _spectral, 8, 3),
    Op("graph redundancy", lambda m: redundancy.graph_redundancy(m.tokens, m.real), 4, 2),
    Op("nearest neighbours summed", _nearest, 1, 2),
    Op("windowed clustering, 5 iterations", _windowed, 0, 1, True),
)


@torch.no_grad()
def time_ops(
    device: str,
    dtype: torch.dtype = torch.float32,
    repeats: int = 3,
    tokens: Iterable[int] = TOKENS,
    batches: Iterable[int] = BATCHES,
    longest_s: float = 5.0,
    kernels: bool | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """Times every op at every size, and says why a size was left out.

    Args:
        device, dtype: of the tokens.
        repeats: runs that count; one more in front warms up.
        tokens, batches: sizes.
        longest_s: a size is left out when the time of a smaller one, scaled by its work, is longer than this.
        kernels: time the Triton kernels too, after everything else; None does on a GPU.
        advance: called after each op and size.

    Returns:
        Dicts with `op`, `tokens`, `batch`, `keep` and either `ms` (one per run) or `left_out`.
    """
    found = []
    batches = tuple(batches)
    place, sizes = torch.device(device), [(count, batch) for count in tokens for batch in batches]
    paths = [(op, False) for op in OPS]
    if place.type == "cuda" if kernels is None else kernels:
        paths += [(op, True) for op in OPS if op.kernel]
    for op, fast in paths:
        name = f"{op.name}, Triton kernel" if fast else op.name
        known: tuple[int, int, float] | None = None  # a size that was timed, for the time that a larger one will take
        for count, batch in sizes:
            entry: dict[str, Any] = {"op": name, "tokens": count, "batch": batch, "keep": max(count // KEPT_SHARE, 1)}
            reason = _too_large(op, count, batch, device, known, longest_s)
            if not reason:
                try:
                    made = _make(count, batch, entry["keep"], place, dtype)
                    with fused.kernels(fast):
                        entry["ms"] = [_once(partial(op.run, made), place) for _ in range(repeats + 1)][1:]
                    known = (count, batch, statistics.median(entry["ms"]))
                except Exception as error:  # a kernel that does not run must not take the numbers of torch along
                    if not fast:
                        raise
                    said = str(error).strip().splitlines()
                    reason = f"does not run: {type(error).__name__}{': ' + said[0][:80] if said else ''}"
            found.append({**entry, "left_out": reason} if reason else entry)
            advance(name)
    return found


def _too_large(op: Op, count: int, batch: int, device: str, known: tuple[int, int, float] | None, longest_s: float) -> str:
    needed = batch * (op.pairs * count**2 + 4 * count * WIDTH) * 4 / GIB
    free = free_gib(device)
    if needed > free:
        return f"needs about {needed:.0f} GiB, {free:.0f} are free"
    if known is not None:
        seconds = known[2] / 1e3 * (count / known[0]) ** op.growth * batch / known[1]
        if seconds > longest_s:
            return f"about {seconds:.0f} s by its growth"
    return ""


def _make(count: int, batch: int, keep: int, device: torch.device, dtype: torch.dtype) -> Made:
    dice = torch.Generator().manual_seed(count + batch)
    tokens = torch.randn(batch, count, WIDTH, generator=dice).to(device, dtype)
    score = torch.rand(batch, count, generator=dice).to(device)
    return Made(tokens, score, torch.ones_like(score, dtype=torch.bool), torch.full((batch,), keep, device=device), keep)


def _once(run: Callable[[], Any], device: torch.device) -> float:
    watch = Stopwatch(device)
    synchronize(device)
    watch.mark("start")
    run()
    watch.mark("stop")
    synchronize(device)
    return watch.ms("start", "stop")
