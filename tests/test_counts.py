"""A method that keeps another number of tokens than it was asked for is found out, and nothing else pays for it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import vtr
from tests import tiny_models
from tests.probes import Probe, rank_of
from tests.tiny_models import SIDE, batch_of, generate, model_of

pytestmark = pytest.mark.usefixtures("no_gradients")


@dataclass(frozen=True, kw_only=True)
class Wrong(Probe):
    """Keeps `off` tokens more than it was asked for."""

    off: int = 1
    by_index: bool = False
    keep: int | None = 9
    default_budget: ClassVar[Any] = vtr.Budget(keep=9)
    name: ClassVar[str] = "wrong"

    def select(self, view: vtr.View) -> vtr.Selection:
        keep = view.real & (rank_of(view.real) < (view.keep + self.off)[:, None])
        if not self.by_index:
            return vtr.Selection(keep=keep)
        index = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : view.most + self.off]
        return vtr.Selection(index=index, real=keep.gather(1, index))


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@pytest.mark.parametrize("stage", ["boundary", "prefill", "tower"])
@pytest.mark.parametrize("off", [-5, 7])
@pytest.mark.parametrize("by_index", [False, True])
def test_a_wrong_count_is_an_error_of_the_report_and_text_stays(kind, stage, off, by_index):
    model, batch = model_of(kind), batch_of(kind)
    with vtr.reduced(model, [Wrong(off=off, by_index=by_index, stage=stage, layer=2)]) as reduction:
        answer = generate(model, batch, 2)
        assert answer.sequences.shape[1] == batch.valid.shape[1] + 2
        report = reduction.reports[-1]
    column, valid = report._seen.places.column, report._seen.places.valid
    for row in range(2):
        left = set(column[row][valid[row]].tolist())
        text = set((batch.valid & ~batch.visual)[row].nonzero()[:, 0].tolist())
        assert text <= left, "text is never removed"
    where = {"boundary": "the boundary", "prefill": "prefill layer 2", "tower": "tower layer 2"}[stage]
    message = rf"wrong: select kept {9 + off} visual tokens of an image at {where}, keep was 9; return exactly view.keep"
    for read in (lambda: report.images, lambda: report.positions, report.to_dict, lambda: report.average_keep, lambda: repr(report)):
        with pytest.raises(vtr.VtrError, match=message):
            read()


def test_a_right_count_is_no_error():
    model, batch = model_of("llava"), batch_of("llava")
    with vtr.reduced(model, [Wrong(off=0)]) as reduction:
        model(**batch.inputs)
    assert [len(image.retained) for image in reduction.report().images] == [9, 9, 9]
    assert SIDE * SIDE > 9


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda view: vtr.Selection(keep=view.real.tolist()), "wrong: keep must be a tensor, got list"),
        (lambda view: vtr.Selection(keep=view.real, tokens=view.tokens[..., :7]), r"wrong: tokens must be \(3, tokens, \d+\), got"),
    ],
)
@pytest.mark.parametrize("stage", ["boundary", "prefill", "tower"])
def test_an_answer_of_another_kind_is_an_error_of_the_method(answer, message, stage):
    class Other(Wrong):
        def select(self, view: vtr.View) -> vtr.Selection:
            return answer(view)

    model, batch = model_of("llava"), batch_of("llava")
    with vtr.reduced(model, [Other(stage=stage, layer=2)]), pytest.raises((TypeError, ValueError), match=message):
        model(**batch.inputs)
