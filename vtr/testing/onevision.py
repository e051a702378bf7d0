"""Small models of the AnyRes families beside LLaVA-NeXT: LLaVA-OneVision and LLaVA-NeXT-Video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtr.testing.families import PINPOINTS, PIXELS, SIDE, VIDEO, LlavaNext, Visual


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video with images."""

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

        ids = dict(video_token_id=VIDEO, image_grid_pinpoints=PINPOINTS)
        return LlavaNextVideoForConditionalGeneration, LlavaNextVideoConfig(**self._settings(changes), **ids)


class OneVision(LlavaNext):
    """LLaVA-OneVision with images; more crops than `limit` are interpolated."""

    def __init__(self, limit: int = 9) -> None:
        super().__init__(siglip=True, backbone="qwen2")
        self.limit = limit
        if limit < 4:
            self.refused = dict.fromkeys(("O9", "O9b"), "vision tower")  # type: ignore[misc]

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

        ids = dict(video_token_id=VIDEO, image_grid_pinpoints=PINPOINTS, vision_aspect_ratio=f"anyres_max_{self.limit}")
        return LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig(**self._settings(changes), **ids)

    def packing(self, model: Callable[[], Any], shot: Visual) -> Tensor:
        """Runs the family's own packing code on the coordinates of the patches; a canvas that it interpolates is written down by hand."""
        coordinates = torch.cartesian_prod(torch.arange(self.views(shot)), torch.arange(SIDE), torch.arange(SIDE))
        features = torch.nn.functional.pad(coordinates, (0, 1)).float().view(-1, SIDE * SIDE, 4)
        ratio = f"anyres_max_{self.limit}"
        packed, _ = model().model.pack_image_features([features], torch.tensor([shot]), torch.tensor([-1.0, -1, -1, 1]), ratio)
        if len(self.grids(shot)) == self.views(shot):
            return packed[0].long()
        thumbnail, (rows, cols) = packed[0][: SIDE * SIDE], self.grids(shot)[1]
        canvas = torch.cartesian_prod(torch.tensor([1]), torch.arange(rows), torch.arange(cols + 1), torch.tensor([0]))
        canvas[canvas[:, 2] == cols] = torch.tensor([-1, -1, -1, 1])
        assert len(packed[0]) == len(thumbnail) + len(canvas)
        return torch.cat([thumbnail.long(), canvas])

    def views(self, shot: Visual) -> int:
        """Returns how many inputs of the tower an image becomes."""
        return len(super().grids(shot))

    def pixels(self, shot: Visual, random: torch.Generator) -> Tensor:
        pixels = torch.zeros(1, 5, 3, PIXELS, PIXELS)
        pixels[0, : self.views(shot)] = torch.randn(self.views(shot), 3, PIXELS, PIXELS, generator=random)
        return pixels

    def grids(self, shot: Visual) -> list[tuple[int, int]]:
        """Thumbnail and crops, or thumbnail and interpolated canvas."""
        from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

        views = super().grids(shot)
        shape = get_anyres_image_grid_shape(list(shot), PINPOINTS, PIXELS)
        rows, cols = unpad_image(torch.zeros(1, shape[0] * SIDE, shape[1] * SIDE), list(shot)).shape[1:]
        over = (rows * cols / (self.limit * SIDE * SIDE)) ** 0.5
        return views if over <= 1.1 else [views[0], (int(rows // over), int(cols // over))]
