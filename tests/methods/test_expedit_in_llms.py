"""Expedit in the towers of multimodal LLMs, whole tokens at a time, against a slow computation at full length.

There every cluster stands at the place of the token in its middle, the other tokens are hidden from it, and at the end all are replaced.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests import reference
from tests.tiny_models import FAMILIES, Shot, batch_of, build, model_of
from vtr.testing.reference import Expected, TowerValues

pytestmark = pytest.mark.usefixtures("no_gradients")
FP64 = torch.float64
KINDS = (
    "llava",
    "internvl",
    "smolvlm",
    "gemma3",
    "mistral3",
    "llava_pixtral",
    "qwen2_vl",
    "qwen2_5_vl",
    "glm4v",
    "qwen3_5",
    "qwen2_5_vl_clips",
)
PACKED = KINDS[4:]
ROWS = ((4, Shot(96, 48), 6), (3, Shot(48, 96), 2, Shot(48, 48), 3))
ALPHA, TAU, WINDOW, ITERATIONS, NEIGHBOURS = 1, 0.02, 3, 2, 2


def middles(n: int, clusters: int) -> list[int]:
    """The token in the middle of every cell along a side."""
    return [cell * (n // clusters) + n // clusters // 2 for cell in range(clusters)]


def clustered(tokens: Tensor, grid: tuple[int, int], clusters: tuple[int, int]) -> Tensor:
    """Centres `(K, D)` of `tokens (N, D)`, centre by centre."""
    rows, cols = (side // count for side, count in zip(grid, clusters, strict=True))
    cells = [(y // rows, x // cols) for y in range(grid[0]) for x in range(grid[1])]
    names = [(i, j) for i in range(clusters[0]) for j in range(clusters[1])]
    centres = torch.stack([tokens[[cell == name for cell in cells]].mean(0) for name in names])
    for _ in range(ITERATIONS):
        member = torch.zeros(len(tokens), len(centres), dtype=FP64)
        for n, (token, (y, x)) in enumerate(zip(tokens, cells, strict=True)):
            near = [k for k, (i, j) in enumerate(names) if max(abs(i - y), abs(j - x)) <= WINDOW // 2]
            weight = torch.stack([-TAU * (token - centres[k]).square().sum() for k in near]).softmax(0)
            member[n, near] = weight
        centres = torch.stack([(member[:, k, None] * tokens).sum(0) / member[:, k].sum() for k in range(len(centres))])
    return centres


def restored(tokens: Tensor, centres: Tensor, refined: Tensor) -> Tensor:
    """All tokens `(N, D)`, token by token, as means of the refined centres nearest to them."""
    found = []
    for token in tokens:
        distance = (token - centres).square().sum(-1)
        near = distance.argsort()[:NEIGHBOURS]
        found.append(((-TAU * distance[near]).softmax(0)[:, None] * refined[near]).sum(0))
    return torch.stack(found)


def slow(kind: str, model: Any, batch: Any, side: int) -> Tensor:
    """Logits at full length, with cells of `side x side` tokens."""
    family, shots = FAMILIES[kind], [shot for row in batch.shots for shot in row]
    layers, grids = family.tower_layers(model), [grid for shot in shots for grid in family.grids(shot)]
    seen: list[Tensor] = []
    hook = layers[ALPHA].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batch.inputs)
    hook.remove()
    units = family.units(seen[0], shots)
    keep, into, values = torch.zeros(units.shape[:2], dtype=torch.bool), torch.full(units.shape[:2], -1), units.clone()
    notes = []
    for view, grid in enumerate(grids):
        clusters, tokens = (grid[0] // side, grid[1] // side), units[view, : grid[0] * grid[1]]
        centres = clustered(tokens, grid, clusters)
        pivots = [y * grid[1] + x for y in middles(grid[0], clusters[0]) for x in middles(grid[1], clusters[1])]
        keep[view, pivots], values[view, pivots] = True, centres
        into[view, pivots] = torch.tensor(pivots)
        notes.append((tokens, centres, pivots))

    def last(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        refined, full = family.units(hidden, shots), torch.zeros_like(units)
        for view, (tokens, centres, pivots) in enumerate(notes):
            full[view, : len(tokens)] = restored(tokens, centres, refined[view, pivots])
        hidden = family.with_units(hidden, full, shots)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    feature = {"llava": -2}.get(kind, -1)
    hook = layers[feature].register_forward_hook(last, prepend=True)  # before transformers records it
    try:
        merge = TowerValues(layer=ALPHA, before_mlp=False, keep=keep, into=into, values=values)
        return reference.masked_logits(model, batch, Expected(tower_values=[merge], proportional=False))
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_clusters_run_and_all_tokens_come_back(kind):
    """Where a tower has rotary positions, cells are of 3 x 3 tokens, so that a cluster has the position of the token in its middle."""
    side = 2 if kind == "smolvlm" else 3
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, ROWS, dtype=FP64)
    settings = dict(alpha=ALPHA, grid=1 / side, tau=TAU, window=WINDOW, iterations=ITERATIONS, neighbours=NEIGHBOURS)
    with vtr.reduced(model, "expedit", **settings) as reduction:
        logits = model(**batch.inputs, position_ids=batch.positions).logits
    assert [len(image.retained) for image in reduction.report().images] == batch.counts()
    wanted = slow(kind, model, batch, side)
    rounding = 5e-6 if kind in PACKED else 1e-6  # rotary tables of towers are float32
    assert reference.largest(logits[batch.valid], wanted[batch.valid]) <= rounding + FAMILIES[kind].noise


@pytest.mark.parametrize("kind", ["mistral3", "llava_pixtral", "qwen2_vl", "qwen2_5_vl", "glm4v"])
def test_clusters_have_the_mean_positions_of_their_tokens(kind):
    """Cells of 2 x 2 tokens: the rotation half-way between them, cluster by cluster in the order of the tower's sequence."""
    family, shots = FAMILIES[kind], [Shot(64, 32), Shot(32, 96)]
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, ((4, shots[0], 6), (3, shots[1], 2)), dtype=FP64)
    tables: list[tuple[Tensor, Tensor]] = []
    layer = family.tower_layers(model)[ALPHA]
    for context in (nullcontext(), vtr.reduced(model, "expedit", alpha=ALPHA, grid=1 / 2, tau=TAU)):
        with context:  # a hook behind those of the reduction
            hook = layer.register_forward_pre_hook(
                lambda module, args, kwargs: tables.append(kwargs["position_embeddings"]), with_kwargs=True
            )
            model(**batch.inputs)
            hook.remove()
    whole, short = (torch.complex(cos.double(), sin.double()) for cos, sin in tables)
    wanted = []
    for shot, units in zip(shots, family.units(whole, shots), strict=True):
        rows, cols = family.grids(shot)[0]
        means = units[: rows * cols].view(rows // 2, 2, cols // 2, 2, -1).mean((1, 3)).flatten(0, 1)
        firsts = [y * cols + x for y in range(0, rows, 2) for x in range(0, cols, 2)]
        places = torch.cat(family._windows(shot)).tolist() if kind == "qwen2_5_vl" else list(range(rows * cols))
        wanted.append((means / means.abs())[[firsts.index(place) for place in places if place in firsts]])
    assert float((short.reshape(-1, wanted[0].shape[-1]) - torch.cat(wanted)).abs().max()) < 1e-6


def test_towers_that_cannot_take_clusters_are_refused():
    with pytest.raises(
        vtr.VtrError, match="'qwen3_vl' hands features of earlier layers to its LLM, too; use a method that restores nothing"
    ):
        vtr.apply(model_of("qwen3_vl"), "expedit")
    with pytest.raises(
        vtr.VtrError, match="tokens of 'qwen2_vl' are 16 patches, whose rotary positions are too far apart to meet half-way"
    ):
        vtr.apply(build("qwen2_vl", tower={"spatial_merge_size": 4}), "expedit")


@pytest.mark.parametrize("kind", ["internvl", "mistral3", "qwen2_5_vl"])
def test_a_later_step_sees_all_tokens_at_their_places(kind):
    """Scores of the last tower layer, restored before it, choose what is left behind the tower, as in the model alone."""
    model, batch, same = model_of(kind, dtype=FP64), batch_of(kind, ROWS, dtype=FP64), dict(alpha=1, grid=1.0, tau=1e6, neighbours=1)
    for blocks in (1, 2):  # the last layer runs on all tokens, or the last two do
        last = [vtr.create_method("visionzip", keep=4)]
        plan = [vtr.create_method("expedit", **{**same, "blocks": blocks}), *last]
        found = []
        for methods in (last, plan):
            with vtr.reduced(model, methods) as reduction:
                found.append((model(**batch.inputs).logits, reduction.report().to_dict()["images"]))
        assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
