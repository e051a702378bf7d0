"""Families of videos: where a test asks for an image, there is a video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.testing.families import IMAGE, PIXELS, SIDE, VIDEO, Clip, LlavaNext, Visual, marks
from vtr.testing.onevision import LlavaNextVideo, OneVision
from vtr.testing.qwen import END, START, QwenVL

FRAMES, HALF, STAMP = 3, SIDE // 2, (8, 9)
UNREAD = {"suppress_tokens": [0, IMAGE, VIDEO]}
"""An answer that held such a token could not be read again."""


class Pooled(LlavaNext):
    """What LLaVA-NeXT-Video and LLaVA-OneVision share: frames of 3 x 3 tokens, made of 6 x 6 patches, and as many in every video."""

    newline: ClassVar[bool] = False
    mixed: bool
    """Whether images stay images, beside the videos that a test asks for."""

    def videos(self, mixed: bool) -> None:
        """Sets what follows from `mixed`."""
        self.mixed, self.anyres, self.generation = mixed, mixed, UNREAD  # type: ignore[misc]
        self.refused = dict.fromkeys(("O9", "O9b"), "vision tower")  # type: ignore[misc]

    def shown(self, shot: Visual) -> Visual:
        return shot if self.mixed or isinstance(shot, Clip) else Clip(frames=FRAMES)

    def grids(self, shot: Visual) -> list[tuple[int, int]]:
        return [(HALF, HALF)] * shot.frames if isinstance(shot, Clip) else super().grids(shot)

    def packing(self, model: Callable[[], Any], shot: Visual) -> Tensor:
        if not isinstance(shot, Clip):
            return super().packing(model, shot)
        cells = torch.cartesian_prod(torch.arange(shot.frames), torch.arange(HALF), torch.arange(HALF), torch.tensor([0]))
        return torch.cat([cells, torch.tensor([[-1, -1, -1, 1]])]) if self.newline else cells

    def pixels(self, shot: Visual, random: torch.Generator) -> Tensor:
        if not isinstance(shot, Clip):
            return super().pixels(shot, random)
        return torch.randn(1, shot.frames, 3, PIXELS, PIXELS, generator=random)

    def beside(self, shots: list[Visual]) -> dict[str, Tensor]:
        return {} if isinstance(shots[0], Clip) else super().beside(shots)


class NextClips(Pooled, LlavaNextVideo):
    """LLaVA-NeXT-Video with videos."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.videos(mixed)


class OneVisionClips(Pooled, OneVision):
    """LLaVA-OneVision with videos, each of which a newline ends."""

    newline = True

    def __init__(self, mixed: bool = False) -> None:
        OneVision.__init__(self)
        self.videos(mixed)

    def projected(self, model: Any, features: Tensor) -> Tensor:
        """Features of videos are pooled behind the projector, and so a step in front of it sees them there."""
        return features if features.shape[-1] == model.config.text_config.hidden_size else super().projected(model, features)


class QwenClips(QwenVL):
    """Qwen-VL with videos of two to four frames; Qwen3-VL has the time of each frame in front of it."""

    def __init__(self, model_type: str, mixed: bool = False) -> None:
        super().__init__(model_type)
        self.mixed = mixed

    def shown(self, shot: Visual) -> Visual:
        return shot if self.mixed or isinstance(shot, Clip) else Clip(shot.height, shot.width, 2 + shot.width % 3)

    def placeholders(self, shot: Visual, count: int) -> list[int]:
        if not (isinstance(shot, Clip) and self.model_type.startswith("qwen3")):
            return marks(shot, count)
        joined: list[int] = []
        for rows, cols in self.grids(shot):
            joined += [*([END, *STAMP, START] if joined else []), *marks(shot, rows * cols)]
        return joined
