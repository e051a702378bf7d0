"""From a request of lmms-eval to a prompt: the chat template filled in, its images and its videos.

Where the model has no videos their frames become images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtr.data.frames import PICTURES, Video, read_video, video_of
from vtr.data.pictures import as_shown, open_image
from vtr.eval.run.asking import MARK, VIDEO_MARK, build_content, fill_template
from vtr.types import VtrError


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the processor.

    Args:
        text: chat template filled in, with a placeholder for every image and video.
        images: RGB, in order.
        videos: in order.
        question: what the user said, as text.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()
    question: str = ""


@dataclass(frozen=True)
class Shown:
    """How a model is shown videos.

    Args:
        frames: most frames of one.
        whole: as a video; else every frame is an image.
    """

    frames: int
    whole: bool = False

    def read(self, visual: Any, kind: str | None = None) -> list[Image.Image | Video]:
        """Returns what the model gets of a visual, see `read_visual`."""
        read = read_visual(visual, self.frames, kind)
        return [read] if isinstance(read, Image.Image) or self.whole else list(read.frames)


def chat_prompt(processor: Any, messages: Sequence[Mapping[str, Any]], shown: Shown) -> Prompt:
    """Returns a prompt from messages.

    Args:
        processor: of the model.
        messages: each a `role` and `content` with parts of type `text`, `image` or `video` as lmms-eval's chat models get them.
        shown: how it is shown videos.

    Raises:
        ValueError, VtrError: see `read_visual`.
    """
    turns: list[dict[str, Any]] = []
    read: list[Image.Image | Video] = []
    for message in messages:
        content: list[dict[str, str]] = []
        own: list[Image.Image | Video] = []
        parts = message["content"] if not isinstance(message["content"], str) else [{"type": "text", "text": message["content"]}]
        for part in parts:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            else:
                new = shown.read(part["url"], part["type"])
                content += [{"type": _kind(one)} for one in new]
                own += new
        text = "".join(part["text"] for part in content if part["type"] == "text")
        if MARK in text or VIDEO_MARK in text:  # the text itself says where they go
            content = _marked(text, own)
        turns.append({"role": message["role"], "content": content})
        read += own
    said = [part["text"] for turn in turns if turn["role"] == "user" for part in turn["content"] if part["type"] == "text"]
    return _prompt(fill_template(processor, turns), read, "\n".join(said))


def plain_prompt(processor: Any, text: str, visuals: Sequence[Any] | None, shown: Shown) -> Prompt:
    """Returns a prompt from a text and the visuals that belong to it, as lmms-eval's simple models get them."""
    read = [one for visual in visuals or () for one in shown.read(visual)]
    return _prompt(fill_template(processor, [{"role": "user", "content": _marked(text, read)}]), read, text)


def _kind(one: Image.Image | Video) -> str:
    return "video" if isinstance(one, Video) else "image"


def _marked(text: str, read: Sequence[Image.Image | Video]) -> list[dict[str, str]]:
    kinds = [_kind(one) for one in read]
    return build_content(text, kinds.count("image"), kinds.count("video"))


def _prompt(text: str, read: Sequence[Image.Image | Video], question: str) -> Prompt:
    videos = tuple(one for one in read if isinstance(one, Video))
    return Prompt(text, tuple(one for one in read if isinstance(one, Image.Image)), videos, question)


def read_visual(visual: Any, frames: int, kind: str | None = None) -> Image.Image | Video:
    """Returns one image as RGB, or the frames of a video.

    Args:
        visual: a PIL image, the path of an image or a video (a folder of frames, too), or frames as a list of images or `(T, H, W, 3)` uint8.
        frames: most frames, spread evenly over the video.
        kind: `image` or `video` where that is known.

    Raises:
        ValueError: a file that is not there, or damaged.
        VtrError: none of these, or a video file and PyAV is not installed.
    """
    if isinstance(visual, Image.Image):
        return as_shown(visual)
    if isinstance(visual, Mapping) and not {"video_start", "video_end"} & set(visual):
        visual, kind = visual.get("url") or visual.get("path"), visual.get("type", kind)
    if isinstance(visual, str | Path) and kind != "audio":
        image = kind == "image" or (kind is None and str(visual).lower().endswith(PICTURES))
        return open_image(visual) if image else read_video(visual, frames)
    if isinstance(visual, np.ndarray) and visual.ndim == 4 and visual.dtype == np.uint8 and len(visual):
        return video_of([Image.fromarray(frame) for frame in visual], frames)
    if isinstance(visual, list | tuple) and visual and all(isinstance(frame, Image.Image) for frame in visual):
        return video_of(visual, frames)
    raise VtrError(
        f"vtr: shows images and whole videos to the model, got {kind or 'a visual'} as {type(visual).__name__}; choose another task"
    )
