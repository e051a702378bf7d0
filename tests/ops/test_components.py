"""Component weights against a singular value decomposition."""

import pytest
import torch

from vtr.ops.components import LONG, component_weights, products_above


@pytest.mark.parametrize("shape", [(9, 20), (20, 9), (9, 9)])
def test_weights_are_those_of_the_singular_vectors(shape):
    rows = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = torch.linalg.svd(rows[0])[0][:, :5].abs()
    torch.testing.assert_close(component_weights(rows, torch.ones(1, shape[0], dtype=torch.bool), 5)[0], vectors)


def test_padding_weighs_nothing_and_changes_nothing():
    rows = torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(0))
    real = torch.ones(1, 8, dtype=torch.bool)
    alone = component_weights(rows, real, 4)
    padded = torch.cat([torch.full((1, 3, 6), 9.0), rows], 1)
    there = torch.cat([torch.zeros(1, 3, dtype=torch.bool), real], 1)
    both = component_weights(padded, there, 4)
    torch.testing.assert_close(both[:, 3:], alone)
    assert not both[:, :3].any()


def test_beyond_the_rank_there_is_nothing():
    rows = torch.ones(1, 5, 4)
    weights = component_weights(rows, torch.ones(1, 5, dtype=torch.bool), 7)
    assert weights.shape == (1, 5, 7) and not weights[..., 1:].any() and weights[..., 0].gt(0).all()
    assert not component_weights(torch.zeros(1, 5, 4), torch.ones(1, 5, dtype=torch.bool), 2).any()


@pytest.mark.parametrize("n", [LONG - 1, LONG, LONG + 3])
def test_products_with_itself_and_those_behind(n):
    rows = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(products_above(rows).triu(), (rows @ rows.mT).triu())
