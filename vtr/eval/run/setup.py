"""How a model is loaded and asked, and what is known of it without weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image

from vtr.data.frames import Video
from vtr.eval.run.asking import MARK, VIDEO_MARK, check_marks, seen_of
from vtr.hosts._protocol import Host, host_of, with_frames
from vtr.models.loading import find_checkpoint, load_config, recipe_of, stored_checkpoint
from vtr.models.pixels import OWN_LIMITS, PixelLimits, check_limits
from vtr.planning import Visuals
from vtr.types import VtrError

Seen = tuple[list[Image.Image], list[Video]]
"""The images and the videos of a prompt."""


@dataclass(frozen=True)
class Setup:
    """How a model is loaded and asked; arguments as for `load_model`, `Runner` and, for `visuals`, `shown_as`. `frame_scores` is the name of the
    model that scores frames, for methods that read that; it is loaded as the model is."""

    model: str
    device: str | None = None
    dtype: str = "auto"
    attention: str = "sdpa"
    batch_size: int = 16
    share_tower: bool = False
    pixels: PixelLimits = OWN_LIMITS
    visuals: Visuals | None = None
    frame_scores: str | None = None


@cache
def sketch(setup: Setup) -> Any:
    """The model of a setup without weights.

    Raises:
        ValueError: unknown model, or limits of pixels that its processor does not have.
        VtrError: its config cannot be read, or not be built with this attention backend.
    """
    checkpoint = find_checkpoint(setup.model)
    recipe = recipe_of(setup.model, checkpoint)
    from transformers import AutoConfig, AutoModelForImageTextToText

    if checkpoint.folder is None and recipe is not None and recipe.config is not None:
        config = AutoConfig.for_model(recipe.host, **recipe.config)
    else:
        config = load_config(stored_checkpoint(checkpoint) or checkpoint)

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, attn_implementation=setup.attention)
    except (ImportError, ValueError) as error:
        raise VtrError(f"{checkpoint.name}: cannot be built with attention={setup.attention!r} ({str(error).splitlines()[0]})") from None
    finally:
        logger.setLevel(level)
    check_limits(host_of(model), setup.pixels)
    return model


def shown_as(host: Host, videos: bool, visuals: Visuals | None = None) -> Host:
    """Returns the host as which a model is asked: one whose images are frames, where it takes images only and is asked about videos.

    Args:
        host: of the model.
        videos: it is asked about videos.
        visuals: `each` = a video is so many images; `prompt` = all images of a prompt are the frames of one video; None = `prompt` for a video
            on a model that takes images only, but `each` where every image has several views.

    Raises:
        VtrError: `prompt`, and the model takes videos.
    """
    if visuals is None:
        visuals = "prompt" if videos and not host.has_video and not host.anyres else "each"
    return with_frames(host) if visuals == "prompt" else host


def visuals_as(host: Host) -> Visuals:
    """Returns `visuals` of `vtr.reduced` for a host that `shown_as` returned."""
    return "prompt" if host.as_frames else "each"


def noted(host: Host, videos: bool) -> dict[str, str]:
    """Returns what a result says of how a model was shown videos: nothing where it takes videos, or saw none."""
    return {"visuals": visuals_as(host)} if videos and "video" not in host.encode else {}


def seen_by(host: Host, sample: Any) -> Seen:
    """Returns the images and the videos of a sample of a task as a model gets them.

    Args:
        host: from `shown_as`.
        sample: see `vtr.eval.tasks.Sample`.

    Raises:
        VtrError: see `given_to`.
    """
    if not host.as_frames:
        return seen_of(sample, whole="video" in host.encode)
    return given_to(host, "", *seen_of(sample, whole=True))[1]


def given_to(host: Host, question: str, images: Sequence[Image.Image], videos: Sequence[Video]) -> tuple[str, Seen]:
    """Returns question, images and videos as a model gets them: one that takes images only gets the frames of videos.

    Args:
        host: from `shown_as`.
        question: `<video>` in it becomes an `<image>` for every frame.
        images, videos: of the prompt, in order.

    Raises:
        ValueError: the question has another number of `<video>` than there are videos.
        VtrError: several videos, or images beside one, would become one video.
    """
    if not videos or "video" in host.encode:
        return question, (list(images), list(videos))
    if host.as_frames and (images or len(videos) > 1):
        raise VtrError(
            f"video: visuals='prompt' makes one video of all images of a prompt on {host.name!r}, got {len(videos)} video(s) and {len(images)} "
            "image(s); ask with visuals='each', about one video at a time, or use a model with videos such as llava-onevision-7b"
        )
    check_marks(question, VIDEO_MARK, len(videos))
    first, *rest = question.split(VIDEO_MARK)
    marked = first + "".join(MARK * len(video.frames) + text for video, text in zip(videos, rest, strict=False))
    frames = [frame for video in videos for frame in video.frames]
    return (marked if rest else question), ([*images, *frames], [])
