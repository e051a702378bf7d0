"""What is run reduced and masked, on small random models of the real classes: `vtr.testing.tiny_models`, `vtr.testing.reference`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtr.hosts._protocol import host_of
from vtr.reduction import reduced
from vtr.testing.families import IMAGE, PIXELS, SIDE, Shot
from vtr.testing.reference import Expected, masked_logits, merge_map, patches_of
from vtr.testing.tiny_models import Batch, batch_of, build, generate
from vtr.types import Budget, Card, Geometry, Method, Remove, Selection, Signal, Stage, Step, Tower, View
from vtr.types.signals import cls_row

KEEP, NEW = 9, 3
ROWS = ((4, Shot(90, 40), 5), (2, Shot(96, 96), 9))


@dataclass(frozen=True, kw_only=True)
class TowerTop(Method):
    """Keeps the patches that the CLS token attends to most, inside the vision tower."""

    name: ClassVar[str] = "tower_top"
    card: ClassVar[Card] = Card(title="TowerTop: a check", paper="none")
    stages: ClassVar[tuple[Stage, ...]] = ("tower",)
    default_budget: ClassVar[Budget | None] = Budget(keep=KEEP)

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        signal = cls_row()
        return (Remove(Tower(1), partial(self._select, signal), (signal,)),)

    @staticmethod
    def _select(signal: Signal, view: View) -> Selection:
        rank = view.signals[signal].masked_fill(~view.real, -1.0).argsort(dim=1, descending=True, stable=True).argsort(1)
        return Selection(keep=view.real & (rank < view.keep[:, None]))


def apart(a: Tensor, b: Tensor) -> float:
    """Returns the largest absolute difference; infinite where shapes differ or something is NaN."""
    difference = float((a - b).abs().max()) if a.shape == b.shape else float("inf")
    return difference if difference == difference else float("inf")


class Case:
    """One method on one kind of `tiny_models`, with a left-padded batch of two prompts, each with an image."""

    def __init__(self, kind: str, method: Callable[[], Method], models: dict[str, Any]) -> None:
        self.kind, self.method, self.models = kind, method, models

    def _start(self) -> None:
        if hasattr(self, "keep"):
            return
        if self.kind not in self.models:
            self.models[self.kind] = build(self.kind)
        self.model, self.batch = self.models[self.kind], batch_of(self.kind, ROWS)
        with reduced(self.model, [self.method()]) as reduction:
            self.logits = self._forward(self.batch)
            self.report = reduction.report()
        self.keep = torch.zeros_like(self.batch.valid)
        for row, positions in enumerate(self.report.positions):
            self.keep[row, positions] = True

    def _forward(self, batch: Batch) -> Tensor:
        return self.model(**batch.inputs, position_ids=batch.positions, use_cache=False).logits

    def removed(self) -> float:
        """Logits of the tokens left, reduced against masked."""
        self._start()
        wrong = [image for image in self.report.images if len(image.retained) not in (KEEP, image.visual_tokens)]
        if wrong or not bool(self.keep[self.batch.valid & ~self.batch.visual].all()):
            return float("inf")
        full = self._masked(self.batch)
        pairs = [(self.logits[row, -int(keep.sum()) :], full[row, keep]) for row, keep in enumerate(self.keep)]
        return max(apart(short, long) for short, long in pairs)

    def cached(self) -> float:
        """Logits of generated tokens, with the shortened KV cache against one masked pass over all tokens."""
        self._start()
        with reduced(self.model, [self.method()]):
            made = generate(self.model, self.batch, NEW, suppress_tokens=[IMAGE])
        return apart(torch.stack(made.logits, 1), self._masked(self.batch.followed_by(made.sequences[:, -NEW:-1]))[:, -NEW:])

    def single(self) -> float:
        """Logits behind each prompt, in the padded batch against alone."""
        self._start()
        with reduced(self.model, [self.method()]):
            return max(apart(self._forward(self.batch.row(row))[0, -1], self.logits[row, -1]) for row in range(len(ROWS)))

    def _masked(self, batch: Batch) -> Tensor:
        """Logits of the unreduced model for the prompts and what was generated behind them."""
        steps = self.method().steps(host_of(self.model).geometry())
        layer = next((step.layer for step in steps if step.stage == "prefill" and step.action == "remove"), 0)
        keep = nn.functional.pad(self.keep, (0, batch.valid.shape[1] - self.keep.shape[1]), value=True)
        expected = Expected(drops=[(layer, keep)], freeze=tuple(step.layer for step in steps if step.action == "freeze"))
        retained = [image.retained for image in self.report.images]
        expected.tower_drops = [(step.layer, patches_of(batch, retained)) for step in steps if step.stage == "tower"]
        if any(step.action == "merge" for step in steps):
            pairs = [zip(image.tokens, image.assignment or (), strict=True) for image in self.report.images]
            expected.merges = [(0, merge_map(batch, [dict(pair) for pair in pairs]))]
        return masked_logits(self.model, batch, expected)


def dense() -> float:
    """Patch features of a ViT with as many clusters as tokens against the full ViT; with fewer clusters they must be other ones."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=PIXELS, patch_size=PIXELS // SIDE, embed_dim=32, depth=4, num_heads=4, num_classes=0).eval()
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    full = model.forward_features(pixels)
    with reduced(model, "expedit", alpha=1, grid=(3, 3), tau=0.1):
        coarse = model.forward_features(pixels)
    with reduced(model, "expedit", alpha=1, grid=(SIDE, SIDE), tau=1e6, neighbours=1):
        same = apart(model.forward_features(pixels), full)
    return same if 0.01 < apart(coarse, full) < float("inf") else float("inf")
