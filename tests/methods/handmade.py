"""Views made by hand: images of any crop grid with padded canvases, ragged rows and text; and steps run on them by the engine's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import vtr
from tests.tiny_models import Batch, model_of, packing, views_of
from vtr.engine.images import Images
from vtr.engine.selections import chosen_mask
from vtr.engine.tokens import Spots, Tokens
from vtr.engine.views import by_image, remember
from vtr.engine.views import make_view as make_engine_view
from vtr.hosts._layout import Layout
from vtr.ops.blocks import all_at_once
from vtr.ops.canvas import canvas_cells, valid_region
from vtr.ops.gather import compaction, take
from vtr.types import Geometry, Method, Selection, Signal, Step, Text, View

GRID = (6, 6)
LLAVA = Geometry(
    host="llava", tower_layers=6, feature_layer=4, prefix_tokens=1, has_cls=True, patch_grid=GRID, llm_layers=8, most_tokens=36
)
NEXT = replace(LLAVA, host="llava_next", most_tokens=36 * 10, anyres=True)
SIGLIP = replace(LLAVA, has_cls=False, prefix_tokens=0)
Image = tuple[tuple[int, int], tuple[int, int]]
"""Crop grid and size in pixels."""
HELD = ("tokens", "real", "keep", "row", "cells", "patch", "sizes", "checksum", "text", "signals")
ONE: Image = ((0, 0), (48, 48))
IMAGES: list[Image] = [((2, 2), (90, 96)), ONE, ((1, 3), (40, 144)), ((3, 1), (144, 20))]


def cells_of(image: Image, grid: tuple[int, int] = GRID) -> Tensor:
    """Valid cells `(N, 3)` of an image: thumbnail, then the canvas row by row."""
    crop_grid, size = image
    whole = torch.cartesian_prod(torch.arange(crop_grid[0] * crop_grid[1] + 1), torch.arange(grid[0]), torch.arange(grid[1]))
    if crop_grid == (0, 0):
        return whole
    thumbnail, crops = whole[: grid[0] * grid[1]], whole[grid[0] * grid[1] :]
    row, col = (c[0] for c in canvas_cells(crops[None], torch.tensor([crop_grid]), grid))
    top, bottom, left, right = valid_region(size, crop_grid, grid)
    inside = (row >= top) & (row < bottom) & (col >= left) & (col < right)
    return torch.cat([thumbnail, crops[inside][(row * 1000 + col)[inside].argsort()]])


def make_view(
    images: Sequence[Image] = IMAGES,
    keep: int | Sequence[int] = 9,
    *,
    rows: Sequence[int] | None = None,
    width: int = 16,
    text: Sequence[int] = (),
    filler: int = 0,
    grid: tuple[int, int] | Sequence[tuple[int, int]] = GRID,
    behind: bool = False,
    seed: int = 0,
) -> View:
    """A View of images with random tokens; every image and every text has its own random stream, so that batches can be compared.

    Args:
        images: one group each.
        keep: for all groups, or one each.
        rows: prompt row of each group; default one row per group.
        text: text tokens of each group's row, the first of them system text; default 5 for all.
        filler: columns without a token that are added in front of all rows, on top of what ragged rows need.
        grid: of the views of all groups, or one for each.
        behind: rows are filled at the end instead.
    """
    grids = [grid] * len(images) if isinstance(grid[0], int) else list(grid)
    cells = [cells_of(image, own) for image, own in zip(images, grids, strict=True)]
    sides = torch.tensor(grids)[:, None]
    n = max(map(len, cells)) + filler
    text = text or [5] * len(images)
    m = max(text)
    where = torch.zeros(len(images), n, 3, dtype=torch.int64)
    tokens, real = torch.full((len(images), n, width), 7.0), torch.zeros(len(images), n, dtype=torch.bool)
    words, said = torch.full((len(images), m, width), -5.0), torch.zeros(len(images), m, dtype=torch.bool)
    for g, cell in enumerate(cells):
        random = torch.Generator().manual_seed(seed * 1000 + sum(images[g][1]))
        place = slice(len(cell)) if behind else slice(n - len(cell), n)
        where[g, place], real[g, place] = cell, True
        tokens[g, place] = torch.randn(len(cell), width, generator=random)
        said[g, : text[g]] = True
        words[g, : text[g]] = torch.randn(text[g], width, generator=random)
    counts = [len(cell) for cell in cells]
    kept = [min(k, c) for k, c in zip([keep] * len(counts) if isinstance(keep, int) else keep, counts)]
    return View(
        tokens=tokens,
        real=real,
        keep=torch.tensor(kept),
        counts=counts,
        keeps=kept,
        most=max(kept),
        row=torch.tensor(range(len(images)) if rows is None else rows),
        cells=where,
        patch=(where[..., 0] * sides[..., 0] + where[..., 1]) * sides[..., 1] + where[..., 2],
        grids=[[own] * (rows * cols + 1) for own, ((rows, cols), _) in zip(grids, images, strict=True)],
        crop_grids=[image[0] for image in images],
        image_sizes=[image[1] for image in images],
        sizes=torch.ones(len(images), n),
        checksum=torch.tensor([sum(image[1]) for image in images]),
        text=Text(words, said, said & (torch.arange(m) > 0)),
        final_norm=lambda x: 3 * x / x.square().mean(-1, keepdim=True).sqrt(),
    )


def chosen(view: View, mask: Tensor) -> list[Tensor]:
    """Which of its real tokens each group keeps, as places among them, so that padding does not matter."""
    return [mask[g][view.real[g]].nonzero().flatten() for g in range(len(mask))]


def run(method: Method, geometry: Geometry, view: View, signal: Callable[[Signal, View], Any], stage: str = "tower") -> list[View]:
    """Runs the steps of a stage on the engine's own tokens, with made-up signals. Returns the View behind every step.

    Views, per-token notes and removals are the engine's; the budget of every counted step is the keep count of `view`.
    """
    lines = torch.full((view.real.shape[1],), -1)
    layouts = [
        Layout(tuple(view.grids[g]), view.patch[g][real], lines[: int(real.sum())], view.crop_grids[g], view.image_sizes[g])
        for g, real in enumerate(view.real)
    ]
    images = Images.of(layouts, view.tokens.device)
    images.checksum = view.checksum
    gid = torch.where(view.real, torch.arange(len(layouts))[:, None] * images.slots + view.patch, -1)
    columns = torch.arange(view.real.shape[1]).expand(view.real.shape)
    tokens, hidden, groups, after = Tokens(columns, view.real, gid, images), view.tokens, by_image(layouts, images.slots), []

    def seen(step: Step, spots: Spots) -> View:
        counts = tokens.valid.sum(1).tolist()
        counted = step.counted or step.action == "observe"
        keep = [min(k, n) for k, n in zip(view.keeps, counts, strict=True)] if counted else counts
        return make_engine_view(hidden, spots, images, groups, counts, keep, 0, step.layer)

    def located() -> Spots:
        return tokens.locate(groups, int(tokens.valid.sum(1).max()))

    for step in method.steps(geometry):
        if step.stage != stage:
            continue
        assert step.select is not None
        spots = located()
        now = seen(step, spots)
        now.text, now.final_norm = view.text, view.final_norm
        now.signals = {need: signal(need, now) for need in step.needs}
        answer = step.select(now)
        remember(now, spots, images, 0)
        if step.action == "observe":
            assert answer is None
        else:
            assert isinstance(answer, Selection) and answer.keep is not None
            assert not (answer.keep & ~now.real).any()
            if step.counted:
                assert torch.equal(answer.keep.sum(1), now.keep)
            hidden, _ = tokens.select(hidden, now, spots, answer, answer.keep, lambda keep: (keep & tokens.valid, None))
        after.append(seen(step, located()))
    return after


def shortened(view: View, keep: Tensor) -> View:
    """Returns the View with only the kept tokens, right aligned."""
    index, real = compaction(keep)
    fields = {name: take(getattr(view, name), index) for name in ("tokens", "cells", "patch", "sizes")}
    notes = {name: take(note, index) for name, note in view.per_token.items()}
    return replace(view, **fields, real=real, counts=real.sum(1).tolist(), per_token=notes)


def select_without_sync(step: Step, view: View) -> None:
    """Runs a selection on tensors without values, where everything that would wait for a device (`.item()`, boolean indexing) raises."""
    with all_at_once(), FakeTensorMode() as mode:

        def empty(value: Any) -> Any:
            return tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, value)

        view = replace(
            view, per_token={}, memory=empty(view.memory), **{f.name: empty(getattr(view, f.name)) for f in fields(view) if f.name in HELD}
        )
        assert step.select is not None
        answer = step.select(view)
        if answer is not None:
            assert chosen_mask(answer, view).shape == view.real.shape


@dataclass(frozen=True)
class Seen:
    """One image of a batch: its prompt row, the sequence positions of its visual tokens, their patch ids, its views' pixels and its size."""

    row: int
    positions: Tensor
    patch: Tensor
    pixels: Tensor
    image: Image


