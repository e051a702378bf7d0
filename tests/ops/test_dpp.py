import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.dpp import greedy_dpp, min_max
from vtr.ops.relevance import text_similarity

pytestmark = pytest.mark.usefixtures("both_ways")


def slow(tokens, quality, most):
    """The definition for one row, with determinants in float64."""
    unit = F.normalize(tokens.double(), dim=-1)
    kernel = quality.double()[:, None] * (unit @ unit.T) * quality.double()
    picked: list[int] = []
    for _ in range(most):
        gain = torch.full((len(tokens),), -torch.inf, dtype=torch.float64)
        for i in set(range(len(tokens))) - set(picked):
            gain[i] = torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]])
        picked.append(int(gain.argmax()))
    return picked


@pytest.mark.parametrize(("n", "width"), [(8, 8), (8, 20), (1, 3), (30, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_pick_grows_the_determinant_most(n, width, dtype):
    random = torch.Generator().manual_seed(n)
    tokens, quality = torch.randn(3, n, width, generator=random, dtype=dtype), torch.rand(3, n, generator=random) + 0.1
    real = torch.ones(3, n, dtype=torch.bool)
    real[1, : n // 3] = False
    most = min(n, 10)
    got = greedy_dpp(tokens, quality, real, most)
    for g in range(3):
        own = real[g].nonzero()[:, 0]
        count = min(most, len(own))
        assert own[slow(tokens[g, own], quality[g, own], count)].tolist() == got[g, :count].tolist()


def test_without_a_gram_matrix_the_picks_are_the_same():
    random = torch.Generator().manual_seed(1)
    tokens, quality = torch.randn(2, 70, 5, generator=random), torch.rand(2, 70, generator=random) + 0.1
    got = greedy_dpp(tokens, quality, torch.ones(2, 70, dtype=torch.bool), 5)  # 70 tokens of width 5 are beyond the memory rule
    assert got.tolist() == [slow(tokens[g], quality[g], 5) for g in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rank_may_run_out_without_duplicates(dtype):
    random = torch.Generator().manual_seed(2)
    tokens = torch.randn(2, 40, 4, generator=random, dtype=dtype)
    tokens[:, 20:] = tokens[:, :20] * 2
    quality = torch.rand(2, 40, generator=random) + 0.01
    order = greedy_dpp(tokens, quality, torch.ones(2, 40, dtype=torch.bool), 40)
    for g in range(2):
        assert sorted(order[g].tolist()) == list(range(40))
        assert order[g, :4].tolist() == slow(tokens[g], quality[g], 4)
        rest = quality[g, order[g, 12:]]  # up to 4 more picks may be rounding
        assert torch.equal(rest, rest.sort(descending=True).values), "beyond the rank by quality"


def test_ties_go_to_the_lowest_index_and_zero_tokens_come_last():
    tokens, quality = torch.ones(1, 5, 3), torch.ones(1, 5)
    real = torch.ones(1, 5, dtype=torch.bool)
    assert greedy_dpp(tokens, quality, real, 5).tolist() == [[0, 1, 2, 3, 4]]
    tokens = torch.eye(3)[None, [0, 0, 1, 2]].clone()
    tokens[0, 0] = 0
    assert greedy_dpp(tokens, quality[:, :4], real[:, :4], 4).tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize("width", [3, 48])
def test_a_batch_changes_nothing(width):
    random = torch.Generator().manual_seed(3)
    tokens, quality = torch.randn(5, 33, width, generator=random), torch.rand(5, 33, generator=random) + 0.1
    real = torch.rand(5, 33, generator=random) < 0.9
    together = greedy_dpp(tokens, quality, real, 3)
    for g in range(5):
        assert torch.equal(together[g : g + 1], greedy_dpp(*(t[g : g + 1] for t in (tokens, quality, real)), 3))


def test_min_max_is_by_row_and_over_real_tokens():
    values = torch.tensor([[1.0, 3.0, 2.0, 99.0], [5.0, 5.0, 5.0, 5.0]])
    real = torch.tensor([[True, True, True, False], [True, True, True, True]])
    got = min_max(values, real)
    torch.testing.assert_close(got, torch.tensor([[5e-7, 1 + 5e-7, 0.5 + 5e-7, 0], [1, 1, 1, 1]]))
    torch.testing.assert_close(min_max(values, real, 0, 1e-6)[0, :3], torch.tensor([0, 2 / (2 + 1e-6), 1 / (2 + 1e-6)]))


def test_similarity_is_the_cosine_to_the_mean_of_what_is_asked():
    random = torch.Generator().manual_seed(4)
    visual, text = torch.randn(2, 6, 4, generator=random), torch.randn(2, 3, 4, generator=random)
    asked = torch.tensor([[False, True, True], [False, False, False]])
    got = text_similarity(visual, text, asked)
    torch.testing.assert_close(got[0], F.cosine_similarity(visual[0], text[0, 1:].mean(0, keepdim=True)))
    assert not got[1].any()


def test_subsets_of_the_greedy_order_are_prefixes():
    random = torch.Generator().manual_seed(5)
    tokens, quality = torch.randn(1, 20, 30, generator=random), torch.rand(1, 20, generator=random) + 0.1
    orders = [greedy_dpp(tokens, quality, torch.ones(1, 20, dtype=torch.bool), k)[0].tolist() for k in range(1, 21)]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(orders))


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5))
def test_picks_are_distinct_start_with_the_best_and_do_not_see_length_or_padding(seed, n, width):
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, n, width, generator=random, dtype=torch.float64)
    quality = 1 + torch.randperm(n, generator=random)[None].double()
    real = torch.rand(1, n, generator=random) < 0.8
    real[0, 0] = True
    count = int(real.sum())
    order = greedy_dpp(tokens, quality, real, n)[:, :count]
    assert sorted(order[0].tolist()) == real[0].nonzero()[:, 0].tolist()
    assert int(order[0, 0]) == int(quality.masked_fill(~real, 0).argmax()), "all cosines with itself are 1"
    longer = greedy_dpp(tokens * 2.0 ** torch.arange(n)[:, None], quality, real, n)[:, :count]
    assert torch.equal(longer, order)
    wide = [torch.cat([part, part[:, :1]], 1) for part in (tokens, quality)]
    assert torch.equal(greedy_dpp(*wide, torch.cat([real, torch.zeros(1, 1, dtype=torch.bool)], 1), n)[:, :count], order)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=8))
def test_min_max_keeps_the_order_and_ends_at_zero_and_one(values):
    row = torch.tensor([values]).double()
    scaled = min_max(row, torch.ones_like(row).bool(), floor=0.0)
    assert torch.equal(scaled[0][:, None] < scaled[0], row[0][:, None] < row[0])
    assert float(scaled.max()) == 1 and float(scaled.min()) == (0 if len(set(values)) > 1 else 1)


def test_a_guess_beside_a_pick_changes_nothing(monkeypatch):
    """Beyond the cache a CPU multiplies with two tokens at a time."""
    random = torch.Generator().manual_seed(6)
    tokens, quality = torch.randn(2, 60, 50, generator=random), torch.rand(2, 60, generator=random) + 0.1
    monkeypatch.setattr("vtr.ops.unit.CACHE", 0)
    monkeypatch.setattr("vtr.ops.dpp.gram_pays", lambda *_: False)
    got = greedy_dpp(tokens, quality, torch.ones(2, 60, dtype=torch.bool), 20)
    assert got.tolist() == [slow(tokens[g], quality[g], 20) for g in range(2)]
