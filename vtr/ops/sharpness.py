"""How sharp soft k-means has to be for an image: the softest tau at which its centres stay apart.

A tau that is too soft makes every token belong to all the centres that it may join. The centres then move towards each other with every
round until they are all the same, and whatever is restored from them is too. How soft is too soft depends on the features: it takes a
larger tau where tokens differ in many directions than where they differ in few. So the rule looks at what happens to the centres.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from vtr.ops.clusters import Grid, cell_means, check_grids, constant, tile_means, tiles_of
from vtr.ops.precision import outside_autocast

LADDER = (2.0, 8.0, 32.0)
"""Medians of tau * distance^2 over the candidates of all tokens that are tried, from soft to sharp; each is the same factor above the last."""
APART = 0.6
"""Share of the sharpest one's squared distance between adjacent centres that one round has to leave: below it, later rounds bring them together.
From 0.55 to 0.65 the results on two encoders hardly change (docs/methods/expedit.md)."""
FARTHEST = 2.0
"""How far from the mean of an image a token may be, in medians over its tokens: the few tokens with huge features of some encoders would
otherwise be all that a mean of squares sees."""
SKETCH = 64
"""Width in which the rounds of the ladder are done: distances after a fixed random projection, of which only a share of sums counts."""


@outside_autocast
def auto_tau(tokens: Tensor, grid: Grid, clusters: Grid, window: int, image: Tensor) -> Tensor:
    """Returns the softest tau at which the centres of `vtr.ops.clusters.cluster` stay apart.

    1. Tokens farther from their mean than `FARTHEST` medians are moved to that distance.
    2. One round of clustering is done at each tau of a short ladder, with the same squared distances; tokens wider than `SKETCH` are then
       averaged in a projection to that width, in which sums of squared distances keep their shares.
    3. What counts is the mean squared distance of adjacent centres, as a share of that at the sharpest tau. Between the steps of the ladder
       both are interpolated on a logarithmic scale, and tau is where the share is `APART`; the softest step where it is above that.

    Args:
        tokens, grid, clusters, window: as for `cluster`.
        image: `(B,)` int64 below B: rows of one image (attention windows, crops) get one tau.

    Returns:
        `(B,)` float32 at least, one value per row; 1 for images whose tokens are all the same. Costs about one round of `cluster`.
    """
    check_grids(grid, clusters)
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    away = wide - wide.mean(1, keepdim=True)
    length = away.norm(dim=-1, keepdim=True)
    away = away * (FARTHEST * length.median(1, keepdim=True).values / length.clamp_min(1e-30)).clamp_max(1)

    tiles, batch = tiles_of(grid, clusters, window, tokens.device), len(tokens)
    parts = away[:, tiles.tokens].flatten(0, 1)  # (B T, n, D)
    start = cell_means(away, grid, clusters)
    boxes = start.index_select(1, tiles.centres.flatten()).unflatten(1, tiles.centres.shape).flatten(0, 1)  # (B T, m, D)
    squares = [part.square().sum(-1)[:, index].flatten(0, 1) for part, index in ((away, tiles.tokens), (start, tiles.centres))]
    distance = torch.baddbmm(squares[0][..., None] + squares[1][:, None], parts, boxes.mT, alpha=-2).clamp_min_(0)  # (B T, n, m)
    median = distance.view(batch, -1).index_select(1, tiles.candidates).median(1).values
    some = (median > 0).to(median)
    median, number = (torch.zeros_like(median).index_add(0, image, value)[image] for value in (median, some))
    unit = number / median.clamp_min(1e-30)  # tau at a median of 1

    bias, scale = tiles.bias.to(away.dtype).repeat(batch, 1, 1), -unit.repeat_interleave(len(tiles.tokens))[:, None, None]
    rounds = [torch.addcmul(bias, distance, step * scale).softmax(-1) for step in LADDER]
    if away.shape[2] > SKETCH:
        parts = (away @ _signs(away.shape[2], away.device).to(away))[:, tiles.tokens].flatten(0, 1)
    shape = torch.Size((*start.shape[:2], parts.shape[2]))
    apart = torch.stack([_adjacent(tile_means(member, parts, tiles, shape).unflatten(1, clusters)) for member in rounds], 1)
    apart = torch.zeros_like(apart).index_add(0, image, apart)[image]
    share = torch.where(apart[:, -1:] > 0, apart / apart[:, -1:].clamp_min(1e-30), 1).clamp_min(1e-30).log().cummax(1).values
    climbed = (log(APART) - share[:, :-1]) / (share[:, 1:] - share[:, :-1]).clamp_min(1e-6)  # of each step, all or nothing but for one
    found = LADDER[0] * unit * (LADDER[1] / LADDER[0]) ** climbed.clamp(0, 1).sum(1)
    return torch.where(number > 0, found, 1.0)


@constant
def _signs(width: int, device: torch.device) -> Tensor:
    """Returns signs `(width, SKETCH)`, -1 or 1, always the same: E (x @ signs)^2 is SKETCH x^2."""
    return (2.0 * torch.randint(2, (width, SKETCH), generator=torch.Generator().manual_seed(0)) - 1).to(device)


def _adjacent(centres: Tensor) -> Tensor:
    """`(B,)`: summed squared distances of the centres `(B, h, w, D)` beside and above each other."""
    rows, columns = centres[:, 1:] - centres[:, :-1], centres[:, :, 1:] - centres[:, :, :-1]
    return rows.square().sum((1, 2, 3)) + columns.square().sum((1, 2, 3))
