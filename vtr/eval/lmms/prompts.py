"""From a request of lmms-eval to a prompt: the chat template filled in, and its images. Frames of videos become images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtr.data.pictures import as_shown
from vtr.eval.run.asking import MARK, build_content, fill_template, open_image
from vtr.types import VtrError

_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the processor.

    Args:
        text: chat template filled in, with a placeholder for every image.
        images: RGB, in order.
    """

    text: str
    images: tuple[Image.Image, ...] = ()


def chat_prompt(processor: Any, messages: Sequence[Mapping[str, Any]], frames: int) -> Prompt:
    """Returns a prompt from messages.

    Args:
        processor: of the model.
        messages: each a `role` and `content` with parts of type `text`, `image` or `video` as lmms-eval's chat models get them.
        frames: most frames of a video.

    Raises:
        VtrError: a part that is neither, or cannot be read.
    """
    turns, images = [], []
    for message in messages:
        content: list[dict[str, str]] = []
        parts = message["content"] if not isinstance(message["content"], str) else [{"type": "text", "text": message["content"]}]
        for part in parts:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            else:
                read = read_visual(part["url"], frames, part["type"])
                content += [{"type": "image"}] * len(read)
                images += read
        text = "".join(part["text"] for part in content if part["type"] == "text")
        if MARK in text:  # the text itself says where images go
            content = build_content(text, sum(part["type"] == "image" for part in content))
        turns.append({"role": message["role"], "content": content})
    return Prompt(fill_template(processor, turns), tuple(images))


def plain_prompt(processor: Any, text: str, visuals: Sequence[Any] | None, frames: int) -> Prompt:
    """Returns a prompt from a text and the visuals that belong to it, as lmms-eval's simple models get them."""
    images = [image for visual in visuals or () for image in read_visual(visual, frames)]
    return Prompt(fill_template(processor, [{"role": "user", "content": build_content(text, len(images))}]), tuple(images))


def read_visual(visual: Any, frames: int, kind: str | None = None) -> list[Image.Image]:
    """Returns one image, or the frames of a video, as RGB images.

    Args:
        visual: a PIL image, the path of an image or a video, or frames as a list of images or `(T, H, W, 3)` uint8.
        frames: most frames, spread evenly over the video.
        kind: `image` or `video` where that is known.

    Raises:
        VtrError: none of these.
    """
    if isinstance(visual, Image.Image):
        return [as_shown(visual)]
    if isinstance(visual, Mapping) and not {"video_start", "video_end"} & set(visual):
        visual, kind = visual.get("url") or visual.get("path"), visual.get("type", kind)
    if isinstance(visual, str | Path) and kind != "audio":
        image = kind == "image" or (kind is None and str(visual).lower().endswith(_IMAGE_FILES))
        return [open_image(visual)] if image else _evenly(_decode(str(visual), frames), frames)
    if isinstance(visual, np.ndarray) and visual.ndim == 4 and visual.dtype == np.uint8:
        return _evenly([Image.fromarray(frame) for frame in visual], frames)
    if isinstance(visual, list | tuple) and visual and all(isinstance(frame, Image.Image) for frame in visual):
        return _evenly([as_shown(frame) for frame in visual], frames)
    raise VtrError(
        f"vtr: shows images and whole videos to the model, got {kind or 'a visual'} as {type(visual).__name__}; choose another task"
    )


def _decode(path: str, frames: int) -> list[Image.Image]:
    if not Path(path).is_file():
        raise VtrError(f"vtr: no video file {path!r}; download the videos of this task first")
    from lmms_eval.models.model_utils.load_video import read_video

    try:
        return [Image.fromarray(frame) for frame in read_video(path, num_frm=frames)]
    except (OSError, ValueError, IndexError) as error:
        raise VtrError(f"vtr: the video {path!r} cannot be decoded ({error})") from error


def _evenly(images: Sequence[Image.Image], most: int) -> list[Image.Image]:
    """Returns at most so many, the first and the last among them."""
    if len(images) <= most:
        return list(images)
    return [images[index] for index in np.linspace(0, len(images) - 1, most).round().astype(int)]
