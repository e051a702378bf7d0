"""Every kernel against the torch path, on any device: `TRITON_INTERPRET=1 python tests/ops/kernel_checks.py` runs them on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.ops.bipartite import bipartite_match, merge_tokens
from vtr.ops.clusters import cluster
from vtr.ops.distances import euclidean
from vtr.ops.dpp import greedy_dpp
from vtr.ops.farthest import cosine_distance_rows, farthest_first
from vtr.ops.fused import kernels
from vtr.ops.kmedoids import kmedoids
from vtr.ops.maxsum import greedy_max_sum
from vtr.ops.topk import topk_mask


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What the kernels answer, and what torch answers."""
    with kernels(True):
        ours = run()
    with kernels(False):
        return ours, run()


def rows(device: str, n: int = 75, width: int = 40, groups: int = 3) -> tuple[Tensor, Tensor]:
    """Random tokens with many duplicates, and rows of different length; the last is whole."""
    dice = torch.Generator().manual_seed(n + width)
    tokens = torch.randn(groups, n, width, generator=dice)
    tokens[:, n // 2 :: 3] = tokens[:, : len(range(n // 2, n, 3))].clone()  # exact ties
    real = torch.rand(groups, n, generator=dice) < torch.tensor([[0.5], [0.8], [1.1]])
    return tokens.to(device), real.to(device)


def max_min(device: str) -> None:
    for n, most in ((75, 30), (1, 1), (64, 64), (130, 9)) if device != "cpu" else ((43, 18), (1, 1), (16, 16), (70, 9)):
        tokens, real = rows(device, n)
        real[:, 0] = True
        distances, alone = cosine_distance_rows(tokens, real)
        for repeat in (False, True):
            count = most if repeat else min(most, int(real.sum(1).min()))
            ours, torchs = both(lambda: farthest_first(alone.argmax(1), distances, real, count, repeat))  # noqa: B023
            assert torch.equal(ours, torchs), (n, repeat)
    whole, there = torch.zeros(2, 9, 4, device=device), torch.ones(2, 9, dtype=torch.bool, device=device)
    for same in (whole, whole + torch.nan):  # nothing but ties
        distances, alone = cosine_distance_rows(same, there)
        ours, torchs = both(lambda: farthest_first(alone.argmax(1), distances, there, 9))  # noqa: B023
        assert torch.equal(ours, torchs) and ours.sort(1).values.tolist() == [list(range(9))] * 2


def medoids(device: str) -> None:
    tokens, real = rows(device, 33, 6)
    real[:, :2] = True
    keep = real.sum(1) // 2
    for part in zip(*both(lambda: kmedoids(euclidean(tokens), tokens.norm(dim=-1), real, keep, int(keep.max()), 4)), strict=True):
        wanted = torch.arange(part[1].shape[1], device=device) < keep[:, None]
        assert torch.equal(part[0], part[1]) or torch.equal(part[0][wanted], part[1][wanted])


def max_sum(device: str) -> None:
    big, most_of_big = (75, 30) if device != "cpu" else (43, 10)
    for n, most, dtype in (
        (big, most_of_big, torch.float32),
        (big, most_of_big, torch.float64),
        (1, 1, torch.float32),
        (64, 20, torch.bfloat16),
    ):
        tokens, real = rows(device, n)
        real[:, 0] = True
        first = real.to(torch.uint8).argmax(1)
        count = min(most, int(real.sum(1).min()))
        ours, torchs = both(lambda: greedy_max_sum(tokens.to(dtype), real, first, count))  # noqa: B023
        assert torch.equal(ours, torchs), (n, dtype)


def determinant(device: str) -> None:
    """Among duplicates the first wins; the budget stays below the rank, beyond which rounding decides what is left of a residual."""
    dice = torch.Generator().manual_seed(0)
    sizes = ((75, 25), (1, 1), (64, 8), (90, 17)) if device != "cpu" else ((27, 11), (1, 1), (16, 8))  # interpreted, a pick takes its time
    for n, most in sizes:
        tokens, real = rows(device, n)
        real[:, 0] = True
        quality = torch.rand(3, n, generator=dice).to(device) + 0.1
        quality[:, n // 2 :: 3] = quality[:, : len(range(n // 2, n, 3))].clone()
        count = min(most, int(real.sum(1).min()))
        for jitter in (0.0, 1e-6):
            ours, torchs = both(lambda: greedy_dpp(tokens, quality, real, count, jitter))  # noqa: B023
            assert torch.equal(ours, torchs), (n, jitter)
    tokens, quality = F.one_hot(torch.arange(12) % 5).float()[None].to(device), torch.arange(12.0, 0, -1, device=device)[None] // 3 + 1
    ours, torchs = both(lambda: greedy_dpp(tokens.repeat(1, 1, 8), quality, torch.ones_like(quality, dtype=torch.bool), 12))
    assert torch.equal(ours, torchs), "five directions, then by quality"
    assert sorted(ours[0].tolist()) == list(range(12))


def best(device: str) -> None:
    dice = torch.Generator().manual_seed(1)
    for n in (1, 64, 75, 200) if device != "cpu" else (1, 64, 140):
        score = torch.randint(-3, 4, (4, n), generator=dice).float()  # ties everywhere
        score[0, ::5], score[1, ::7], score[2, ::3] = torch.nan, torch.inf, -torch.inf
        real = torch.rand(4, n, generator=dice) < 0.7
        keep = torch.tensor([0, 1, n // 2, n])
        for dtype in (torch.float32, torch.float64, torch.float16):
            ours, torchs = both(lambda: topk_mask(score.to(device, dtype), real.to(device), keep.to(device)))  # noqa: B023
            assert torch.equal(ours, torchs), (n, dtype)


def merge(device: str) -> None:
    brain = torch.bfloat16 if device != "cpu" else torch.float16  # the interpreter cuts bfloat16 off, a GPU rounds
    many = 75 if device != "cpu" else 19
    for n, dtype in ((many, torch.float32), (33 if device != "cpu" else 17, brain), (2, torch.float64), (many, torch.float16)):
        tokens, real = rows(device, n)
        real[:, :2] = True
        odd = (torch.arange(n, device=device) % 2).bool()
        remove = (real & ~odd).sum(1) * torch.tensor([0, 1, 2], device=device) // 2
        ours, torchs = both(lambda: bipartite_match(tokens[..., :8], real & ~odd, real & odd, remove))  # noqa: B023
        assert torch.equal(ours.keep, torchs.keep) and torch.equal(ours.assign, torchs.assign), n
        size = torch.randint(1, 9, (3, n), generator=torch.Generator().manual_seed(n)).float().to(device)
        assign = torch.where(real, ours.assign, -1)
        ours, torchs = both(lambda: merge_tokens(tokens.to(dtype), size, assign))  # noqa: B023
        assert torch.equal(ours[1], torchs[1]), n
        for mine, theirs in zip(ours, torchs, strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=1e-7 if device == "cpu" else 1e-6, atol=0)


def windows(device: str) -> None:
    for grid, clusters, window, width, dtype in (
        ((6, 6), (4, 4), 3, 40, torch.float32),
        ((7, 5), (2, 3), 5, 8, torch.float16),
        ((3, 3), (3, 3), 3, 8, torch.float32),
    ):
        tokens = torch.randn(2, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(width)).to(device, dtype)
        tau = torch.tensor([0.05, 3.0], device=device)
        ours, torchs = both(lambda: cluster(tokens, grid, clusters, tau=tau, iterations=3, window=window))  # noqa: B023
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


CHECKS = (max_min, medoids, max_sum, determinant, best, merge, windows)

if __name__ == "__main__":
    for check in CHECKS:
        check("cpu")
        sys.stdout.write(f"{check.__name__}\n")
