"""Merging by halves, one after the other in plain Python."""

import torch
from torch.nn import functional as F

from vtr.ops import halving
from vtr.ops.halving import merge_by_halves, nearest_kept


def test_it_is_one_merge_after_the_other(monkeypatch) -> None:
    monkeypatch.setattr(halving, "CHUNK", 7)
    tokens = torch.randn(3, 20, 5)
    real = torch.arange(20) >= torch.tensor([[0], [4], [17]])
    keep = real & (torch.rand(3, 20) < 0.3)
    keep[:, 19] = True
    into = nearest_kept(tokens, real, keep, int(keep.sum(1).max()))
    merged = merge_by_halves(tokens, real, keep, into)
    for g in range(3):
        wanted = tokens[g].double().clone()
        for n in (real & ~keep)[g].nonzero()[:, 0].tolist():
            pivots = keep[g].nonzero()[:, 0]
            pivot = pivots[F.cosine_similarity(tokens[g, n].double(), tokens[g][pivots].double(), dim=-1).argmax()]
            assert into[g, n] == pivot
            wanted[pivot] = (wanted[pivot] + tokens[g, n].double()) / 2
        assert torch.allclose(merged[g][keep[g]].double(), wanted[keep[g]], rtol=0, atol=1e-6)
    alone = keep & (torch.zeros(3, 21).scatter_(1, torch.where(real & ~keep, into, 20), 1.0)[:, :20] == 0)
    assert torch.equal(merged[alone], tokens[alone])


def test_thousands_of_merges_do_not_overflow() -> None:
    tokens, keep = torch.ones(1, 3000, 2), torch.zeros(1, 3000, dtype=torch.bool)
    keep[0, 5] = True
    merged = merge_by_halves(tokens, torch.ones_like(keep), keep, torch.full((1, 3000), 5))
    assert torch.allclose(merged[0, 5], torch.ones(2))
