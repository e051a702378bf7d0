import torch

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
