"""Random draws: by image and patch, never by batch."""

import pytest
import torch

from tests.views import grid_cells, one_row, view_of
from vtr.methods.random import Random
from vtr.types import Geometry, View

GEOMETRY = Geometry("test", 4, 2, 1, True, (6, 6), 5, 36)


def select(view: View, **settings: int) -> torch.Tensor:
    (step,) = Random(**settings).steps(GEOMETRY)
    assert step.select is not None
    return step.select(view).keep


def test_counts_are_exact_and_only_real_tokens_are_drawn() -> None:
    view = view_of([grid_cells(6, 6), grid_cells(3, 4)], [10, 12], (6, 6), pad=2)
    keep = select(view, keep=10)
    assert keep.sum(1).tolist() == [10, 12] and not (keep & ~view.real).any()


def test_a_draw_belongs_to_the_image_and_not_to_the_batch() -> None:
    view = view_of([grid_cells(6, 6), grid_cells(6, 6), grid_cells(3, 4)], [10, 10, 5], (6, 6))
    keep = select(view)
    for row in range(3):
        assert torch.equal(select(one_row(view, row))[0], keep[row, : view.counts[row]])
    view.checksum[1] = view.checksum[0]
    again = select(view)
    assert torch.equal(again[0], keep[0]) and torch.equal(again[1], again[0]), "the same image, the same tokens"


def test_smaller_budgets_are_subsets_and_seeds_differ() -> None:
    view = view_of([grid_cells(6, 6)], [20], (6, 6))
    more = select(view)
    view.keep, view.most = torch.tensor([7]), 7
    fewer = select(view)
    assert not (fewer & ~more).any()
    assert not torch.equal(fewer, select(view, seed=1))


def test_a_draw_does_not_follow_the_position_of_a_patch() -> None:
    view = view_of([grid_cells(6, 6)], [12], (6, 6))
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    keep = select(view)
    view.patch = view.patch[:, order]
    assert torch.equal(select(view), keep[:, order])


def test_every_patch_has_the_same_chance() -> None:
    view = view_of([grid_cells(6, 6)] * 400, [9] * 400, (6, 6))
    drawn = select(view).float().mean(0)
    assert (drawn - 0.25).abs().max() < 0.12  # 5.5 standard deviations of 400 draws


@pytest.mark.parametrize(("seed", "error"), [("a", TypeError), (True, TypeError), (0.5, TypeError), (2**63, ValueError)])
def test_bad_seeds(seed: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="random: seed"):
        Random(seed=seed)  # type: ignore[arg-type]
