"""Tokens that join the most similar pivot, against a loop in float64."""

import pytest
import torch
import torch.nn.functional as F

from vtr.ops.joining import join_nearest, put

pytestmark = pytest.mark.usefixtures("both_ways")


def slow(tokens, metric, pivots, sources, merge):
    """Values of the pivots, and the pivot of each source, one row."""
    unit = F.normalize(metric.double(), dim=-1)
    into = {s: max(pivots, key=lambda p: (unit[s] @ unit[p]).item()) for s in sources}
    values = []
    for p in pivots:
        joined = [tokens[s].double() for s in sources if into[s] == p]
        if merge == "mean":
            values.append(torch.stack([tokens[p].double(), *joined]).mean(0))
        else:
            values.append(tokens[p].double() + (torch.stack(joined).mean(0) if joined else 0))
    return torch.stack(values), into


@pytest.mark.parametrize("merge", ["add", "mean"])
@pytest.mark.parametrize("own_metric", [True, False])
def test_rows_of_a_ragged_batch_are_the_definition(merge, own_metric):
    dice = torch.Generator().manual_seed(3)
    tokens = torch.randn(3, 9, 4, generator=dice)
    metric = torch.randn(3, 9, 6, generator=dice) if own_metric else None
    kept = torch.rand(3, 9, generator=dice) < 0.5
    pivot = kept & (torch.rand(3, 9, generator=dice) < 0.7)
    real = kept | (torch.rand(3, 9, generator=dice) < 0.8)
    pivot[2] = False
    tokens[~real] = torch.nan
    index, values, assign = join_nearest(tokens, metric, pivot, real & ~kept, kept, 9, merge)
    for g in range(3):
        pivots, sources = pivot[g].nonzero()[:, 0].tolist(), (real & ~kept)[g].nonzero()[:, 0].tolist()
        assert index[g, : len(pivots)].tolist() == pivots
        where = {n: n for n in kept[g].nonzero()[:, 0].tolist()}
        if pivots:
            expected, into = slow(tokens[g], (tokens if metric is None else metric)[g], pivots, sources, merge)
            torch.testing.assert_close(values[g, : len(pivots)], expected.float())
            where |= into
        assert assign[g].tolist() == [where.get(n, -1) for n in range(9)]


def test_ties_go_to_the_first_pivot_and_whole_rows_need_no_mask():
    tokens = torch.ones(1, 6, 4)
    kept = torch.tensor([[False, True, False, True, False, False]])
    masked, whole = (join_nearest(tokens, None, kept, ~kept, kept, 2, full=full) for full in (False, True))
    assert masked.assign[0].tolist() == [1, 1, 1, 3, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(masked, whole, strict=True))


def test_new_values_stand_at_their_places():
    tokens = torch.zeros(2, 3, 1)
    got = put(tokens, torch.tensor([[2], [0]]), torch.tensor([[[5.0]], [[7.0]]]))
    assert got[..., 0].tolist() == [[0, 0, 5], [7, 0, 0]] and got is tokens
