"""What a method of somebody else may answer on a ViT without an LLM, against the unreduced ViT with masks at full length."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtr
from tests.dense_models import images, model_of
from vtr import Budget, Card, Geometry, Merge, Restore, Selection, Step, Tower, View
from vtr.engine.dense_run import DenseRun
from vtr.hosts._protocol import host_of

pytestmark = pytest.mark.usefixtures("no_gradients")

N, LAYER, LATER = 36, 2, 4
BLOCKS = {"timm": "blocks", "ViT": "layers", "open_clip": "transformer.resblocks"}
EVERY = pytest.mark.parametrize("kind", BLOCKS)
Select = Callable[[View], Selection]


@dataclass(frozen=True, kw_only=True)
class Foreign(vtr.Method):
    """Answers at some layers with what a test gives; the tokens that are gone come back as 7 everywhere, or not at all."""

    answers: dict[int, Select] = field(default_factory=dict)
    restores: bool = True
    proportional: bool = False
    seen: list[View] = field(default_factory=list)

    name: ClassVar[str] = "foreign"
    card: ClassVar[Card] = Card(title="Foreign", paper="none: a test")
    stages: ClassVar[tuple[Any, ...]] = ("tower",)

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        counted = self.default_budget is not None
        made = [
            Merge(Tower(layer), partial(self.note, select), counted=counted, proportional=self.proportional)
            for layer, select in self.answers.items()
        ]
        restore = Restore(Tower(geometry.tower_layers), self.restore)
        return (*made, restore) if self.restores else tuple(made)

    def note(self, select: Select, view: View) -> Selection:
        self.seen.append(view)
        return select(view)

    def restore(self, view: View) -> Tensor:
        full = view.tokens.new_full((len(view.tokens), N + 1, view.tokens.shape[2]), 7.0)
        where = torch.where(view.real, view.patch, N)[..., None].expand_as(view.tokens)
        return full.scatter(1, where, view.tokens)[:, :N]


@dataclass(frozen=True, kw_only=True)
class Counted(Foreign):
    default_budget: ClassVar[Budget | None] = Budget(keep=10)


def blocks_of(kind: str) -> Any:
    found = model_of(kind).get_submodule(BLOCKS[kind])
    assert len(found) == 6
    return found


def last_output(kind: str, pixels: Tensor) -> Tensor:
    """Patches behind the last block `(B, 36, D)`."""
    seen: list[Tensor] = []
    handle = blocks_of(kind)[-1].register_forward_hook(lambda _block, _args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model_of(kind)(pixels)
    handle.remove()
    return seen[0][:, 1:]


def masked_output(kind: str, pixels: Tensor, hidden: dict[int, Tensor], bias: dict[int, Tensor], values: dict[int, Any]) -> Tensor:
    """The same of the unreduced model.

    Args:
        kind, pixels: as above.
        hidden: block -> patches `(B, 36)` that nobody attends to from there on.
        bias: block -> what is added to the attention logits of each patch `(B, 36)` from there on.
        values: block -> function of the patches `(B, 36, D)` in front of it that gives what stands there instead.
    """
    added, gone = torch.zeros(len(pixels), N), torch.zeros(len(pixels), N, dtype=torch.bool)
    with ExitStack() as stack:
        for i, block in enumerate(blocks_of(kind)):
            gone, added = gone | hidden.get(i, gone), bias.get(i, added)
            mask = torch.nn.functional.pad(added.masked_fill(gone, -1e30), (1, 0))

            def enter(module: Any, args: tuple, kwargs: dict, i: int = i, mask: Tensor = mask) -> Any:
                x = args[0]
                if i in values:
                    x = torch.cat([x[:, :1], values[i](x[:, 1:])], 1)
                if kind == "open_clip":
                    return (x, *args[1:]), kwargs
                name = "attn_mask" if kind == "timm" else "attention_mask"
                return (x,), {**kwargs, name: mask[:, None, None]}

            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            if kind == "open_clip":
                weigh = lambda module, args, kwargs, mask=mask: (args, {**kwargs, "key_padding_mask": mask})  # noqa: E731
                stack.callback(block.attn.register_forward_pre_hook(weigh, with_kwargs=True).remove)
        return last_output(kind, pixels)


def kept_mask(stride: int, rows: int = 2, offset: int = 0) -> Tensor:
    return (torch.arange(N) % stride == offset).expand(rows, -1)


def ragged(rows: int = 2) -> Tensor:
    return torch.stack([torch.arange(N) % (2 + 3 * row) == 0 for row in range(rows)])


def by_index(keep: Tensor, backwards: bool = False, **more: Any) -> Selection:
    """The same answer as an index, rows filled with token 3, which is not kept."""
    count = int(keep.sum(1).max())
    index, real = torch.full((len(keep), count), 3), torch.zeros(len(keep), count, dtype=torch.bool)
    for row in range(len(keep)):
        places = keep[row].nonzero()[:, 0]
        index[row, : len(places)], real[row, : len(places)] = places.flip(0) if backwards else places, True
    return Selection(index=index, real=None if bool(real.all()) else real, **more)


@EVERY
@pytest.mark.parametrize("keep", [kept_mask(3), ragged()], ids=["even", "ragged"])
@pytest.mark.parametrize("form", ["mask", "index", "backwards", "given"])
def test_removed_is_masked(kind, keep, form):
    answers: dict[str, Select] = {
        "mask": lambda view: Selection(keep=keep),
        "index": lambda view: by_index(keep),
        "backwards": lambda view: by_index(keep, backwards=True),
        "given": lambda view: by_index(keep, backwards=True, order="given"),
    }
    wanted = masked_output(kind, images(), {LAYER: ~keep}, {}, {})
    method = Foreign(answers={LAYER: answers[form], LATER: lambda view: Selection(keep=view.real)})
    with vtr.reduced(model_of(kind), method) as reduction:
        got, report = last_output(kind, images()), reduction.report()
    torch.testing.assert_close(got[keep], wanted[keep], atol=2e-5, rtol=1e-4)
    assert bool((got[~keep] == 7).all())
    most = int(keep.sum(1).max())
    assert report.tokens_per_block == [36, 36, most, most, most, most] and report.retained == most
    view = method.seen[1]
    assert view.counts == keep.sum(1).tolist() == view.real.sum(1).tolist()
    order = [view.patch[row][view.real[row]].tolist() for row in range(2)]
    places = [keep[row].nonzero()[:, 0].tolist() for row in range(2)]
    assert order == ([p[::-1] for p in places] if form == "given" else places)
    for row, pivots in enumerate(report.assignment):
        assert pivots == [i if keep[row, i] else -1 for i in range(N)]


@EVERY
def test_a_second_removal_sees_what_the_first_has_left(kind):
    first, second = ragged(), kept_mask(3) & ragged()
    answers = {LAYER: lambda view: Selection(keep=first), LATER: lambda view: Selection(keep=view.real & (view.patch % 3 == 0))}
    wanted = masked_output(kind, images(), {LAYER: ~first, LATER: ~second}, {}, {})
    with vtr.reduced(model_of(kind), Foreign(answers=answers)):
        got = last_output(kind, images())
    torch.testing.assert_close(got[second], wanted[second], atol=2e-5, rtol=1e-4)
    assert bool((got[~second] == 7).all())


def pairs(view: View, pruned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Even tokens stay; of the odd ones every second is averaged into the one before it, the others too or pruned: keep, values, assign."""
    place = torch.arange(N).expand(len(view.real), -1)
    merged = place % 4 == 1 if pruned else place % 2 == 1
    assign = torch.where(merged, place - 1, torch.where(place % 2 == 0, place, -1))
    values = view.tokens.clone()
    for pivot in range(0, N, 2):
        if bool(merged[0, pivot + 1]):
            values[:, pivot] = (view.tokens[:, pivot] + view.tokens[:, pivot + 1]) / 2
    return place % 2 == 0, values, assign


