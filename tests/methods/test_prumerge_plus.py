"""PruMerge+: which tokens it adds; merging is tested with PruMerge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.handmade import LLAVA, chosen, select_without_sync
from tests.methods.test_prumerge import check_row, fence_of
from tests.methods.towers import random_layer, tower_view
from vtr.methods.prumerge_plus import PruMergePlus, prumerge_plus
from vtr.registry import create_method

SIZES = [36, 20, 1, 7]


def ones(n, rows=1):
    return torch.ones(rows, n, dtype=torch.bool)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_with_a_budget_a_quarter_is_by_attention_and_the_rest_evenly_spaced(seed, n):
    attention = torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
    order = attention[0].argsort(descending=True, stable=True).tolist()
    for keep in range(n + 1):
        top, spread = (mask[0].nonzero().flatten().tolist() for mask in prumerge_plus(attention, ones(n), torch.tensor([keep])))
        kept = max(keep - 1, 0)
        best = sorted(order[: round(kept / 4)])
        others = [i for i in range(n) if i not in best]
        wanted = kept - len(best)
        assert top == best
        assert spread == [others[((2 * i + 1) * len(others)) // (2 * wanted)] for i in range(wanted)]


def authors_grid(attention, top):
    """The released code's samples, for any N: from 0, every `int(int(1 / ratio) / 3)`, the last token excepted."""
    step = max(int(len(attention) / max(len(top), 1) / 3), 1)
    return [i for i in range(0, max(len(attention) - 1, 1), step) if i not in top]


def test_adaptive_is_the_code_for_every_row_of_a_ragged_batch():
    (step,) = PruMergePlus().steps(LLAVA)
    layers = [random_layer(n, seed) for seed in range(6) for n in SIZES]
    view = tower_view(step, layers, 36, pad=2)
    answer = step.select(view)
    for g, layer in enumerate(layers):
        attention = layer.one_head()
        top = (attention > fence_of(attention)).nonzero().flatten().tolist()
        kept = sorted(top + authors_grid(attention, top))
        if len(kept) == len(attention):
            assert torch.equal(answer.tokens[g, view.real[g]], layer.output[1:])
        else:
            check_row(layer, layer, kept, answer, view, g)
    select_without_sync(step, view)


def test_about_four_times_as_many_as_outliers():
    attention = torch.full((1, 576), 1 / 577) + torch.rand(1, 576, generator=torch.Generator().manual_seed(0)) * 1e-4
    attention[0, torch.arange(35) * 16 + 7] = 0.01
    top, spread = prumerge_plus(attention, ones(576), None)
    assert top.sum() == 35 and 105 <= spread.sum() <= 115  # the authors' ratio .0608: 35 and 109
    assert not (top & spread).any() and not spread[0, 575]


@pytest.mark.parametrize("keep", range(1, 37))
def test_every_budget_is_exact_in_a_ragged_batch(keep):
    (step,) = PruMergePlus(keep=keep).steps(LLAVA)
    layers = [random_layer(n) for n in SIZES]
    view = tower_view(step, layers, keep, pad=3)
    answer = step.select(view)
    assert answer.keep.sum(1).tolist() == [min(keep, n) for n in SIZES] and not (answer.keep & ~view.real).any()
    for g, layer in enumerate(layers):
        if keep < SIZES[g]:
            top, spread = prumerge_plus(layer.one_head()[None], ones(SIZES[g]), torch.tensor([keep]))
            check_row(layer, layer, (top | spread)[0].nonzero().flatten().tolist(), answer, view, g)
        alone = tower_view(step, [layer], keep)
        assert torch.equal(chosen(alone, step.select(alone).keep)[0], chosen(view, answer.keep)[g])


def test_the_spelling_with_a_plus_is_an_alias():
    assert create_method("prumerge+", keep=9) == PruMergePlus(keep=9)
