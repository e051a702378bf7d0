import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.raters import rated, rater_score, raters


def test_scores_and_raters_are_those_of_the_definition():
    random = torch.Generator().manual_seed(0)
    visual, text = torch.randn(2, 6, 4, generator=random), torch.randn(2, 5, 4, generator=random)
    real = torch.tensor([[True] * 6, [False, True, True, True, False, False]])
    asked = torch.tensor([[False, True, True, True, True], [True, True, True, False, False]])
    score = rater_score(visual, text, real, asked)
    by = raters(score, asked)
    rows = torch.rand(2, 5, 6, generator=random)
    for g in range(2):
        expected = (visual[g, real[g]].double() @ text[g, asked[g]].double().T).softmax(-1).mean(0)
        torch.testing.assert_close(score[g, asked[g]].double(), expected, atol=1e-6, rtol=0)
        assert not score[g, ~asked[g]].any() and not by[g, ~asked[g]].any()
        assert by[g, asked[g]].tolist() == (expected > expected.mean()).tolist()
        torch.testing.assert_close(rated(rows, by)[g], rows[g, by[g]].mean(0))


def test_without_a_text_token_above_the_mean_all_rate():
    asked = torch.tensor([[True, False], [True, True], [False, False]])
    assert raters(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]), asked).tolist() == asked.tolist()
    assert rated(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0.0] * 3]


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
def test_scores_are_shares_and_somebody_always_rates(seed, n, words):
    random = torch.Generator().manual_seed(seed)
    visual, text = torch.randn(2, n, 3, generator=random), torch.randn(2, words, 3, generator=random)
    real, asked = torch.rand(2, n, generator=random) < 0.8, torch.rand(2, words, generator=random) < 0.7
    score = rater_score(visual, text, real, asked)
    torch.testing.assert_close(score.sum(1), (real.any(1) & asked.any(1)).float())
    by = raters(score, asked)
    assert not (by & ~asked).any() and torch.equal(by.any(1), asked.any(1))
    rows = torch.rand(2, words, n, generator=random)
    found = rated(rows, by)
    some = by.any(1)
    assert not found[~some].any()
    assert bool((found[some] <= rows[some].amax(1) + 1e-6).all()) and bool((found[some] >= rows[some].amin(1) - 1e-6).all())