@EVERY
@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("proportional", [True, False])
def test_pruned_tokens_are_merged_into_nobody(kind, pruned, proportional):
    def answer(view: View) -> Selection:
        keep, values, assign = pairs(view, pruned)
        return Selection(keep=keep, tokens=values, assign=assign)

    def merge(tokens: Tensor) -> Tensor:
        made = tokens.clone()
        for pivot in range(0, N, 4 if pruned else 2):
            made[:, pivot] = (tokens[:, pivot] + tokens[:, pivot + 1]) / 2
        return made

    keep = kept_mask(2)
    sizes = torch.where((torch.arange(N) % 4 == 0) | torch.tensor(not pruned), 2.0, 1.0).expand(2, -1)
    bias = {LAYER: sizes.log()} if proportional else {}
    wanted = masked_output(kind, images(), {LAYER: ~keep}, bias, {LAYER: merge})
    method = Foreign(answers={LAYER: answer, LATER: lambda view: Selection(keep=view.real)}, proportional=proportional)
    with vtr.reduced(model_of(kind), method) as reduction:
        got = last_output(kind, images())
        assignment = reduction.report().assignment
    torch.testing.assert_close(got[keep], wanted[keep], atol=2e-5, rtol=1e-4)
    assert torch.equal(method.seen[1].sizes, sizes[keep].view(2, -1))
    assert assignment == [[i - i % 2 if i % 2 == 0 or i % 4 == 1 or not pruned else -1 for i in range(N)]] * 2


