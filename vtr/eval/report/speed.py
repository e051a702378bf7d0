"""Times and memory that `vtr bench` measured, for the rows of a report that have the same model, method, settings and budget.

A record is JSON with "format" "vtr-bench": `environment`, `model`, and `cells`, one for each budget and batch size, with a row for the full model,
the kept floor, every method and every schedule floor. A floor belongs to the methods that ran on the same `schedule`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from vtr.bench.record import FLOOR, KEPT, METHOD, SCHEMA, is_record
from vtr.eval.summary import Row
from vtr.models.recipes import find_recipe
from vtr.types.errors import WrongValue

_FLOORS = (KEPT, FLOOR)


class Experiment(NamedTuple):
    """What a record and a result have in common: the method and its settings with the budget, as JSON."""

    method: str
    settings: str


@dataclass(frozen=True)
class Speed:
    """A record at one batch size.

    Args:
        source: name of the file.
        models: names under which results may have the model.
        where: device, dtype, versions and the rest that a reader has to know.
        device, dtype: for the peak of the device.
        batch: prompts at once.
        tokens: of the longest answer.
        numbers: medians over the rounds of an experiment; `choosing_ms`, `prefill_ms`, `prefill_floor_ms`, `prefill_kept_floor_ms`, `latency_ms` and
            `latency_floor_ms` of the longest answer, all per sample (of a batch / its size), and `peak_mib` of the batch on top of weights.
    """

    source: str
    models: tuple[str, ...]
    where: str
    device: str
    dtype: str
    batch: int
    tokens: int
    numbers: Mapping[Experiment, Mapping[str, float]]

    def of(self, row: Row) -> Mapping[str, float]:
        """Returns what was measured of the experiment of a row, whatever its seeds."""
        return self.numbers.get(_experiment(row.method, row.fingerprint["settings"]), {})


def read_speed(path: Path) -> list[Speed]:
    """Returns a record of `vtr bench` on a model, one entry for each batch size.

    Raises:
        ValueError: no such file, or not such a record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WrongValue(f"--speed: cannot read {str(path)!r} ({error.strerror}); write a record with vtr bench --json") from None
    except ValueError as error:
        raise WrongValue(f"--speed: {str(path)!r} is not complete JSON ({error}); measure it again") from None
    if not is_record(record):
        raise WrongValue(f"--speed: {str(path)!r} is not a record of vtr bench with schema {SCHEMA}; give one that vtr bench --json wrote")
    if record.get("kind") != "model":
        raise WrongValue(f"--speed: {str(path)!r} has times of functions, not of a model; give a record of vtr bench --model")
    try:
        cells: dict[int, list[dict[str, Any]]] = {}
        for cell in record["cells"]:
            cells.setdefault(cell["batch"], []).append(cell)
        return [_at(path.name, record, batch, own) for batch, own in sorted(cells.items())]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise WrongValue(f"--speed: {str(path)!r} lacks {type(error).__name__} {error}; measure it again with this version") from None


def _at(source: str, record: Mapping[str, Any], batch: int, cells: list[dict[str, Any]]) -> Speed:
    facts, model = record["environment"], record["model"]
    tokens = max(int(length) for cell in cells for length in cell["rows"][0]["runs"][0]["total_ms"])
    found: dict[Experiment, dict[str, list[float]]] = {}
    for cell in cells:
        for row in cell["rows"]:
            if row["kind"] not in _FLOORS:
                own = found.setdefault(_experiment(row["name"], row["settings"]), {})
                for name, values in _rounds(cell, row, batch, tokens):
                    own.setdefault(name, []).extend(values)
    recipe = find_recipe(model["name"])
    cuda = facts["kind"] == "cuda"
    rounds = sorted({len(row["runs"]) for cell in cells for row in cell["rows"]})
    where = [
        f"{facts['device']}, driver {facts['driver']}, CUDA {facts['cuda']}"
        if cuda
        else f"{facts['device']}, {facts['threads']} thread(s)",
        facts["clock"],
        f"{'random' if model['random'] else 'trained'} weights in {model['dtype']}, {model['attention']}",
        f"batch {batch}, prompts of {' or '.join(str(n) for n in sorted({cell['prompt'] for cell in cells}))} tokens",
        f"{' or '.join(map(str, rounds))} round(s)",
        ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "vtr")),
        facts["date"],
    ]
    return Speed(
        source=source,
        models=(model["name"], *([recipe.hub_id] if recipe else [])),
        where=", ".join(where),
        device=f"{facts['kind']} {facts['device']}",
        dtype=model["dtype"],
        batch=batch,
        tokens=tokens,
        numbers={key: {name: median(values) for name, values in own.items() if values} for key, own in found.items()},
    )


def _rounds(cell: Mapping[str, Any], row: Mapping[str, Any], batch: int, tokens: int) -> Iterator[tuple[str, list[float]]]:
    """Yields every number of a row in every round, with those of its floors."""
    kept = next((other for other in cell["rows"] if other["kind"] == KEPT), None)
    floor = next((other for other in cell["rows"] if other["kind"] in _FLOORS and other["schedule"] == row["schedule"]), None)
    choosing = row if row["kind"] == METHOD else None
    for name, source, key in (
        ("choosing_ms", choosing, "choosing_ms"),
        ("prefill_ms", row, "prefill_ms"),
        ("prefill_floor_ms", floor, "prefill_ms"),
        ("prefill_kept_floor_ms", kept if choosing else None, "prefill_ms"),
    ):
        yield name, [run[key] / batch for run in source["runs"]] if source else []
    if tokens > 1:
        for name, source in (("latency_ms", row), ("latency_floor_ms", floor)):
            yield name, [run["total_ms"][str(tokens)] / batch for run in source["runs"]] if source else []
    yield "peak_mib", [row["peak_bytes"] / 2**20] if "peak_bytes" in row else []


def _experiment(method: str, settings: Mapping[str, Any]) -> Experiment:
    """Seeds have the same speed, and what a method sees of videos changes none of images; records round numbers to four digits behind the point."""
    plain = json.loads(json.dumps(settings), parse_float=lambda text: round(float(text), 4))
    return Experiment(method, json.dumps({k: v for k, v in plain.items() if v is not None and k not in ("seed", "frames")}, sort_keys=True))