def images_of(batch: Batch) -> list[Seen]:
    """Every image of a batch of tiny_models, in order."""
    found: list[Seen] = []
    for row, shots in enumerate(batch.shots):
        left = batch.visual[row].nonzero()[:, 0]
        for shot in shots:
            cell = packing(batch.kind, shot)
            span, left = left[: len(cell)], left[len(cell) :]
            cell, span = cell[cell[:, 3] == 0], span[cell[:, 3] == 0]
            views = views_of(batch.kind, shot)
            grid = {1: (0, 0), 3: (2, 1) if shot.height > shot.width else (1, 2), 5: (2, 2)}[views]
            pixels = batch.inputs["pixel_values"][len(found)].view(-1, 3, *batch.inputs["pixel_values"].shape[-2:])[:views]
            patch = (cell[:, 0] * GRID[0] + cell[:, 1]) * GRID[1] + cell[:, 2]
            found.append(Seen(row, span, patch, pixels, (grid, (shot.height, shot.width))))
    return found


@torch.no_grad()
def retained(batch: Batch, method: Method) -> list[list[int]]:
    """Patch ids that each image of a batch keeps on the tiny model of its kind."""
    model = model_of(batch.kind, dtype=batch.inputs["pixel_values"].dtype)
    with vtr.reduced(model, method) as reduction:
        model(**batch.inputs)
        return [image["retained"] for image in reduction.report().to_dict()["images"]]


