"""Images whose views have grids of another size than those of their neighbours: every method does with each what it does with it alone."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vtr
from tests.methods.handmade import LLAVA, NEXT, ONE, Image, chosen, make_view
from tests.methods.test_expedit import DENSE
from vtr.methods.cdpruner import CDPruner
from vtr.methods.centerclip import CenterCLIP
from vtr.methods.expedit import Expedit
from vtr.methods.globalcom2 import GlobalCom2
from vtr.methods.hired import HiRED
from vtr.methods.pool import Pool
from vtr.methods.resize import Resize
from vtr.methods.script import Script
from vtr.types import Geometry, Method, Selection, Signal, View

GRIDS = [(6, 6), (4, 9), (12, 7)]
IMAGES: list[Image] = [((2, 2), (90, 96)), ((1, 3), (40, 144)), ONE]


def views(keep: int, signals: Sequence[Signal] = ()) -> list[View]:
    """All images in one View, then each in one of its own, with the same random signals `(G, N)`."""
    made = [make_view(IMAGES, keep, grid=GRIDS, behind=True)]
    made += [make_view([image], keep, grid=[grid], behind=True) for image, grid in zip(IMAGES, GRIDS, strict=True)]
    for view in made:
        view.signals = {need: _random(view, number) for number, need in enumerate(signals)}
    return made


def _random(view: View, number: int) -> Tensor:
    found = torch.zeros(view.real.shape)
    for row, real, seed in zip(found, view.real, view.checksum.tolist(), strict=True):
        row[real] = torch.rand(int(real.sum()), generator=torch.Generator().manual_seed(seed + number))
    return found


@pytest.mark.parametrize("keep", [5, 23])
@pytest.mark.parametrize(
    ("method", "geometry"),
    [
        (GlobalCom2(), NEXT),
        (GlobalCom2(score="similarity"), NEXT),
        (HiRED(), NEXT),
        (Pool(), LLAVA),
        (CenterCLIP(stage="boundary", algorithm="spectral"), LLAVA),
        (CDPruner(), NEXT),
        (Script(), NEXT),
    ],
    ids=["globalcom2", "globalcom2 without CLS", "hired", "pool", "centerclip", "cdpruner", "script"],
)
def test_a_group_is_reduced_as_it_is_alone(method: Method, geometry: Geometry, keep: int):
    (step,) = method.steps(geometry)
    assert step.select is not None
    together, *alone = views(keep, step.needs)
    found = step.select(together)
    for group, view in enumerate(alone):
        own = step.select(view)
        torch.testing.assert_close(chosen(together, found.keep)[group], chosen(view, own.keep)[0], rtol=0, atol=0)
        if own.tokens is not None:
            n = view.counts[0]
            torch.testing.assert_close(found.tokens[group, :n], own.tokens[0])
            torch.testing.assert_close(found.assign[group, :n], own.assign[0])


def test_resize_shrinks_every_grid():
    (step,) = Resize().steps(LLAVA)
    assert step.select is not None
    together, *alone = views(17)
    assert step.select(together) == [grid for view in alone for grid in step.select(view)]
    assert len(set(step.select(together))) == 3


def of_one_view(keep: int) -> list[View]:
    """As `views`, of images without crops."""
    sizes = [(48, 48), (32, 72), (96, 56)]
    made = [make_view([((0, 0), size) for size in sizes], keep, grid=GRIDS, behind=True)]
    return made + [make_view([((0, 0), size)], keep, grid=[grid], behind=True) for size, grid in zip(sizes, GRIDS, strict=True)]


def refined(view: View, selection: Selection) -> View:
    """The View of what a merge left, after a layer has changed it."""
    assert selection.tokens is not None and selection.index is not None
    real = torch.ones_like(selection.index, dtype=torch.bool) if selection.real is None else selection.real
    return replace(view, tokens=2 * selection.tokens + 1, real=real)


@pytest.mark.parametrize(
    ("method", "geometry"),
    [
        (Expedit(alpha=2, tau=0.3), DENSE),
        (Expedit(alpha=2), DENSE),
        (Expedit(alpha=2, grid=(3, 2), reconstruct="naive"), DENSE),
        (Expedit(alpha=2, reconstruct=False), LLAVA),
        (Pool(), DENSE),
        (Pool(grid=(3, 2)), DENSE),
    ],
    ids=["expedit", "expedit, tau by image", "expedit, naive", "expedit, clusters", "pool", "pool, grid"],
)
def test_a_grid_is_merged_and_given_back_as_it_is_alone(method: Method, geometry: Geometry):
    merge, *restore = method.steps(geometry)
    assert merge.select is not None
    together, *alone = of_one_view(20)
    found = merge.select(together)
    assert found.grid is None, "no grid is that of all"
    back = restore[0].select(refined(together, found)) if restore and restore[0].select else None
    for group, view in enumerate(alone):
        own = merge.select(view)
        count, n = own.index.shape[1], view.counts[0]
        assert found.real is not None and torch.equal(found.real[group], torch.arange(found.real.shape[1]) < count)
        torch.testing.assert_close(found.index[group, :count], own.index[0])
        torch.testing.assert_close(found.tokens[group, :count], own.tokens[0])
        torch.testing.assert_close(found.assign[group, :n], own.assign[0])
        if back is not None:
            assert restore[0].select is not None
            torch.testing.assert_close(back[group, :n], restore[0].select(refined(view, own))[0])


def test_views_of_different_grids_have_none_in_common():
    view = make_view([((1, 2), (48, 96))], 9)
    assert view.grid(0) == (6, 6) and view.views == 3 and view.kinds == ["image"] and view.frames == [None]
    view.grids = [[(6, 6), (6, 6), (4, 9)]]
    with pytest.raises(vtr.VtrError, match=r"views of an image have different grids, \(6, 6\), \(4, 9\), where one is needed"):
        view.grid(0)
    view.only = [2]
    assert view.grid(0) == (4, 9)
