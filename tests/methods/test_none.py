"""Nothing stays, whatever there is."""

import pytest

from tests.views import grid_cells, view_of
from vtr.methods.none import Nothing
from vtr.types import Geometry

GEOMETRY = Geometry("test", 4, 2, 1, True, (6, 6), 5, 36)


def test_every_visual_token_goes_and_the_budget_is_not_asked() -> None:
    (step,) = Nothing().steps(GEOMETRY)
    assert step.select is not None and not step.counted and step.stage == "boundary"
    assert not step.select(view_of([grid_cells(6, 6), grid_cells(2, 3)], [36, 6], (6, 6))).keep.any()


def test_positions_and_newlines_are_those_of_a_prompt_without_image() -> None:
    assert Nothing.published_positions == "renumber" and Nothing().newlines == "none"
    assert Nothing.identity(36) == Nothing()


def test_it_has_no_budget() -> None:
    assert Nothing().budget is None
    with pytest.raises(ValueError, match="none: has no budget, got keep=3"):
        Nothing(keep=3)
