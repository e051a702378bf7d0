"""What a method chose while it ran, and what that must amount to in the unreduced model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtr.hosts._protocol import host_of
from vtr.testing.given import reduced
from vtr.testing.reference import (
    Expected,
    TowerValues,
    areas_of,
    keep_mask,
    largest,
    masked_logits,
    patches_of,
    renumbered,
    spots,
    survivors,
)
from vtr.testing.tiny_models import FAMILIES, IMAGE, Batch, batch_of, generate, model_of
from vtr.types import Geometry, Method, Selection, Step, View


@dataclass(frozen=True)
class Answer:
    """What one step returned, and the View that it saw; `keep (G, N)` and `tokens (G, N, D)` also where the step answered by `index`."""

    step: Step
    view: View
    selection: Selection
    keep: Tensor
    tokens: Tensor | None


def watched(method: Method, answers: list[Answer]) -> Method:
    """Returns a method that does the same and appends to `answers` what its removing steps return, in the order in which they run."""

    class Watched(type(method)):  # type: ignore[misc]
        def steps(self, geometry: Geometry) -> tuple[Step, ...]:
            return tuple(watch(step) for step in super().steps(geometry))

    def watch(step: Step) -> Step:
        select = step.select
        if step.action not in ("remove", "merge") or select is None:
            return step

        def noted(view: View) -> Any:
            selection = select(view)
            answers.append(Answer(step, replace(view), selection, *_by_mask(selection, view)))
            return selection

        return replace(step, select=noted)

    return Watched(**{f.name: getattr(method, f.name) for f in fields(method) if f.init})


def _by_mask(selection: Selection, view: View) -> tuple[Tensor, Tensor | None]:
    """Keep mask `(G, N)` and values `(G, N, D)` of a selection, whichever way it was written."""
    if selection.keep is not None:
        return selection.keep, selection.tokens
    index = selection.index
    assert index is not None
    real = torch.ones_like(index, dtype=torch.bool) if selection.real is None else selection.real
    keep, tokens = torch.zeros_like(view.real), None
    if selection.tokens is not None:
        tokens = selection.tokens.new_zeros(*view.real.shape, selection.tokens.shape[-1])
    for group, there in enumerate(real):
        keep[group, index[group, there]] = True
        if tokens is not None and selection.tokens is not None:
            tokens[group, index[group, there]] = selection.tokens[group, there]
    return keep, tokens


def images_of(view: View) -> list[int]:
    """Returns the number of the image that each row of a View belongs to; with one row per view, several rows belong to one."""
    if view.only is None:
        return list(range(len(view.keeps)))
    image, found = -1, []
    for before, now in zip([None, *view.only], view.only, strict=False):
        image += before is None or now <= before
        found.append(image)
    return found


def owners(batch: Batch, view: View) -> list[tuple[int, int]]:
    """Returns, for each row of a View, the image that it belongs to and the patch id of that image at which its patch ids begin: 0, but for a
    frame that a method sees as an image of its own."""
    frames = [(i, sum(map(math.prod, grids[:v]))) for i, grids in enumerate(_grids(batch)) for v in range(len(grids))]
    if view.only is None and len(view.keeps) == len(frames) > sum(map(len, batch.shots)):
        return frames
    return [(image, 0) for image in images_of(view)]


def _grids(batch: Batch) -> list[list[tuple[int, int]]]:
    return [FAMILIES[batch.kind].grids(shot) for row in batch.shots for shot in row]


def expected_of(model: Any, batch: Batch, method: Method, answers: Sequence[Answer], geometry: Geometry) -> Expected:
    """Returns what the answers of a method must amount to in the unreduced model.

    Raises:
        NotImplementedError: a step changes the images or gives tokens back, which masks cannot express.
    """
    family, expected = FAMILIES[batch.kind], Expected()
    steps = method.steps(geometry)
    beyond = [type(step).__name__ for step in steps if step.action in ("restore", "input")]
    beyond += ["another order of tokens" for answer in answers if answer.selection.order == "given"]
    if beyond:
        raise NotImplementedError(f"{method.name}: {beyond[0]} has no counterpart in a model with masks")
    expected.freeze = tuple(step.layer for step in steps if step.action == "freeze")
    for answer in answers:
        step, layer = answer.step, answer.step.layer if answer.step.stage == "prefill" else 0
        retained = _retained(batch, answer)
        keep = keep_mask(batch, retained, method.newlines)
        if step.stage == "tower" and answer.tokens is None:
            expected.tower_drops.append((step.layer, patches_of(batch, retained)))
        elif step.stage == "tower":
            expected.tower_values.append(_tower_values(batch, answer))
            expected.proportional = step.proportional
        elif answer.tokens is not None:
            values = answer.tokens
            if step.side == "before_projector":
                values = family.projected(model, values)
            expected.values.append((layer, *_llm_values(batch, answer, values)))
        expected.drops.append((layer, keep))
        if method.position_ids == "renumber":
            expected.positions.append((layer, renumbered(keep)))
    return expected


def _retained(batch: Batch, answer: Answer) -> list[list[int]]:
    """Patch ids that are left, per image."""
    retained: list[list[int]] = [[] for row in batch.shots for _ in row]
    for group, (image, first) in enumerate(owners(batch, answer.view)):
        retained[image] += (answer.view.patch[group][answer.keep[group]] + first).tolist()
    return retained


def _llm_values(batch: Batch, answer: Answer, values: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions of the sequence get new values, and the values `(B, S, D)`."""
    changed, full = torch.zeros_like(batch.visual), values.new_zeros(*batch.visual.shape, values.shape[-1])
    places = spots(batch)
    for group, (image, first) in enumerate(owners(batch, answer.view)):
        spot = places[image]
        position = dict(zip(spot.patches.tolist(), spot.positions.tolist(), strict=True))
        for token in answer.keep[group].nonzero()[:, 0].tolist():
            at = position[int(answer.view.patch[group, token]) + first]
            changed[spot.row, at], full[spot.row, at] = True, values[group, token]
    return changed, full


