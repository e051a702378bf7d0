import math

import pytest
import torch
import torch.nn.functional as F

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
