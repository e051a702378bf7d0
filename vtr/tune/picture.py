"""The picture of a tuning: accuracy against speed, with intervals, the Pareto front, the target and what was chosen.

What was asked of fewer samples than others is pale.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vtr.eval.report.plots import MARKERS, STYLE
from vtr.eval.stats import Interval
from vtr.tune.run import Point, Tuned

COLORS = [color for index, color in enumerate(matplotlib.colormaps["tab10"].colors) if index != 3]  # type: ignore[attr-defined]
"""Of methods; red is for the target and what was chosen."""


def draw(tuned: Tuned, model: str, tasks: str) -> bytes:
    """Returns the picture as PNG."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(8, 4.8), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots()
        full = f"full model: {100 * tuned.accuracy:.1f} %" if tuned.points else "full model"
        axes.plot(1, 0, "*", color="black", ms=12, label=full, zorder=4)
        timed = [one for one in tuned.points if one.speed is not None]
        by_method: dict[str, list[Point]] = {}
        for one in sorted(timed, key=lambda one: -one.samples):
            by_method.setdefault(one.label.split()[0], []).append(one)
        for index, (name, own) in enumerate(sorted(by_method.items())):
            style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "ms": 4, "elinewidth": 0.6}
            for one in own:
                pale = one.samples < max(other.samples for other in timed)
                _point(axes, one.speed, one.loss, **style, alpha=0.3 if pale else 0.9, label=name if one is own[0] else None)
        ends = [] if any(_x(one) >= 1 and _y(one) >= 0 for one in timed) else [(1.0, 0.0)]
        front = sorted([*ends, *((_x(one), _y(one)) for one in timed if one.front)])
        axes.plot(*zip(*front, strict=True), color="black", alpha=0.15, lw=6, zorder=0, drawstyle="steps-pre", label="Pareto front")
        _target(tuned, axes)
        _chosen(tuned, axes)
        axes.set(xlabel="times faster than the full model", ylabel=f"accuracy on {tasks}, points against full")
        axes.set_title(f"{model}: {tuned.target}", fontsize=10)
        axes.grid(alpha=0.25, lw=0.5)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7.5)
        stream = io.BytesIO()
        canvas.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return stream.getvalue()


def _point(axes: Any, speed: Interval | None, loss: Interval, **style: Any) -> None:
    """Draws a speed and a loss with their intervals; a loss goes downwards."""
    assert speed is not None
    across, along = ([[middle - low], [high - middle]] for middle, low, high in (speed, [-100 * loss[i] for i in (0, 2, 1)]))
    axes.errorbar([speed.value], [-100 * loss.value], np.clip(along, 0, None), np.clip(across, 0, None), ls="", **style)


def _target(tuned: Tuned, axes: Any) -> None:
    line = {"color": "tab:red", "lw": 1, "ls": "--", "label": f"target: {tuned.target}"}
    if tuned.target.kind == "speed":
        axes.axvline(tuned.target.value, **line)
    else:
        axes.axhline(-100 * tuned.target.value, **line)


def _chosen(tuned: Tuned, axes: Any) -> None:
    """Draws what was chosen as the second measurement has it."""
    if tuned.chosen is None or tuned.held is None or tuned.speed is None:
        return
    style = {"color": "tab:red", "marker": "o", "ms": 9, "mfc": "none", "mew": 1.8, "elinewidth": 1.6, "capsize": 3, "zorder": 5}
    _point(axes, tuned.speed, tuned.held.loss, **style, label=f"{tuned.chosen.label}\n(chosen, held-out samples)")


def _x(one: Point) -> float:
    assert one.speed is not None
    return one.speed.value


def _y(one: Point) -> float:
    return -100 * one.loss.value
