"""Expedit on models with attention windows, written out: second models with windows of k x k run the middle blocks.

Nothing here uses the hosts. The second model's shifts and masks are its own, its position tables are resized with torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests import windowed_models as models
from vtr.ops.clusters import cluster
from vtr.ops.reconstruct import reconstruct, reconstruction


def by_window(tokens: Tensor, window: int, side: int, tau: float, neighbours: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Clusters `(B, H, W, D)` window by window; returns the smaller grid and what restores a refined one."""
    height, width = tokens.shape[1:3]
    padded = F.pad(tokens, (0, 0, 0, -width % window, 0, -height % window))
    small = tokens.new_zeros(len(tokens), padded.shape[1] // window * side, padded.shape[2] // window * side, tokens.shape[3])
    weights = {}
    for row in range(padded.shape[1] // window):
        for col in range(padded.shape[2] // window):
            part = padded[:, row * window : (row + 1) * window, col * window : (col + 1) * window].flatten(1, 2)
            centres = cluster(part, (window, window), (side, side), tau=tau)
            weights[row, col] = reconstruction(part, centres, tau=tau, neighbours=neighbours)
            small[:, row * side : (row + 1) * side, col * side : (col + 1) * side] = centres.unflatten(1, (side, side))

    def restore(refined: Tensor) -> Tensor:
        full = torch.zeros_like(padded)
        for (row, col), weight in weights.items():
            part = refined[:, row * side : (row + 1) * side, col * side : (col + 1) * side].flatten(1, 2)
            whole = reconstruct(weight, part).unflatten(1, (window, window))
            full[:, row * window : (row + 1) * window, col * window : (col + 1) * window] = whole
        return full[:, :height, :width]

    return small, restore


def timm_swin(model: Any, pixels: Tensor, alpha: int, side: int, tau: float, neighbours: int) -> Tensor:
    """Class scores; `alpha` lies in the third stage."""
    stage, before = model.layers[2], alpha - 4
    hidden = stage.downsample(model.layers[1](model.layers[0](model.patch_embed(pixels))))
    for block in stage.blocks[:before]:
        hidden = block(hidden)
    small, restore = by_window(hidden, 4, side, tau, neighbours)
    for block in _smaller_timm(model, side, small).layers[2].blocks[before:]:
        small = block(small)
    return model.forward_head(model.norm(model.layers[3](restore(small))))


def _smaller_timm(model: Any, side: int, small: Tensor) -> Any:
    size = tuple(16 * n for n in small.shape[1:3])
    other = models.timm_swin(img_size=size, window_size=side)
    other.load_state_dict(
        {name: _table(value, side) if name.endswith("bias_table") else value for name, value in model.state_dict().items()}
    )
    return other


def hf_swin(model: Any, pixels: Tensor, alpha: int, side: int, tau: float, neighbours: int) -> Tensor:
    """Last hidden states of `SwinModel`."""
    hidden, grid = model.embeddings(pixels)
    stages, before = model.encoder.layers, alpha - 4
    for stage in stages[:2]:
        hidden = stage(hidden, grid)[0]
        grid = tuple((n + 1) // 2 for n in grid)
    for block in stages[2].blocks[:before]:
        hidden = block(hidden, grid)[0]
    small, restore = by_window(hidden.unflatten(1, grid), 4, side, tau, neighbours)
    other = models.hf_swin(window_size=side)
    other.load_state_dict(
        {name: _table(value, side) if name.endswith("bias_table") else value for name, value in model.state_dict().items()}
    )
    refined, shape = small.flatten(1, 2), tuple(small.shape[1:3])
    for block in other.encoder.layers[2].blocks[before:]:
        refined = block(refined, shape)[0]
    full = restore(refined.unflatten(1, shape)).flatten(1, 2)
    full = stages[2].downsample(full, grid)
    return model.layernorm(stages[3](full, tuple((n + 1) // 2 for n in grid))[0])


def timm_sam(model: Any, pixels: Tensor, alpha: int, side: int, tau: float, neighbours: int, taps: tuple[int, ...] = ()) -> list[Tensor]:
    """What the tapped blocks give, restored, and the output of the neck."""
    hidden = model.patch_embed(pixels)
    hidden = hidden + F.interpolate(model.pos_embed.permute(0, 3, 1, 2), hidden.shape[1:3], mode="bicubic", antialias=True).permute(
        0, 2, 3, 1
    )
    for block in model.blocks[:alpha]:
        hidden = block(hidden)
    small, restore = by_window(hidden, 4, side, tau, neighbours)
    other = models.timm_sam(img_size=tuple(8 * n for n in small.shape[1:3]), window_size=side)
    wanted = other.state_dict()
    state = {name: _line(value, len(wanted[name])) if "rel_pos" in name else value for name, value in model.state_dict().items()}
    other.load_state_dict({**state, "pos_embed": wanted["pos_embed"]})
    given = []
    for i, block in enumerate(other.blocks[alpha:], alpha):
        small = block(small)
        given += [restore(small).permute(0, 3, 1, 2)] if i in taps else []
    return [*given, model.neck(restore(small).permute(0, 3, 1, 2))]


def hf_sam(model: Any, pixels: Tensor, alpha: int, side: int, tau: float, neighbours: int) -> Tensor:
    """Image embeddings of `SamModel`."""
    encoder = model.vision_encoder
    hidden = encoder.patch_embed(pixels) + encoder.pos_embed
    for layer in encoder.layers[:alpha]:
        hidden = layer(hidden)
    small, restore = by_window(hidden, 4, side, tau, neighbours)
    other = models.hf_sam("SamVisionModel", image_size=8 * small.shape[1], window_size=side).vision_encoder
    wanted = other.state_dict()
    state = {name: _line(value, len(wanted[name])) if "rel_pos" in name else value for name, value in encoder.state_dict().items()}
    other.load_state_dict({**state, "pos_embed": wanted["pos_embed"]})
    for layer in other.layers[alpha:]:
        small = layer(small)
    return encoder.neck(restore(small))


def _table(table: Tensor, side: int) -> Tensor:
    old = round(len(table) ** 0.5)
    planes = table.T.reshape(1, -1, old, old)
    return F.interpolate(planes, (2 * side - 1, 2 * side - 1), mode="bilinear").flatten(2)[0].T


def _line(table: Tensor, length: int) -> Tensor:
    return F.interpolate(table.T[None], length, mode="linear")[0].T
