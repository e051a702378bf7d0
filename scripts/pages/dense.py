"""Dense evaluation: what a reduction inside a ViT costs a segmentation in mIoU, beside what it saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtr.cost import CONVENTION
from vtr.data.scenes import draw
from vtr.data.segmentation import iou, score, segment, test_scenes
from vtr.files import write_atomic
from vtr.markdown import markdown_table
from vtr.reduction import reduced
from vtr.types.naming import FULL
from vtr.viz import Tile, contact_sheet
from vtr.viz.dense import draw_classes, draw_clusters

VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    (FULL, {}),
    ("expedit", {"alpha": 5, "grid": (17, 17)}),
    ("expedit", {"alpha": 3, "grid": (17, 17)}),
    ("expedit", {"alpha": 3, "grid": (12, 12)}),
    ("expedit", {"alpha": 1, "grid": (17, 17)}),
    ("expedit", {"alpha": 1, "grid": (12, 12)}),
    ("tome", {"keep": 261}),
    ("tome", {"keep": 79}),
    ("pool", {"alpha": 3, "grid": (19, 19)}),
    ("pool", {"alpha": 3, "grid": (14, 14)}),
)
"""Rows of the table on tiny-vit-seg; alpha=3 and 17 x 17 are the defaults for its 8 blocks and 24 x 24 tokens. `tome` and
`pool` do as many multiply-adds as `expedit` at alpha=3 on 17 x 17 and on 12 x 12 (within 1 %)."""
RESAMPLES = 2000


@dataclass(frozen=True)
class DenseRow:
    """One line of the table.

    Args:
        label, method, settings: what was run.
        miou: mean over classes, percent.
        change: difference to the full model in points, with the ends of its 95 % interval over scenes (paired bootstrap).
        ious: of each class, percent.
        tokens: at every block, prefix tokens excluded.
        gflops: of one image.
        images_per_s, choosing_ms, peak_mib: from `scripts.pages.dense_cost`.
    """

    label: str
    method: str
    settings: dict[str, Any]
    miou: float
    change: tuple[float, float, float]
    ious: list[float]
    tokens: list[int]
    gflops: float
    images_per_s: float
    choosing_ms: float
    peak_mib: float


def evaluate(
    model: Any, variants: Sequence[tuple[str, dict[str, Any]]], count: int, batch: int = 10, advance: Callable[[], None] = lambda: None
) -> list[np.ndarray]:
    """Returns confusion counts `(count, classes, classes)` of every variant on the same test scenes.

    Args:
        model: a `vtr.models.dense.DenseViT`.
        variants: `(method, settings)`; `full` is the model as it is.
        count: test scenes, a multiple of 5.
        batch: pictures at a time.
        advance: called after every variant.
    """
    scenes = test_scenes(count)
    pictures = [draw(scene) for scene in scenes]
    targets = [segment(scene, scene.size // model.config.pixels) for scene in scenes]
    found = []
    for name, settings in variants:
        with nullcontext() if name == FULL else reduced(model, name, **settings):
            found.append(score(model.classify, pictures, targets, batch))
        advance()
    return found


def mean_iou(counts: np.ndarray) -> float:
    """Returns percent, over the classes that occur; `counts (scenes, classes, classes)`."""
    return float(100 * np.nanmean(iou(counts.sum(0))))


def change(counts: np.ndarray, full: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """Returns the difference of two mean IoU in points and its 95 % interval: scenes are drawn again, the same for both."""
    drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=resamples)
    own, other = (np.einsum("rs,sij->rij", drawn, one.astype(float)) for one in (counts, full))
    differences = [mean_iou(a[None]) - mean_iou(b[None]) for a, b in zip(own, other, strict=True)]
    low, high = np.percentile(differences, [2.5, 97.5])
    return mean_iou(counts) - mean_iou(full), float(low), float(high)


def rows(found: Sequence[np.ndarray], costs: Sequence[Any], label: Callable[[Any], str]) -> list[DenseRow]:
    """Returns quality and cost side by side; the first is the full model.

    Args:
        found: from `evaluate`.
        costs: `scripts.pages.dense_cost.DenseCost` of the same variants.
        label: `scripts.pages.dense_cost.label`.
    """
    return [
        DenseRow(
            label=label(cost.variant),
            method=cost.variant[0],
            settings=dict(cost.variant[1]),
            miou=mean_iou(counts),
            change=change(counts, found[0]),
            ious=[float(value) for value in 100 * iou(counts.sum(0))],
            tokens=list(cost.tokens),
            gflops=cost.gflops,
            images_per_s=cost.images_per_s,
            choosing_ms=cost.choosing_ms,
            peak_mib=cost.peak_bytes / 2**20,
        )
        for counts, cost in zip(found, costs, strict=True)
    ]


def write_rows(path: Path, table: Sequence[DenseRow], conditions: dict[str, Any]) -> None:
    """Writes JSON with everything, atomically."""
    content = {"format": "vtr-dense", "schema": 1, "conditions": conditions, "rows": [asdict(row) for row in table]}
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def markdown(table: Sequence[DenseRow]) -> str:
    """Returns the table for the documentation."""
    full, body = table[0], []
    for row in table:
        tokens = str(row.tokens[-1]) if row.tokens else "all"
        moved = "" if row is full else "{:+.1f} ({:+.1f} to {:+.1f})".format(*row.change)
        speed = [f"{row.images_per_s:.1f}", f"{row.images_per_s / full.images_per_s:.2f}"]
        body.append([row.label, tokens, f"{row.gflops:.2f}", f"{row.miou:.1f}", moved, *speed, f"{row.peak_mib:.0f}"])
    head = ["variant", "tokens", "GFLOPs", "mIoU", "change (95 %)", "images/s", "factor", "peak MiB"]
    said = f"GFLOPs of one image without the head, {CONVENTION}; tokens are those of the last block, prefix tokens excluded."
    return f"{said}\n\n{markdown_table(head, body)}"


def picture(model: Any, pictures: Sequence[np.ndarray], labels: Sequence[np.ndarray], variant: tuple[str, dict[str, Any]]) -> Image.Image:
    """Draws scenes, their clusters, and the segmentation of the full and of the reduced model.

    Args:
        model: as for `evaluate`.
        pictures: `(h, w, 3)` uint8 each.
        labels: cluster of each token of each picture, see `scripts.pages.dense_cost.cluster_labels`.
        variant: method and settings of the reduced model.
    """
    full = model.classify(pictures)
    with reduced(model, variant[0], **variant[1]):
        short = model.classify(pictures)
    tiles = []
    for shown, cluster, one, other in zip(pictures, labels, full, short, strict=True):
        drawn = Image.fromarray(shown), draw_clusters(shown, cluster, (model.config.pixels // model.config.patch,) * 2), draw_classes(one)
        same = Tile(draw_classes(other), f"{np.mean(one == other):.1%} of the pixels as in full")
        tiles.append(("", [*(Tile(one, "") for one in drawn), same]))
    return contact_sheet("tiny-vit-seg: clusters and segmentation", ("scene", "clusters", "full", "reduced"), tiles)


def plot(table: Sequence[DenseRow], path: Path) -> None:
    """Plots mean IoU against images per second as PNG or SVG, a colour for each method and every point with its settings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="images per second", ylabel="mIoU in percent")
    for n, method in enumerate(dict.fromkeys(row.method for row in table)):
        own = [row for row in table if row.method == method]
        axes.plot([r.images_per_s for r in own], [r.miou for r in own], "o", color=f"C{n}", label=method)
        for k, row in enumerate(own):
            words, beside = row.label.removeprefix(method).strip(), (4, -10 if k % 2 else 4)
            axes.annotate(words, (row.images_per_s, row.miou), xytext=beside, textcoords="offset points", fontsize=7)
    axes.margins(x=0.15)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
