"""What is run reduced and masked: small random models of the real classes, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtr.hosts._host import host_of
from vtr.reduction import reduced
from vtr.selfcheck.masked import Hidden, masked_logits
from vtr.types import Budget, Card, Geometry, Method, Remove, Selection, Signal, Stage, Step, Tower, View
from vtr.types.signals import cls_row

IMAGE, SIDE, PIXELS, KEEP, NEW = 60, 6, 48, 9, 3
SIZES = ((90, 40), (96, 96))


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


def small_model(family: str) -> Any:
    """Builds a random `LLaVA` or, with crops, `AnyRes` model."""
    import transformers as hf

    sizes = {"intermediate_size": 64, "num_attention_heads": 4}
    vision = hf.CLIPVisionConfig(**sizes, hidden_size=32, num_hidden_layers=3, image_size=PIXELS, patch_size=PIXELS // SIDE)
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    text = hf.LlamaConfig(**sizes, **tokens, hidden_size=32, num_hidden_layers=4, num_key_value_heads=2)
    settings: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_id": IMAGE}
    build: Any = hf.LlavaForConditionalGeneration
    config: Any = hf.LlavaConfig(**settings)
    if family == "AnyRes":
        pinpoints = [[PIXELS, 2 * PIXELS], [2 * PIXELS, PIXELS], [2 * PIXELS, 2 * PIXELS]]
        build, config = hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig(**settings, image_grid_pinpoints=pinpoints)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = build(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.2)
    return model.eval()


class Case:
    """One method on one model with a left-padded batch of two prompts, each with an image."""

    def __init__(self, family: str, method: Callable[[], Method], models: dict[str, Any]) -> None:
        self.family, self.method, self.models = family, method, models

    def _start(self) -> None:
        if hasattr(self, "keep"):
            return
        if self.family not in self.models:
            self.models[self.family] = small_model(self.family)
        self.model = self.models[self.family]
        torch.manual_seed(1)
        self.host = host_of(self.model)
        layouts = self.host.layouts("image", {"pixel_values": [0, 0], "image_sizes": torch.tensor(SIZES)})
        prompts = [[*range(2, 6 - 2 * i), *[IMAGE] * len(layout.patch), *range(20, 25 + 4 * i)] for i, layout in enumerate(layouts)]
        width = max(map(len, prompts))
        self.ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        self.valid = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).bool()
        self.visual = self.ids == IMAGE
        self.images: dict[str, Tensor] = {"pixel_values": torch.randn(2, 3, PIXELS, PIXELS)}
        if self.family == "AnyRes":
            views = max(layout.views for layout in layouts)
            self.images = {"pixel_values": torch.randn(2, views, 3, PIXELS, PIXELS), "image_sizes": torch.tensor(SIZES)}
        with reduced(self.model, [self.method()]) as reduction:
            self.logits = self._forward(self.ids, self.valid, self.images)
            self.report = reduction.report()
        self.keep = torch.zeros_like(self.valid)
        for row, positions in enumerate(self.report.positions):
            self.keep[row, positions] = True

    def _forward(self, ids: Tensor, valid: Tensor, images: dict[str, Tensor]) -> Tensor:
        places = (valid.long().cumsum(1) - 1).clamp_min(0)
        inputs = {"input_ids": ids, "attention_mask": valid.long(), "position_ids": places, "use_cache": False}
        return self.model(**inputs, **images).logits

    def removed(self) -> float:
        """Logits of the tokens left, reduced against masked."""
        self._start()
        wrong = [image for image in self.report.images if len(image.retained) not in (KEEP, image.visual_tokens)]
        if wrong or not bool(self.keep[self.valid & ~self.visual].all()):
            return float("inf")
        full = self._masked(self.ids)
        pairs = [(self.logits[row, -int(keep.sum()) :], full[row, keep]) for row, keep in enumerate(self.keep)]
        return max(apart(short, long) for short, long in pairs)

    def cached(self) -> float:
        """Logits of generated tokens, with the shortened KV cache against one masked pass over all tokens."""
        self._start()
        with reduced(self.model, [self.method()]):
            inputs = {"input_ids": self.ids, "attention_mask": self.valid.long(), **self.images}
            made = self.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
        return apart(torch.stack(made.logits, 1), self._masked(made.sequences[:, :-1])[:, -NEW:])

    def single(self) -> float:
        """Logits behind each prompt, in the padded batch against alone."""
        self._start()
        worst = 0.0
        with reduced(self.model, [self.method()]):
            for row, valid in enumerate(self.valid):
                images = {name: value[row : row + 1] for name, value in self.images.items()}
                alone = self._forward(self.ids[row : row + 1, valid], valid[None, valid], images)
                worst = max(worst, apart(alone[0, -1], self.logits[row, -1]))
        return worst

    def _masked(self, ids: Tensor) -> Tensor:
        """Logits of the unreduced model for the prompts and what was generated behind them."""
        new = ids.shape[1] - self.ids.shape[1]
        behind = partial(nn.functional.pad, pad=(0, new))
        valid, visual = behind(self.valid, value=True), behind(self.visual, value=False)
        steps = self.method().steps(self.host.geometry())
        layer = next((step.layer for step in steps if step.stage == "prefill" and step.action == "remove"), 0)
        frozen = tuple(step.layer for step in steps if step.action == "freeze")
        patches, into = None, None
        if any(step.stage == "tower" for step in steps):
            patches = torch.zeros(len(ids), SIDE * SIDE, dtype=torch.bool)
            for row, image in enumerate(self.report.images):
                patches[row, image.retained] = True
        if any(step.action == "merge" for step in steps):
            into = torch.arange(ids.shape[1]).expand_as(ids).clone()
            for row, image in enumerate(self.report.images):  # one view: patch ids are ranks
                places = visual[row].nonzero()[:, 0]
                into[row, places] = places[torch.tensor(image.assignment)]
        hidden = Hidden(behind(self.keep, value=True), layer, into, frozen, visual, patches, 1)
        inputs = {"input_ids": ids, "attention_mask": valid.long(), **self.images}
        return masked_logits(self.model, self.host.language.blocks, self.host.tower.blocks, inputs, hidden)


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
