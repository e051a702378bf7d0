"""The beginning of a call of the LLM with visual tokens: whose they are, and which text a method may read."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.engine.images import Images
from vtr.engine.llm.call import Call, Encoded
from vtr.engine.tokens import Sequence
from vtr.hosts._host import Host, ImageLayout, numbered
from vtr.types import VtrError


def begin(host: Host, call: Call, valid: Tensor, placeholders: list[int]) -> None:
    """Sets up the tokens of a call from its placeholders and what the tower left.

    Args:
        host: the model.
        call: with `visual (B, q)` known.
        valid: `(B, q)` bool, real tokens.
        placeholders: visual positions of every row, newline tokens included.

    Raises:
        VtrError: the placeholders of a row are not whole images.
    """
    device = valid.device
    visual = call.visual
    assert visual is not None
    layouts = _layouts(host, call.encoded, placeholders)
    source, row, number, repeat = _rows_of_images(placeholders, layouts)
    call.expand = max(call.expand, repeat)
    encoded = call.encoded.images if call.encoded is not None else Images.of(layouts, device)
    call.images = images = encoded.select(source, row, number, device)
    call.counts = [layout.tokens for layout in images.layouts]
    call.newlines = [layout.length - layout.tokens for layout in images.layouts]
    call.lines = max(int(layout.line.max()) + 1 for layout in images.layouts) or 1
    tables = torch.full((2, len(placeholders), max(placeholders)), -1)
    filled = [0] * len(placeholders)
    for image, layout in enumerate(images.layouts):  # host side: copies cached layouts into one table
        start, r = filled[row[image]], row[image]
        filled[r] = stop = start + layout.length
        tables[0, r, start:stop] = numbered(layout.patch, image, images.slots)
        tables[1, r, start:stop] = torch.where(layout.patch < 0, numbered(layout.line, image, call.lines), -1)
    tables = tables.to(device, non_blocking=True)
    rank = (visual.cumsum(1) - 1).clamp_min(0)
    gid_of, call.line_of = (torch.where(visual, t.gather(1, rank), -1) for t in tables)
    column = torch.arange(valid.shape[1], device=device).expand_as(valid)
    call.sequence = Sequence(column, valid, gid_of)
    call.text = valid & ~visual
    first = torch.where(visual, column, valid.shape[1]).amin(1, keepdim=True)
    call.read = _readable(call, valid, column, first)
    text = call.text & call.read
    after = text & (column > first)
    call.instruction = torch.where(after.any(1, keepdim=True), after, text)


def _readable(call: Call, valid: Tensor, column: Tensor, first: Tensor) -> Tensor:
    """Returns which tokens of a call a method may read `(B, q)` bool: the prompt, without guesses of a draft and labelled answers.

    A row whose whole text behind its first visual token (column `first (B, 1)`) is labelled has no other instruction: there it counts.
    """
    assert call.text is not None
    read = valid if call.prompt is None else valid & (column < call.prompt)
    if call.answers is not None:
        unanswered = read & ~call.answers
        asked = (unanswered & call.text & (column > first)).any(1, keepdim=True)
        read = torch.where(asked, unanswered, read)
    return torch.where((read & call.text).any(1, keepdim=True), read, valid)


def _layouts(host: Host, encoded: Encoded | None, placeholders: list[int]) -> list[ImageLayout]:
    if encoded is not None:
        return encoded.images.layouts
    if host.default_layout is None:
        raise VtrError(
            f"{host.name}: the image sizes of these features are unknown; pass pixel_values, or encode the images inside the reduction"
        )
    if any(count % host.default_layout.length for count in placeholders):
        raise VtrError(_mismatch(placeholders, [host.default_layout.length]))
    return [host.default_layout] * (sum(placeholders) // host.default_layout.length)


def _rows_of_images(placeholders: list[int], layouts: list[ImageLayout]) -> tuple[list[int], list[int], list[int], int]:
    """Source image, prompt row and number in the row of every image the LLM sees, and how often rows repeat (beams)."""
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
