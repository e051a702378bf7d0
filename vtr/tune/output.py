"""What a tuning leaves in its folder: a table in Markdown and CSV, everything as JSON, a plan and a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtr.eval.stats import Interval
from vtr.files import write_atomic
from vtr.markdown import markdown_table
from vtr.tune.run import Point, Tuned

HEAD = ("", "candidate", "tokens", "times faster", "points lost", "samples")
NOTE = (
    "Losses and speeds of the search, with 95 % intervals; + no other candidate is both faster and better; * chosen. "
    "What was chosen looks better here than it is, because it was chosen: believe the sentences, whose samples and rounds had no part in it."
)


def rows(tuned: Tuned) -> list[list[str]]:
    """Returns the cells of the table, see `HEAD`."""
    return [
        [
            ("*" if tuned.chosen and one.label == tuned.chosen.label else "") + ("+" if one.front else ""),
            one.label,
            f"{one.retained:.0f}",
            "not timed" if one.speed is None else _shown(one.speed, 1, 2),
            _shown(one.loss, 100, 1),
            str(one.samples),
        ]
        for one in tuned.points
    ]


def caption(tuned: Tuned) -> str:
    """Returns what the table has no column for."""
    return f"full: {100 * tuned.accuracy:.1f} % with {tuned.tokens:.0f} visual tokens, on the samples of the search. {NOTE}"


def write(tuned: Tuned, folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Writes all files, each whole or not at all, and returns their paths.

    Args:
        tuned: what to write.
        folder: exists.
        facts: of the run: model, tasks, versions, date, ...
    """
    from vtr.tune.picture import draw

    said = {"target": str(tuned.target), "verdict": tuned.verdict, "sentences": tuned.sentences}
    files: dict[str, str | bytes] = {
        "tune.md": _markdown(tuned, facts),
        "tune.csv": _csv(tuned),
        "tune.json": _json({**facts, **said, **_numbers(tuned)}),
        "tune.png": draw(tuned, str(facts["model"]), ", ".join(facts["tasks"])),
    }
    if tuned.plan is not None:
        files["plan.json"] = _json({**tuned.plan, "tuned": {"model": facts["model"], "tasks": facts["tasks"], **said}})
    else:
        (folder / "plan.json").unlink(missing_ok=True)  # of an earlier run, which had another target
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]


def _markdown(tuned: Tuned, facts: Mapping[str, Any]) -> str:
    head = f"`vtr tune` of {facts['model']} on {', '.join(facts['tasks'])} for {tuned.target}"
    around = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    where = f"{facts['date']}, {facts['device']}, {facts['threads']} thread(s), {facts['dtype']}, {facts['timed']}, {around}"
    said = "\n".join(f"- {line}" for line in tuned.sentences)
    table = [markdown_table(HEAD, rows(tuned)), caption(tuned)] if tuned.points else []
    return "\n\n".join([head, said, *table, where]) + "\n"


def _csv(tuned: Tuned) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [f"{name}{end}" for name in ("speed", "loss") for end in ("", "_low", "_high")]
    writer.writerow(["candidate", "retained", *names, "samples", "front", "chosen"])
    for one in tuned.points:
        chosen = tuned.chosen is not None and one.label == tuned.chosen.label
        numbers = [*(one.speed or ("", "", "")), *one.loss]
        writer.writerow([one.label, one.retained, *numbers, one.samples, int(one.front), int(chosen)])
    return stream.getvalue()


def _numbers(tuned: Tuned) -> dict[str, Any]:
    return {
        "accuracy_full": tuned.accuracy if tuned.points else None,
        "chosen": None if tuned.chosen is None else {"label": tuned.chosen.label, **tuned.chosen.method.to_dict()},
        "held_out": [{"label": one.label, **vars(held), "loss": held.loss._asdict()} for one, held in tuned.tried],
        "speed": None if tuned.speed is None else tuned.speed._asdict(),
        "finished": tuned.found.finished,
        "points": [_point(one) for one in tuned.points],
    }


def _point(one: Point) -> dict[str, Any]:
    speed = None if one.speed is None else one.speed._asdict()
    return {**vars(one), "loss": one.loss._asdict(), "speed": speed}


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _shown(found: Interval, scale: float, digits: int) -> str:
    value, low, high = (f"{scale * end:.{digits}f}" for end in found)
    return f"{value} ({low} to {high})"
