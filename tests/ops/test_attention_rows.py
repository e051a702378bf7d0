"""A few rows of attention are rows of the whole softmax map, whatever is hidden and however heads are grouped."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.attention_rows import attention_rows

seeds = st.integers(0, 10**6)


@given(seeds, st.integers(1, 5), st.integers(1, 6), st.sampled_from([(4, 4), (4, 2), (4, 1), (1, 1)]), st.booleans(), st.booleans())
def test_rows_are_softmax_over_what_is_visible(seed: int, rows: int, keys: int, heads: tuple[int, int], masked: bool, causal: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads[0], rows, 3, generator=random, dtype=torch.float64)
    key = torch.randn(2, heads[1], keys, 3, generator=random, dtype=torch.float64)
    bias = torch.randn(2, keys, generator=random, dtype=torch.float64)
    there = torch.rand(2, keys, generator=random) < 0.7 if masked else torch.ones(2, keys, dtype=torch.bool)
    positions = torch.randint(0, keys, (2, rows), generator=random)
    got = attention_rows(query, key, 0.5, keys=there if masked else None, positions=positions if causal else None, bias=bias)
    for b in range(2):
        for h in range(heads[0]):
            for r in range(rows):
                seen = [k for k in range(keys) if there[b, k] and not (causal and k > positions[b, r])]
                logit = {k: float(query[b, h, r] @ key[b, h * heads[1] // heads[0], k]) * 0.5 + float(bias[b, k]) for k in seen}
                total = sum(math.exp(v) for v in logit.values())
                expected = [math.exp(logit[k]) / total if k in logit else 0.0 for k in range(keys)]
                torch.testing.assert_close(got[b, h, r], torch.tensor(expected, dtype=torch.float64))


@given(seeds)
def test_logits_and_weights_tell_the_same(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 2, 4, 5, 3, generator=random).unbind(0)
    there = torch.rand(2, 5, generator=random) < 0.6
    there[:, 0] = True
    logits = attention_rows(query, key, 0.6, keys=there, softmax=False)
    assert torch.equal(logits.isinf(), ~there[:, None, None].expand_as(logits))
    torch.testing.assert_close(logits.softmax(-1), attention_rows(query, key, 0.6, keys=there))
