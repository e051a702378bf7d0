"""Bipartite matching and merging against plain Python."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from vtr.ops.bipartite import alternate_destinations, bipartite_match, dense_rank, merge_tokens, size_bias, unmerge_tokens

seeds = st.integers(0, 10**6)


@given(seeds, st.integers(2, 8), st.booleans())
def test_the_most_similar_sources_go_to_their_nearest_destination(seed: int, n: int, few_values: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(1, n, 4, generator=generator)
    metric = metric.sign() if few_values else metric  # of length 2: cosines without rounding, many ties
    source = torch.rand(1, n, generator=generator) < 0.5
    destination = ~source & (torch.rand(1, n, generator=generator) < 0.8)
    if not destination.any():
        destination[0, 0], source[0, 0] = True, False
    remove = int(torch.randint(int(source.sum()) + 1, (1,), generator=generator))
    match = bipartite_match(metric, source, destination, torch.tensor([remove]))

    unit = F.normalize(metric[0], dim=-1)
    cosine = (unit @ unit.T).tolist()
    sources, targets = source[0].nonzero()[:, 0].tolist(), destination[0].nonzero()[:, 0].tolist()
    nearest = {s: max(targets, key=lambda t: (cosine[s][t], -t)) for s in sources}
    gone = sorted(sources, key=lambda s: (-cosine[s][nearest[s]], s))[:remove]
    assert match.keep[0].tolist() == [i not in gone for i in range(n)]
    assert match.assign[0].tolist() == [nearest[i] if i in gone else i for i in range(n)]


@given(seeds, st.integers(1, 8))
def test_merging_is_the_weighted_mean_and_keeps_the_total_size(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, size = torch.randn(1, n, 3, generator=generator), torch.randint(1, 5, (1, n), generator=generator).float()
    keep = torch.rand(n, generator=generator) < 0.5
    keep[0] = True
    pivots = keep.nonzero()[:, 0]
    assign = torch.where(keep, torch.arange(n), pivots[torch.randint(len(pivots), (n,), generator=generator)])[None]
    merged, merged_size = merge_tokens(tokens, size, assign)
    for pivot in pivots.tolist():
        members = (assign[0] == pivot).nonzero()[:, 0]
        if len(members) == 1:
            assert torch.equal(merged[0, pivot], tokens[0, pivot]), "nothing merged: not touched, bit for bit"
        weight = size[0, members, None]
        torch.testing.assert_close(merged[0, pivot], (tokens[0, members] * weight).sum(0) / weight.sum())
        assert merged_size[0, pivot] == weight.sum()
    assert merged_size[0, pivots].sum() == size.sum()
    assert torch.equal(unmerge_tokens(merged, assign), merged[:, assign[0]])


def test_pruned_entries_count_nowhere() -> None:
    tokens, size = torch.tensor([[[1.0], [3.0], [100.0]]]), torch.ones(1, 3)
    merged, sizes = merge_tokens(tokens, size, torch.tensor([[0, 0, -1]]))
    assert merged[0, 0] == 2 and sizes[0, 0] == 2
    assert unmerge_tokens(merged, torch.tensor([[0, 0, -1]]))[0, :, 0].tolist() == [2, 2, 100]


def test_merging_keeps_the_dtype_and_adds_in_more() -> None:
    tokens = torch.full((1, 300, 1), 1.001, dtype=torch.bfloat16)
    merged, size = merge_tokens(tokens, torch.ones(1, 300), torch.zeros(1, 300, dtype=torch.int64))
    assert merged.dtype == torch.bfloat16 and merged[0, 0] == tokens[0, 0] and size[0, 0] == 300


def test_without_a_destination_sources_are_pruned() -> None:
    match = bipartite_match(torch.randn(1, 3, 2), torch.ones(1, 3).bool(), torch.zeros(1, 3).bool(), torch.tensor([3]))
    assert not match.keep.any() and match.assign.tolist() == [[-1, -1, -1]]


@given(seeds, st.integers(1, 8), st.integers(0, 2))
def test_destinations_alternate_or_are_spread(seed: int, n: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(1, n, generator=generator) < 0.8
    real[0, 0] = True
    count = int(real.sum())
    rank = dense_rank(torch.randperm(n, generator=generator)[None], real)
    assert sorted(rank[real].tolist()) == list(range(count))
    for keep in range(count + 1):
        destination = alternate_destinations(rank, real, torch.tensor([keep]), shift)
        assert not (destination & ~real).any()
        odd = [r for r in range(count) if (r + shift) % 2]
        if keep >= len(odd):
            assert sorted(rank[destination].tolist()) == odd
        else:
            assert destination.sum() == keep


def test_zero_vectors_and_a_single_token_are_harmless() -> None:
    match = bipartite_match(
        torch.zeros(1, 4, 2), torch.tensor([[1, 0, 1, 0]]).bool(), torch.tensor([[0, 1, 0, 1]]).bool(), torch.tensor([1])
    )
    assert match.assign.tolist() == [[1, 1, 2, 3]]
    one = torch.zeros(1, 1).bool()
    assert bipartite_match(torch.randn(1, 1, 2), ~one, one, torch.tensor([0])).keep.all()


def test_size_bias_is_an_additive_key_bias() -> None:
    assert size_bias(torch.tensor([[1.0, 4.0]])).shape == (1, 1, 1, 2)
    logits = torch.randn(1, 1, 3, 2)
    weights = (logits + size_bias(torch.tensor([[1.0, 2.0]]))).softmax(-1)
    repeated = torch.cat([logits, logits[..., 1:]], -1).softmax(-1)  # a token of size 2 counts like two tokens
    torch.testing.assert_close(weights[..., 0], repeated[..., 0])
