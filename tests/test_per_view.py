"""Steps whose rows are single views, at every stage: each view gets its share of the budget, and the answer is that of the same tokens."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import vtr
from tests.probes import Probe, rank_of
from tests.tiny_models import SIDE, batch_of, model_of
from vtr import Boundary, Layer, Remove, Tower
from vtr.types.signals import cls_row

pytestmark = pytest.mark.usefixtures("no_gradients")
AREA = SIDE * SIDE
WHERE = {"boundary": Boundary(), "prefill": Layer(2), "tower": Tower(2)}


@dataclass(frozen=True, kw_only=True)
class Last(Probe):
    """Keeps the last tokens of every row of its View, a view or an image."""

    per: str = "view"
    reads_cls: bool = False
    keep: int | None = 20
    default_budget: ClassVar[Any] = vtr.Budget(keep=20)
    name: ClassVar[str] = "last"

    def steps(self, geometry):
        needs = (cls_row(1),) if self.reads_cls else ()
        return (Remove(WHERE[self.stage], self.select, needs, per=self.per),)

    def select(self, view: vtr.View) -> vtr.Selection:
        if self.per == "view":
            assert view.only is not None
            for own, cells, real in zip(view.only, view.cells, view.real, strict=True):
                assert set(cells[real][:, 0].tolist()) <= {own}, "each row is the view that it says"
        if self.reads_cls:
            (row,) = view.signals.values()
            assert row.shape == view.real.shape
        return vtr.Selection(keep=view.real & (rank_of(view.real) >= (view.real.sum(1) - view.keep)[:, None]))


@dataclass(frozen=True, kw_only=True)
class Named(Probe):
    """Keeps the patches of each image that it is told."""

    patches: tuple[tuple[int, ...], ...] = ()
    name: ClassVar[str] = "named"

    def steps(self, geometry):
        return (Remove(WHERE[self.stage], self.select, counted=False),)

    def select(self, view: vtr.View) -> vtr.Selection:
        keep = torch.stack([torch.isin(view.patch[i], torch.tensor(own)) for i, own in enumerate(self.patches)])
        return vtr.Selection(keep=keep & view.real)


def by_largest_remainder(counts: list[int], total: int) -> list[int]:
    """Returns shares of `total` by Hare's method, written down again."""
    exact = [total * n / sum(counts) for n in counts]
    shares = [int(x) for x in exact]
    for i in sorted(range(len(counts)), key=lambda i: (shares[i] - exact[i], i))[: total - sum(shares)]:
        shares[i] += 1
    return shares


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("stage", ["boundary", "prefill", "tower"])
def test_every_view_keeps_its_share(kind, stage):
    model, batch = model_of(kind), batch_of(kind)
    with vtr.reduced(model, [Last(stage=stage, reads_cls=stage != "tower")]) as reduction:
        found = model(**batch.inputs).logits
    images = reduction.report().images
    for image in images:
        counts = [sum(patch // AREA == view for patch in image.tokens) for view in range(image.views)]
        kept = [sum(patch // AREA == view for patch in image.retained) for view in range(image.views)]
        assert kept == by_largest_remainder(counts, 20)
        for view, share in enumerate(kept):
            own = [patch for patch in image.tokens if patch // AREA == view]
            assert [patch for patch in image.retained if patch // AREA == view] == own[len(own) - share :]
    same = Named(stage=stage, patches=tuple(tuple(image.retained) for image in images))
    with vtr.reduced(model, [same]):
        expected = model(**batch.inputs).logits
    assert float((found[:, -1] - expected[:, -1]).abs().max()) < 1e-5


@pytest.mark.parametrize("per", ["image", "view"])
def test_a_removal_by_view_follows_others(per):
    """What is left of each view is counted again where an earlier step removed by image."""
    model, batch = model_of("llava_next"), batch_of("llava_next")

    def views(*methods) -> list[list[int]]:
        with vtr.reduced(model, list(methods)) as reduction:
            model(**batch.inputs)
        images = reduction.report().images
        return [[sum(patch // AREA == view for patch in image.retained) for view in range(image.views)] for image in images]

    first, second = Last(per=per, keep=30), Last(stage="prefill", keep=11)
    assert views(first, second) == [by_largest_remainder(left, 11) for left in views(first)]