def test_without_a_restoring_step_merged_tokens_get_their_pivot_and_pruned_ones_are_refused():
    def answer(view: View, pruned: bool) -> Selection:
        keep, values, assign = pairs(view, pruned)
        return Selection(keep=keep, tokens=values, assign=assign)

    model = model_of("timm")
    with vtr.reduced(model, Foreign(answers={LAYER: partial(answer, pruned=False)}, restores=False)):
        got = last_output("timm", images())
    assert torch.equal(got[:, 1::2], got[:, ::2]) and got.isfinite().all()
    refusal = (
        r"foreign: prunes tokens without trace, but 'timm:VisionTransformer' needs its full token grid at the end; name a pivot .* select"
    )
    for select in (partial(answer, pruned=True), lambda view: Selection(keep=kept_mask(2)), lambda view: by_index(kept_mask(2))):
        with vtr.reduced(model, Foreign(answers={LAYER: select}, restores=False)), pytest.raises(vtr.VtrError, match=refusal):
            last_output("timm", images())


@pytest.mark.slow
def test_pruned_tokens_that_nobody_looked_at_come_back_as_nan():
    """On a device where looking would cost a sync; here compiled code, which looks at no values either."""
    model = model_of("timm")
    with vtr.reduced(model, Foreign(answers={LAYER: lambda view: by_index(kept_mask(2), order="given")}, restores=False)):
        made = torch.compile(model.forward_features, backend="eager")(images())
    assert made[:, 2::2].isnan().all() and made[:, 1::2].isfinite().all()


@pytest.mark.parametrize("kind", ["timm EVA02 rotary", "DINOv3", "DPT"])
def test_rows_of_different_length_need_a_mask(kind):
    model = model_of(kind)
    method = Foreign(answers={LAYER: lambda view: Selection(keep=ragged())})
    with (
        vtr.reduced(model, method),
        pytest.raises(vtr.VtrError, match=r"foreign: leaves 8 to 18 tokens of an image, .* leave equally many"),
    ):
        model(images())
    assert host_of(model).merge_point is None or host_of(model).merge_point.mask is None


@pytest.mark.parametrize(
    "select", [lambda view: Selection(keep=kept_mask(3)), lambda view: by_index(kept_mask(3)), lambda view: by_index(ragged())]
)
def test_another_number_than_the_budget_is_refused(select):
    with vtr.reduced(model_of("timm"), Counted(answers={LAYER: select})):
        with pytest.raises(
            vtr.VtrError, match=r"foreign: select kept (12|18) visual tokens of an image at tower layer 2, keep was 10; return exactly"
        ):
            last_output("timm", images())


def test_what_was_not_looked_at_in_the_run_is_found_by_the_report(monkeypatch):
    """Counts stay on a device where reading them would cost a sync."""
    monkeypatch.setattr(DenseRun, "_check_now", lambda run: None)
    for tokens, found in ((10, None), (12, 12)):
        answer = partial(lambda view, tokens: Selection(keep=view.real & (view.patch < tokens)), tokens=tokens)
        with vtr.reduced(model_of("timm"), Counted(answers={LAYER: answer})) as reduction:
            last_output("timm", images())
        if found is None:
            assert reduction.report().tokens_per_block == [36, 36, 10, 10, 10, 10]
            continue
        for read in (lambda report: report.tokens_per_block, lambda report: report.to_dict(), repr, lambda report: report.assignment):
            with pytest.raises(vtr.VtrError, match=r"foreign: select kept 12 visual tokens of an image at tower layer 2, keep was 10"):
                read(reduction.report())