def tower_layers(batch: Batch, pixels: Tensor) -> tuple[Tensor, Any]:
    """What enters the first layer of the CLIP tower for these views, and the layers."""
    tower = model_of(batch.kind, dtype=pixels.dtype).model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    return tower.pre_layrnorm(tower.embeddings(pixels)), tower.encoder.layers


def projections(layer: Any, hidden: Tensor) -> list[Tensor]:
    """q, k, v `(V, S, H, d)` of a CLIP layer."""
    normed, attention = layer.layer_norm1(hidden), layer.self_attn
    return [getattr(attention, f"{n}_proj")(normed).unflatten(-1, (attention.num_heads, -1)) for n in "qkv"]


def last_cls_logits(batch: Batch, pixels: Tensor) -> Tensor:
    """Scaled CLS logits `(V, H, 1 + N)` of the last layer of the CLIP tower over CLS and patches."""
    hidden, layers = tower_layers(batch, pixels)
    for layer in layers[:-1]:
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    query, key, _ = projections(layers[-1], hidden)
    return torch.einsum("vhd,vnhd->vhn", query[:, 0], key) * query.shape[-1] ** -0.5


@torch.no_grad()
def embeddings(batch: Batch) -> Tensor:
    """What enters the LLM of the unreduced tiny model, `(B, S, D)`."""
    model, seen = model_of(batch.kind, dtype=batch.inputs["pixel_values"].dtype), []
    handle = model.model.language_model.register_forward_pre_hook(lambda _m, _a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    try:
        model(**batch.inputs)
    finally:
        handle.remove()
    return seen[0]
