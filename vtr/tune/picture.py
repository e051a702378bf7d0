"""The picture of a tuning: accuracy against speed, with intervals, the Pareto front, the target and what was chosen."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vtr.eval.report.plots import MARKERS, STYLE
from vtr.tune.run import Point, Tuned


def draw(tuned: Tuned, model: str, tasks: str) -> bytes:
    """Returns the picture as PNG."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(8, 4.8), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots()
        axes.plot(1, 0, "*", color="black", ms=12, label=f"full model: {100 * tuned.accuracy:.1f} %", zorder=4)
        timed = [one for one in tuned.points if one.speed is not None]
        by_method: dict[str, list[Point]] = {}
        for one in timed:
            by_method.setdefault(one.label.split()[0], []).append(one)
        for index, (name, own) in enumerate(sorted(by_method.items())):
            style: dict[str, Any] = {"color": matplotlib.colormaps["tab10"](index % 10), "marker": MARKERS[index % len(MARKERS)]}
            bars = {"xerr": _errors(own, speed=True), "yerr": _errors(own, speed=False)}
            axes.errorbar(
                [_x(one) for one in own], [_y(one) for one in own], **bars, **style, ls="", ms=4, elinewidth=0.6, alpha=0.7, label=name
            )
        full = [] if any(_x(one) >= 1 and _y(one) >= 0 for one in timed) else [(1.0, 0.0)]
        front = sorted([*full, *((_x(one), _y(one)) for one in timed if one.front)])
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
    loss, speed = tuned.held.loss, tuned.speed
    x, y = ([[end[0] - end[1]], [end[2] - end[0]]] for end in (speed, (-100 * loss.value, -100 * loss.high, -100 * loss.low)))
    style = {"color": "tab:red", "ms": 9, "mfc": "none", "mew": 1.8, "elinewidth": 1.6, "capsize": 3, "zorder": 5}
    axes.errorbar(speed.value, -100 * loss.value, y, x, fmt="o", **style, label=f"{tuned.chosen.label}\n(chosen, held-out samples)")


def _x(one: Point) -> float:
    assert one.speed is not None
    return one.speed.value


def _y(one: Point) -> float:
    return -100 * one.loss.value


def _errors(points: list[Point], speed: bool) -> Any:
    """Returns the lengths of error bars `(2, points)`; a loss is drawn downwards."""
    ends = np.asarray([one.speed if speed else (_y(one), -100 * one.loss.high, -100 * one.loss.low) for one in points])  # (points, 3)
    return np.stack([ends[:, 0] - ends[:, 1], ends[:, 2] - ends[:, 0]]).clip(0)
