"""Unit vectors, and products of one token per row with all."""

import pytest
import torch
import torch.nn.functional as F

from vtr.ops.unit import LARGE, gram_pays, row_products, unit_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_have_length_1_and_broken_ones_are_zero(dtype):
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens[0, 1], tokens[0, 2, 3], tokens[1, 0, 0] = 0, torch.nan, torch.inf
    before = tokens.clone()
    unit = unit_rows(tokens)
    whole = torch.ones(2, 5, dtype=torch.bool)
    whole[0, 1:3] = whole[1, 0] = False
    assert unit.dtype == torch.promote_types(dtype, torch.float32) and not unit[~whole].any()
    torch.testing.assert_close(unit[whole], F.normalize(tokens.to(unit.dtype), dim=-1)[whole])
    assert torch.equal(torch.nan_to_num(tokens), torch.nan_to_num(before)), "the tokens stay as they are"


@pytest.mark.parametrize(("n", "width"), [(7, 5), (70, LARGE // 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_do_not_depend_on_the_batch(n, width, dtype):
    matrix = unit_rows(torch.randn(3, n, width, generator=torch.Generator().manual_seed(n), dtype=dtype))
    vector = matrix[:, 2].contiguous()
    got = row_products(matrix, vector)
    torch.testing.assert_close(got, torch.einsum("gnd,gd->gn", matrix, vector))
    assert torch.equal(got, torch.cat([row_products(matrix[g : g + 1], vector[g : g + 1]) for g in range(3)]))


def test_all_products_at_once_are_for_many_picks_of_short_rows():
    tokens = torch.empty(1, 576, 1024)
    assert gram_pays(tokens, tokens, 192) and not gram_pays(tokens, tokens, 64)
    assert not gram_pays(tokens[..., :8], tokens[..., :8], 192), "beyond the activations of a layer"
    on_gpu = tokens.to("meta")
    assert gram_pays(on_gpu, on_gpu, 64)
