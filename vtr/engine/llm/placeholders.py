"""Finds which image every placeholder of a call belongs to, and which of its tokens a method may read; functions on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.engine.llm.entry import Encoded, Entry
from vtr.hosts._layout import Kind, Layout
from vtr.hosts._protocol import Host, one_video
from vtr.types import VtrError


def readable(entry: Entry, text: Tensor, valid: Tensor, column: Tensor, first: Tensor) -> Tensor:
    """Returns which tokens of a call a method may read `(B, q)` bool: the prompt, without guesses of a draft and labelled answers.

    A row whose whole text behind its first visual token (column `first (B, 1)`) is labelled has no other instruction: there it counts.
    """
    read = valid if entry.prompt is None else valid & (column < entry.prompt)
    if entry.answers is not None:
        unanswered = read & ~entry.answers
        asked = (unanswered & text & (column > first)).any(1, keepdim=True)
        read = torch.where(asked, unanswered, read)
    return torch.where((read & text).any(1, keepdim=True), read, valid)


def layouts_of(host: Host, kind: Kind, encoded: Encoded | None, placeholders: list[int]) -> list[Layout]:
    """Returns the layouts of the visuals of a kind in a call, those of the tower or, where every image has the same, that one.

    Raises:
        VtrError: they cannot be known.
    """
    if encoded is not None:
        return encoded.images.layouts
    if host.as_frames and host.default_layout is not None:
        return framed(host, placeholders, [host.default_layout] * (sum(placeholders) // host.default_layout.length))
    if host.default_layout is None or kind == "video":
        raise VtrError(
            f"{host.name}: the sizes of the {kind}s of these features are unknown; pass pixel values, or encode the {kind}s inside the reduction"
        )
    if any(count % host.default_layout.length for count in placeholders):
        raise VtrError(_mismatch(placeholders, [host.default_layout.length]))
    return [host.default_layout] * (sum(placeholders) // host.default_layout.length)


def framed(host: Host, placeholders: list[int], layouts: list[Layout]) -> list[Layout]:
    """Returns the images of every prompt row as one video.

    Args:
        host: for the message.
        placeholders: of every row.
        layouts: one per image.

    Raises:
        VtrError: an image has several views, or rows do not hold whole images.
    """
    _, rows, _, repeat = rows_of_images(placeholders, layouts)
    first = [row for row in rows if row % repeat == 0]
    return [one_video(host, [layout for layout, own in zip(layouts, first, strict=True) if own == row]) for row in dict.fromkeys(first)]


def rows_of_images(placeholders: list[int], layouts: list[Layout]) -> tuple[list[int], list[int], list[int], int]:
    """Returns source image, prompt row and number in the row of every image the LLM sees, and how often rows repeat (beams)."""
    lengths = [layout.length for layout in layouts]
    repeat = sum(placeholders) // max(sum(lengths), 1)
    rows = placeholders[::repeat] if repeat else []
    if not repeat or [p for p in rows for _ in range(repeat)] != placeholders:
        raise VtrError(_mismatch(placeholders, lengths))
    source: list[int] = []
    row: list[int] = []
    number: list[int] = []
    image = 0
    for r, wanted in enumerate(rows):
        first, got = image, 0
        while got < wanted and image < len(lengths):
            got += lengths[image]
            image += 1
        if got != wanted:
            raise VtrError(_mismatch(placeholders, lengths))
        for beam in range(repeat):
            source += range(first, image)
            row += [r * repeat + beam] * (image - first)
            number += range(image - first)
    if image != len(lengths):
        raise VtrError(_mismatch(placeholders, lengths))
    return source, row, number, repeat


def _mismatch(placeholders: list[int], lengths: list[int]) -> str:
    return (
        f"vtr: rows must hold whole images in order, got rows with {placeholders} placeholders for images of {lengths} tokens; pass every image "
        "of the prompt once, and no prefill_chunk_size (a chunk would see part of an image)"
    )
