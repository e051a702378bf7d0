"""ToMe against a brute-force reference of our own (its source is non-commercial, so no vectors are kept here)."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.views import grid_cells, one_row, view_of
from vtr.methods.tome import ToMe, merge_schedule, shares, tome
from vtr.types import Geometry, Signal

GEOMETRY = Geometry("test", tower_layers=5, feature_layer=3, prefix_tokens=1, has_cls=True, patch_grid=(6, 6), llm_layers=5, most_tokens=36)


def brute_force(metric: Tensor, remove: int, cls: bool) -> tuple[list[int], dict[int, int]]:
    """One layer on a whole sequence `(T, d)`, step by step: the order of the output and who merged into whom."""
    t = len(metric)
    unit = F.normalize(metric, dim=-1)
    cosine = (unit @ unit.T).tolist()
    even, odd = list(range(0, t, 2)), list(range(1, t, 2))
    nearest = {a: max(odd, key=lambda b: (cosine[a][b], -b)) for a in even}
    ranked = sorted((a for a in even if not (cls and a == 0)), key=lambda a: (-cosine[a][nearest[a]], a))
    gone = {a: nearest[a] for a in ranked[:remove]}
    unmerged = [a for a in even if a not in gone] if cls else ranked[remove:]
    return unmerged + odd, gone


@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 4), st.booleans())
def test_several_layers_equal_brute_force_in_the_authors_order(seed: int, patches: int, layers: int, cls: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, patches, 3, generator=generator).double()
    real, size = torch.ones(1, patches).bool(), torch.ones(1, patches)
    number = torch.arange(patches)[None]
    plain = torch.cat([torch.zeros(int(cls), 3).double(), x[0]])
    plain_size, names = [1.0] * len(plain), list(range(-int(cls), patches))
    tokens, ids = x, torch.arange(patches)[None]
    for _ in range(layers):
        n = tokens.shape[1]
        remove = int(torch.randint(n // 2 + 1, (1,), generator=generator))
        if remove:
            order, gone = brute_force(plain, remove, cls)
            for source, pivot in gone.items():  # one after the other: weighted by size
                total = plain_size[source] + plain_size[pivot]
                plain[pivot] = (plain[pivot] * plain_size[pivot] + plain[source] * plain_size[source]) / total
                plain_size[pivot] = total
            plain, plain_size, names = plain[order], [plain_size[i] for i in order], [names[i] for i in order]

        left = torch.tensor([n - remove])
        keep, merged, assign, number = tome(tokens, tokens, size, real, left, number, shift=int(cls), reorder=not cls)
        assert keep.sum() == n - remove and keep.gather(1, assign).all()
        total_size = torch.zeros_like(size).scatter_add_(1, assign, size)
        index = keep[0].nonzero()[:, 0]
        tokens, size, number, ids = merged[:, index], total_size[:, index], number[:, index], ids[:, index]
        real = torch.ones_like(size).bool()
        in_order = number[0].argsort()
        assert ids[0, in_order].tolist() == names[int(cls) :], "the next layer splits as the authors' order does"
        torch.testing.assert_close(tokens[0, in_order], plain[int(cls) :], atol=1e-9, rtol=0)
        assert size[0, in_order].tolist() == plain_size[int(cls) :]


@given(st.integers(1, 80), st.integers(1, 8), st.sampled_from([0.0, -1.0, 1.0, 0.5]), st.data())
def test_schedules_sum_exactly_and_never_merge_more_than_half(n: int, layers: int, inflect: float, data: st.DataObject) -> None:
    least = n
    for _ in range(layers):
        least = -(-least // 2)
    keep = data.draw(st.integers(least, n))
    counts = merge_schedule(n, keep, layers, inflect)
    assert len(counts) == layers and sum(counts) == n - keep
    left = n
    for count, share in zip(counts, shares(counts), strict=True):
        assert 0 <= count <= left // 2
        left -= count
        assert keep + round(share * (n - keep)) == left, "the host finds the same counts from the shares"
    if least > 1:
        with pytest.raises(ValueError, match=f"leave at least {least} per view"):
            merge_schedule(n, least - 1, layers, inflect)


def test_early_layers_get_the_remainder() -> None:
    assert merge_schedule(576, 192, 23) == [17] * 16 + [16] * 7
    falling = merge_schedule(576, 384, 12, -1.0)
    assert falling == sorted(falling, reverse=True) and falling[-1] == 0
    assert merge_schedule(576, 384, 12, 1.0) != falling


def keys_view(counts: list[int], keep: list[int], layer: int, pad: int = 0):
    keys = Signal("k", layer=layer)
    view = view_of([grid_cells(6, 6)[:n] for n in counts], keep, (6, 6), pad=pad)
    view.signals = {keys: torch.randn(*view.real.shape, 2, 4, generator=torch.Generator().manual_seed(1))}
    return view


def test_steps_lie_between_attention_and_mlp_up_to_the_feature_layer() -> None:
    steps = ToMe(keep=12).steps(GEOMETRY)
    assert [s.layer for s in steps] == [0, 1, 2, 3] and steps[-1].share == 0
    assert {(s.stage, s.at, s.per, s.action, s.proportional) for s in steps} == {("tower", "mlp", "view", "merge", True)}
    assert [s.needs for s in steps] == [(Signal("k", layer=layer),) for layer in range(4)]
    assert [12 + round(s.share * 24) for s in steps] == [30, 24, 18, 12]
    assert not ToMe(keep=12, proportional=False).steps(GEOMETRY)[0].proportional
    assert [s.layer for s in ToMe(keep=35).steps(GEOMETRY)] == [0], "layers that merge nothing are left alone"
    assert [s.share for s in ToMe.identity(36).steps(GEOMETRY)] == [0.0]


def test_without_one_grid_the_shares_are_those_of_a_large_image() -> None:
    own_grids = replace(GEOMETRY, patch_grid=None, most_tokens=None, prefix_tokens=0, has_cls=False)
    for method in (ToMe(keep=12), ToMe(keep_ratio=0.2), ToMe(keep_ratio=0.01), ToMe(keep_ratio=0.5, inflect=-1.0)):
        left = [step.share for step in method.steps(own_grids)]
        assert left == sorted(left, reverse=True) and left[-1] == 0
    assert [step.share for step in ToMe(keep=12).steps(own_grids)] == [0.75, 0.5, 0.25, 0.0]
    early = [1000] + [round(200 + step.share * 800) for step in ToMe(keep_ratio=0.2).steps(own_grids)]
    assert all(2 * now >= before for before, now in pairwise(early)), "a layer merges at most half"


def test_select_gives_exact_counts_also_for_rows_that_halving_cannot_serve() -> None:
    step = ToMe(keep=12).steps(GEOMETRY)[0]
    assert step.select is not None
    view = keys_view([36, 20, 7, 5, 1], [30, 20, 2, 0, 1], 0, pad=2)
    selection = step.select(view)
    assert selection.keep.sum(1).tolist() == [30, 20, 2, 0, 1] and not (selection.keep & ~view.real).any()
    named = selection.assign[view.real & (torch.arange(5)[:, None] != 3)]
    assert (named >= 0).all() and (selection.assign[3] == -1).all() and (selection.assign[~view.real] == -1).all()
    assert torch.equal(selection.tokens[1, :20], view.tokens[1, :20]), "nothing merged: not touched"
    for row in range(5):
        alone_view = one_row(view, row)
        alone = step.select(alone_view)
        assert torch.equal(alone.keep[0], selection.keep[row, : view.counts[row]])
        assert torch.equal(alone.assign[0], selection.assign[row, : view.counts[row]])


def test_the_numbering_travels_with_the_tokens() -> None:
    first, second = ToMe(keep=18).steps(GEOMETRY)[:2]
    assert first.select is not None and second.select is not None
    view = keys_view([36], [30], 0)
    first.select(view)
    number = view.per_token["number"]
    assert number.shape == (1, 36)
    later = keys_view([36], [24], 1)
    plain = second.select(later).keep
    later.per_token["number"] = number.flip(1)
    assert not torch.equal(second.select(later).keep, plain)


def test_compat_numbers_by_similarity_only_without_cls() -> None:
    tokens = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    args = (tokens, tokens, torch.ones(1, 12), torch.ones(1, 12).bool(), torch.tensor([9]), torch.arange(12)[None])
    plain, authors = tome(*args, shift=0)[3], tome(*args, shift=0, reorder=True)[3]
    assert not torch.equal(plain[:, ::2].argsort(), authors[:, ::2].argsort())
    assert torch.equal(plain[:, 1::2].argsort(), authors[:, 1::2].argsort())


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="tome: inflect must be from -1"):
        ToMe(inflect=-1.5)
    with pytest.raises(TypeError, match="tome: inflect must be a number"):
        ToMe(inflect="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tome: compat must be"):
        ToMe(compat="paper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tome: 2 of the 36 tokens of a view are out of reach.*at least 3 per view"):
        ToMe(keep=2).steps(GEOMETRY)
