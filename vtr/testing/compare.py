"""Comparing a reduced forward with the masked model, and two generations with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtr.reduction import reduced
from vtr.testing.families import Clip
from vtr.testing.probes import Choice, recorded
from vtr.testing.reference import Expected, areas_of, difference, keep_mask, largest, masked_logits, merge_map, patches_of, renumbered
from vtr.testing.tiny_models import ROWS, Batch, batch_of, model_of
from vtr.types import Method

NEW = 5
"""Tokens generated."""


@dataclass(frozen=True)
class Setup:
    """One model and one batch: left padded, one image in the first row and two in the second."""

    kind: str = "llava"
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32

    @property
    def model(self) -> Any:
        return model_of(self.kind, self.attention, self.dtype)

    def batch(self, *rows: tuple, pad: str = "left", seed: int = 0) -> Batch:
        return batch_of(self.kind, rows or ROWS, pad, self.dtype, seed)

    @property
    def exact(self) -> bool:
        """Rounding cannot change which token is generated."""
        return self.dtype in (torch.float32, torch.float64)


@dataclass
class Run:
    """One reduced forward: its logits, what the probes chose and what was reported."""

    logits: Tensor
    choices: list[Choice]
    report: Any


@torch.no_grad()
def run(setup: Setup, plan: Sequence[Method], batch: Batch, **arguments: Any) -> Run:
    """Runs a reduced forward with the positions that `generate` would give."""
    with recorded() as choices, reduced(setup.model, list(plan)) as reduction:
        logits = setup.model(**batch.inputs, **{"position_ids": batch.positions, **arguments}).logits
        return Run(logits, choices, reduction.report())


def expected_of(batch: Batch, choices: Sequence[Choice], newlines: str = "rows", renumber: bool = False) -> Expected:
    """Returns what the choices of the probes must amount to."""
    expected = Expected()
    for choice in in_prompt_order(batch, choices):
        layer = choice.layer if choice.stage == "prefill" else 0
        keep = keep_mask(batch, choice.retained, newlines)
        if choice.stage == "tower":
            kept = patches_of(batch, choice.retained)
            if any(choice.merged):
                expected.tower_merges.append((choice.layer, _patch_map(batch, choice)))
                expected.tower_drops.append((choice.layer + 1, kept))  # what unpadding cuts off goes, too
            else:
                expected.tower_drops.append((choice.layer, kept))
        elif any(choice.merged):
            expected.merges.append((layer, merge_map(batch, choice.merged)))
        expected.drops.append((layer, keep))
        if renumber:
            expected.positions.append((layer, renumbered(keep)))
    return expected


def order_of(batch: Batch) -> list[int]:
    """Returns the images and videos of a batch, numbered row by row, in the order in which methods and reports have them: images first."""
    clips = [isinstance(shot, Clip) for row in batch.shots for shot in row]
    return sorted(range(len(clips)), key=lambda i: clips[i])


def in_prompt_order(batch: Batch, choices: Sequence[Choice]) -> list[Choice]:
    """Returns choices whose entries are images and videos row by row; a step that saw both kinds made one for each."""
    order, found, rest = order_of(batch), [], list(choices)
    if order == sorted(order):
        return list(choices)
    while rest:
        first, second = rest.pop(0), rest.pop(0)
        assert (first.kind, second.kind, first.layer) == ("image", "video", second.layer), "one choice for each kind"
        retained, merged, seen = (
            _by_row(one + other, order)
            for one, other in ((first.retained, second.retained), (first.merged, second.merged), (first.seen, second.seen))
        )
        found.append(Choice(first.stage, first.layer, retained, merged, seen))
    return found


def _by_row(values: list[Any], order: list[int]) -> list[Any]:
    return [values[order.index(i)] for i in range(len(order))]


def _patch_map(batch: Batch, choice: Choice) -> Tensor:
    """Returns the `(U, P)` patch that each patch is averaged into; merges must stay inside a view."""
    views = patches_of(batch, [[] for _ in choice.retained])
    into = torch.arange(views.shape[1]).expand(views.shape).clone()
    first = 0
    for areas, targets in zip(areas_of(batch), choice.merged, strict=True):
        offsets = torch.tensor([0, *areas]).cumsum(0)
        for source, target in targets.items():
            view = int(torch.searchsorted(offsets, source, right=True)) - 1
            assert offsets[view] <= target < offsets[view + 1], "a merge across views"
            into[first + view, source - offsets[view]] = target - offsets[view]
        first += len(areas)
    return into


def against_masks(setup: Setup, plan: Sequence[Method], batch: Batch, freeze: tuple[int, ...] = (), **options: Any) -> float:
    """Compares a reduced forward with the masked model; also checks that the report says what happened."""
    result = run(setup, plan, batch)
    expected = expected_of(batch, result.choices, **options)
    expected.freeze = freeze
    keep = expected.drops[-1][1] if expected.drops else batch.valid
    check_report(batch, result, keep)
    return difference(batch, keep, result.logits, masked_logits(setup.model, batch, expected))


def check_report(batch: Batch, result: Run, keep: Tensor) -> None:
    """Checks that the report names the survivors: positions, retained patches and counts."""
    positions = [row.nonzero()[:, 0].tolist() for row in keep]
    assert [list(row) for row in result.report.positions] == positions, "report.positions"
    if not result.choices:
        return
    images, order, last = result.report.to_dict()["images"], order_of(batch), in_prompt_order(batch, result.choices)[-1]
    images = _by_row(images, order)
    assert [sorted(image["retained"]) for image in images] == [sorted(ids) for ids in last.retained], "report: retained"
    assert [image["visual_tokens"] for image in images] == batch.counts(), "report: visual_tokens"
    visual = [int((keep[row] & batch.visual[row]).sum()) for row in range(len(keep))]
    told = [sum(len(i["retained"]) + i["newlines"] for i in images if i["row"] == row) for row in range(len(keep))]
    assert told == visual, "report: retained and newlines do not add up to what is left"


def logits_of(output: Any) -> Tensor:
    """Returns the `(new, B, V)` logits of a generation."""
    return torch.stack(output.logits)


def generations(first: Any, second: Any, exact: bool) -> float:
    """Returns the largest difference of two generations while their tokens agree; infinite if exact arithmetic and the tokens differ."""
    a, b = first.sequences[:, -NEW:], second.sequences[:, -NEW:]
    if exact and not torch.equal(a, b):
        return math.inf
    same_so_far = torch.cat([torch.ones_like(a[:, :1], dtype=torch.bool), (a == b).cumprod(1).bool()[:, :-1]], 1)
    same = same_so_far.T
    return largest(logits_of(first)[same], logits_of(second)[same])


def equal(*pairs: tuple[Any, Any]) -> float:
    """Returns 0 when all pairs are bit-identical, infinity otherwise."""
    return 0.0 if all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs) else math.inf
