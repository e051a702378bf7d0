import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import vtr.ops.redundancy as module
from vtr.ops.redundancy import graph_redundancy


@pytest.mark.parametrize("chunk", [1024, 3])
def test_scores_are_those_of_the_definition(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    tokens = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[True] * 8, [False, True, True, False, True, True, True, True]])
    score, degree = graph_redundancy(tokens, real, 0.3, 3, 1.5)
    for g in range(2):
        own = real[g].nonzero()[:, 0].tolist()
        cosine = {(i, j): F.cosine_similarity(tokens[g, i].double(), tokens[g, j].double(), dim=0).item() for i in own for j in own}
        for i in own:
            near = [cosine[i, j] for j in own if cosine[i, j] >= 0.3]
            dense = len(near) * math.exp(1.5 * (sum(near) / len(near) - 0.3))
            overall = sum(cosine[i, j] for j in own) / len(own)
            assert int(degree[g, i]) == len(near)
            assert float(score[g, i]) == pytest.approx(dense if len(near) >= 3 else (dense + overall) / 2, abs=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5))
def test_redundancy_moves_with_its_token_and_does_not_see_length_or_padding(seed, n, least):
    random = torch.Generator().manual_seed(seed)
    tokens, real = torch.randn(1, n, 3, generator=random).double(), torch.ones(1, n, dtype=torch.bool)
    score, degree = graph_redundancy(tokens, real, 0.2, least)
    assert int(degree.min()) >= 1 and int(degree.max()) <= n, "a token is its own neighbour"
    order = torch.randperm(n, generator=random)
    moved, moved_degree = graph_redundancy(tokens[:, order] * 2.0 ** torch.arange(n)[:, None], real, 0.2, least)
    assert torch.equal(moved_degree, degree[:, order])
    torch.testing.assert_close(moved, score[:, order])
    padded, _ = graph_redundancy(torch.cat([tokens, tokens[:, :1]], 1), torch.arange(n + 1)[None] < n, 0.2, least)
    torch.testing.assert_close(padded[:, :n], score)
