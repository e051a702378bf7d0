import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.split import gather_parts, join_mask, split


def test_parts_hold_their_tokens_in_order_and_shares_add_up():
    random = torch.Generator().manual_seed(0)
    part, real = torch.randint(0, 3, (4, 20), generator=random), torch.rand(4, 20, generator=random) < 0.8
    part[3], real[3] = 1, True
    values, keep = torch.randn(4, 20, 2, generator=random), torch.tensor([1, 7, 12, 19])
    parts = split(part, real, keep, 3, 20)
    rows = gather_parts(values, parts).unflatten(0, (4, 3))
    for g in range(4):
        for p in range(3):
            own = real[g] & (part[g] == p)
            assert torch.equal(rows[g, p, parts.real[g, p]], values[g, own])
            assert int(parts.keep[g, p]) <= int(own.sum())
        assert int(parts.keep[g].sum()) == min(int(keep[g]), int(real[g].sum()))
    assert parts.keep[3].tolist() == [0, 19, 0]
    everything = join_mask(parts.real.flatten(0, 1), parts, 20)
    assert torch.equal(everything, real)
    first = join_mask((torch.arange(20) < 1).expand(12, -1), parts, 20)
    for g in range(4):
        expected = {int((real[g] & (part[g] == p)).nonzero()[0]) for p in range(3) if (real[g] & (part[g] == p)).any()}
        assert set(first[g].nonzero()[:, 0].tolist()) == expected


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4), st.integers(0, 12))
def test_splitting_and_joining_loses_nothing(seed, n, parts, keep):
    random = torch.Generator().manual_seed(seed)
    part, real = torch.randint(0, parts, (2, n), generator=random), torch.rand(2, n, generator=random) < 0.8
    found = split(part, real, torch.tensor([keep, keep]).minimum(real.sum(1)), parts, n)
    assert torch.equal(join_mask(found.real.flatten(0, 1), found, n), real)
    assert torch.equal(found.keep.sum(1), torch.tensor([keep, keep]).minimum(real.sum(1)))
    size = found.real.sum(2)
    assert bool((found.keep <= size).all())
    for kept, has in zip(found.keep.tolist(), size.tolist(), strict=True):
        short = [k for k, h in zip(kept, has, strict=True) if k < h]
        assert not short or max(kept) <= min(short) + 1, "equal shares, except where a part has no more"
