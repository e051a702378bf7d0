"""Plots of one model on one task: accuracy against tokens, FLOPs and milliseconds with the Pareto front, and a heat map by family."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullLocator

from vtr.eval.report.document import Figure
from vtr.eval.report.section import BASELINES, Measure, Section, budget_title
from vtr.eval.summary import Row
from vtr.types.naming import FULL

STYLE = {"text.parse_math": False, "svg.hashsalt": "vtr", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
MARKERS = "os^Dv<>PXh*"


AXES = (
    Measure("retained", "visual tokens left at the end of the LLM"),
    Measure("tflops", "GFLOPs of the LLM's prefill (a multiply-add counts once)", 1000),
    Measure("latency_ms", "whole answer in ms per sample"),
)


def make_figures(section: Section, timings: bool = True, prefix: str = "") -> list[Figure]:
    """Returns all plots that the section has the numbers for.

    Args:
        section: what was measured.
        timings: whether to draw those against milliseconds.
        prefix: in front of the file names.
    """
    name = re.sub(r"[^A-Za-z0-9.+-]+", "-", f"{prefix}{section.name}.{section.task}")
    found = []
    with matplotlib.rc_context(STYLE):
        for axis in AXES[: None if timings else 2]:
            points = {row: own[axis.name] * axis.scale for row in section.comparable if axis.name in (own := section.measured(row))}
            found += _against(section, points, axis, f"{name}.{axis.name}")
        for index, speed in enumerate(section.speed if timings else ()):
            points = {row: speed.of(row)["prefill_ms"] for row in section.comparable if "prefill_ms" in speed.of(row)}
            axis = Measure("prefill_ms", f"prefill in ms per sample at batch {speed.batch} ({speed.source} of vtr bench)")
            found += _against(section, points, axis, f"{name}.prefill_ms.{index + 1}")
        if any(row in section.resamples for rows in section.budgets.values() for row in rows):
            found.append(_save(_heat_map(section), f"{name}.families", f"{section.title}: accuracy of every family"))
    return found


def _against(section: Section, points: dict[Row, float], axis: Measure, name: str) -> list[Figure]:
    """Returns the plot of accuracy against one number, where a method has it."""
    if all(row.method in (FULL, "none") for row in points):
        return []
    title = f"{section.title}: accuracy against {axis.words.split(' in ')[0].split(' (')[0]}"
    return [_save(_scatter(section, points, axis), name, title)]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points `(cost, accuracy)` that no other one beats in one and reaches in the other, by rising cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _scatter(section: Section, points: dict[Row, float], axis: Measure) -> Canvas:
    canvas, axes = _canvas(9.5, 5)
    series: dict[str, list[Row]] = {}
    for row in points:
        if row.method not in (FULL, "none"):
            series.setdefault(section.labels[row], []).append(row)
    for index, (label, rows) in enumerate(_ordered(series)):
        rows = sorted(rows, key=lambda row: points[row])
        values = np.asarray([[100 * end for end in row.macro] for row in rows])
        errors = np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]).clip(0)
        baseline = rows[0].method in BASELINES
        color = str(0.25 + 0.15 * (index % 4)) if baseline else matplotlib.colormaps["tab20"](index % 20)
        style = {"color": color, "linestyle": "--" if baseline else "-", "marker": MARKERS[index % len(MARKERS)]}
        line = axes.errorbar([points[row] for row in rows], values[:, 0], errors, **style, ms=4, lw=1, elinewidth=0.6, label=_legend(label))
        line[2][0].set_alpha(0.4)
    _references(section, points, axes)
    drawn = [row for row in points if row.method != "none"]
    front = [drawn[i] for i in pareto([(points[row], row.macro.value) for row in drawn])]
    steps = ([points[row] for row in front], [100 * row.macro.value for row in front])
    axes.plot(*steps, color="black", alpha=0.15, lw=7, zorder=0, drawstyle="steps-post", label="Pareto front")
    axes.set(xlabel=axis.words, ylabel=f"{section.task}: accuracy in %, 95 % intervals")
    _logarithmic(axes, [points[row] for row in drawn])
    axes.grid(alpha=0.25, lw=0.5)
    columns = 1 + len(series) // 26
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7, ncols=columns)
    return canvas


def _references(section: Section, points: dict[Row, float], axes: Any) -> None:
    """Draws lines across the plot: the full model, with a star where it stands, and the prompt without its image."""
    for row, place in points.items():
        if row.method in (FULL, "none"):
            style = "-" if row.method == FULL else ":"
            axes.axhline(100 * row.macro.value, color="black", lw=0.8, ls=style, label=_legend(section.labels[row]))
        if row.method == FULL:
            axes.plot(place, 100 * row.macro.value, "*", color="black", ms=10)


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    """Makes an axis logarithmic where the values span a factor of four or more."""
    if min(values) <= 0 or max(values) < 4 * min(values):
        return
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.15, max(values) * 1.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _ordered(series: dict[str, list[Row]]) -> Iterator[tuple[str, list[Row]]]:
    """Baselines last, so that the methods have the first colours."""
    yield from sorted(series.items(), key=lambda item: (item[1][0].method in BASELINES, item[0]))


def _heat_map(section: Section) -> Canvas:
    families = list(section.reference)
    groups = [[row for row in rows if row in section.resamples] for rows in section.budgets.values()]
    groups = [rows for rows in groups if rows]
    labels = sorted({section.labels[row] for rows in groups for row in rows}, key=lambda label: (label.split()[0] in BASELINES, label))
    longest = max(len(_legend(label)) for label in labels), max(len(_legend(family)) for family in families)
    width, height = 1.6 + 0.07 * longest[0] + 0.55 * len(families) * len(groups), 0.8 + 0.07 * longest[1] + 0.22 * len(labels)
    canvas = Canvas(figsize=(max(width, 4), max(height, 2)), layout="constrained")
    FigureCanvasAgg(canvas)
    for axes, rows in zip(canvas.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups, strict=True):
        table = np.full((len(labels), len(families)), np.nan)
        shares = table.copy()
        for row in rows:
            full, index = section.full(row), labels.index(section.labels[row])
            table[index] = [100 * row.families[family].value for family in families]
            base = [full.families[family].value if full else 1.0 for family in families]
            shares[index] = [value / own if own else np.nan for value, own in zip(table[index], base, strict=True)]
        image = axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            if not np.isnan(value):
                dark = np.isnan(shares[y, x]) or shares[y, x] < 60
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
        axes.set_xticks(range(len(families)), [_legend(family) for family in families], rotation=60, ha="right")
        axes.set_yticks(range(len(labels)), [_legend(label) for label in labels])
        axes.set_title(budget_title(rows), fontsize=9)
    canvas.colorbar(image, ax=canvas.axes, label="color: percent of full\nnumber: accuracy in %", shrink=0.8, pad=0.01)
    return canvas


def _canvas(width: float, height: float) -> tuple[Canvas, Any]:
    canvas = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas, canvas.subplots()


def _legend(label: str) -> str:
    """Returns a label on one line and not too long; matplotlib leaves out labels that begin with an underscore."""
    text = re.sub(r"[\s\x00-\x1f\x7f]+", " ", label)
    text = text if len(text) <= 40 else f"{text[:37]}..."
    return f" {text}" if text.startswith("_") else text


def _save(canvas: Canvas, name: str, title: str) -> Figure:
    """Returns both formats, without a date, so that the same results give the same bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    canvas.savefig(png, format="png", dpi=150, metadata={"Software": None})
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Figure(name, title, png.getvalue(), svg.getvalue())