def _tower_values(batch: Batch, answer: Answer) -> TowerValues:
    """A merge in the tower, by tower input and patch."""
    assign, tokens = answer.selection.assign, answer.tokens
    assert tokens is not None
    keep = patches_of(batch, _retained(batch, answer))
    into = torch.arange(keep.shape[1]).expand(keep.shape).clone()
    values = tokens.new_zeros(*keep.shape, tokens.shape[-1])
    areas = areas_of(batch)
    first = [sum(map(len, areas[:image])) for image in range(len(areas))]
    for group, (image, begin) in enumerate(owners(batch, answer.view)):
        offsets, patch = torch.tensor([0, *areas[image]]).cumsum(0), answer.view.patch[group] + begin
        view = torch.searchsorted(offsets, patch, right=True) - 1
        place = patch - offsets[view]
        for token in answer.view.real[group].nonzero()[:, 0].tolist():
            row, column = first[image] + view[token], place[token]
            target = -1 if assign is None else int(assign[group, token])
            stays = bool(answer.keep[group, token])
            into[row, column] = column if stays else place[target] if target >= 0 else -1
            if stays:
                values[row, column] = tokens[group, token]
    return TowerValues(answer.step.layer, answer.step.at == "mlp", keep, into, values)


@torch.no_grad()
def removed_and_cached(method: Method, kind: str, new_tokens: int = 3, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    """Compares a reduced model with the unreduced one in which what the method removed is hidden, and what it merged or froze is set.

    Returns:
        The largest difference of logits at the tokens that are left, and of those of generated tokens with the shortened KV cache.

    Raises:
        NotImplementedError: masks cannot express what the method does.
    """
    model, batch, answers = model_of(kind, "sdpa", dtype), batch_of(kind, dtype=dtype), list[Answer]()
    host = host_of(model)
    method = method.resolved(host.renumber, host.has_video)
    expected_of(model, batch, method, [], host.geometry())  # before anything runs: is it one that masks can express?
    with reduced(model, watched(method, answers)) as reduction:
        logits = model(**batch.inputs, position_ids=batch.positions, use_cache=False).logits
        positions = reduction.report().positions
    chosen = list(answers)
    expected = expected_of(model, batch, method, chosen, host.geometry())
    keep = expected.drops[-1][1] if expected.drops else batch.valid
    if [list(row) for row in positions] != [row.nonzero()[:, 0].tolist() for row in keep]:
        return float("inf"), float("inf")
    removed = largest(*survivors(batch, keep, logits, masked_logits(model, batch, expected)))
    family = FAMILIES[kind]
    with reduced(model, method):
        answer = generate(model, batch, new_tokens, **{"suppress_tokens": [IMAGE], **family.generation})
    made = answer.sequences[:, -new_tokens:-1]
    whole = batch.followed_by(made)
    longer = _longer(expected, made.shape[1])
    if any(one.step.earlier_keys for one in chosen):  # new tokens do not see in earlier layers, either, what is gone
        length = batch.valid.shape[1]
        longer.unseen = torch.zeros(*whole.valid.shape, whole.valid.shape[1], dtype=torch.bool)
        longer.unseen[:, length:, :length] = (batch.valid & ~keep)[:, None]
    full = masked_logits(model, whole, longer)[:, -new_tokens:]
    return removed, largest(torch.stack(answer.logits, 1), full)


def _longer(expected: Expected, new: int) -> Expected:
    """The same for a batch with generated tokens at its end."""

    def seen(mask: Tensor, value: Any = True) -> Tensor:
        return nn.functional.pad(mask, (0, new), value=value)

    drops = [(layer, seen(keep)) for layer, keep in expected.drops]
    return replace(
        expected,
        drops=drops,
        positions=[(layer, renumbered(keep)) for layer, keep in drops] if expected.positions else [],
        values=[(layer, seen(changed, False), nn.functional.pad(v, (0, 0, 0, new))) for layer, changed, v in expected.values],
    )
