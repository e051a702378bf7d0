"""Sanity checks of every report: each finds what would make a table say something that was not measured.

Peaks are dense tensor-core rates of the makers' data sheets (NVIDIA: V100 2017, T4 2018, A100 2020, L4 and L40S 2023, H100 and H200 SXM 2023,
B200 2024) and of the appendices of its architecture papers (GA102 2021 for GeForce RTX 30, Ada 2022 for 40, RTX Blackwell 2025 for 50), the
highest for any accumulation type; for float32 with TF32 where the device has it, because results do not say whether it was on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from itertools import pairwise

from vtr.eval.report.differences import lacking
from vtr.eval.report.section import CONTEXT, Section, budget_key, budget_title
from vtr.eval.report.speed import Speed
from vtr.eval.report.tables import missing_baselines
from vtr.eval.summary import Row, percent
from vtr.types.naming import FULL

_PEAKS = {  # a word of the device's name, or its end -> TFLOP/s of 16-bit floats, of float32
    "B200": (2250.0, 1125.0),
    "H200": (989.4, 494.7),
    "H100": (989.4, 494.7),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.0),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    # half of the first is what GeForce reaches with sums in float32; its TF32 is as fast as its float32
    "GeForce RTX 5090": (419.0, 104.8),
    "GeForce RTX 4090": (330.3, 82.6),
    "GeForce RTX 4080": (194.9, 48.7),
    "GeForce RTX 3090 Ti": (160.0, 40.0),
    "GeForce RTX 3090": (142.0, 35.6),
    "GeForce RTX 3080": (119.0, 29.8),
}
FEW = 30
"""Samples of a family below which a percentile bootstrap is too narrow to be trusted."""


def check(section: Section, timings: bool = True, rival: str | None = None) -> list[str]:
    """Warnings about one model on one task, each a sentence that names the rows.

    Args:
        section: what was measured.
        timings: whether to look at milliseconds too.
        rival: the method that rows are compared with beside `random`.
    """
    checks = [_missing, _samples, _few, _one_seed, _mixed, _positions, _twice, _monotone, _above_request]
    checks += [_above_peak, _below_floor] if timings else []
    found = [line for one in checks for line in one(section)]
    if rival is not None and (budgets := lacking(section, rival)):
        found.append(f"no row of {rival} on the same samples at {', '.join(budgets)}; nothing is compared with it there")
    return [f"{section.title}: {line}" for line in found]


def check_models(sections: Sequence[Section]) -> list[str]:
    """Warnings about the tables over all tasks of one model."""
    found = [f"{name} {', '.join(values)}" for name, values in _varying([row for section in sections for row in section.rows])]
    own = {name for section in sections for name, _ in _varying(section.rows)}
    across = [line for line in found if line.split()[0] not in own]
    return [f"{sections[0].name} over all tasks: mixes {line}" for line in across]


def _missing(section: Section) -> Iterator[str]:
    for rows in section.budgets.values() or [section.free]:
        title = budget_title(rows) if section.budgets else "without a budget"
        if missing := missing_baselines(section, rows):
            yield f"{title}: rows that belong here and are missing: {', '.join(missing)}"


def _samples(section: Section) -> Iterator[str]:
    reference = sum(map(len, section.reference.values()))
    for row in section.rows:
        if row.samples != section.reference:
            families = {family: set(ids) for family, ids in section.reference.items()}
            shared = sum(len(families.get(family, set()).intersection(ids)) for family, ids in row.samples.items())
            count = sum(map(len, row.samples.values()))
            yield f"{_name(section, row)} has {count} samples, {shared} of the {reference} of the others; it is not compared, ranked or drawn"


def _few(section: Section) -> Iterator[str]:
    if small := {family: len(ids) for family, ids in section.reference.items() if len(ids) < FEW}:
        counts = ", ".join(f"{family} {count}" for family, count in small.items())
        yield f"fewer than {FEW} samples ({counts}); differences and ranks at this size are hints, not findings"


def _one_seed(section: Section) -> Iterator[str]:
    """Says where `random` stands for one draw, and other methods are compared with it."""
    alone = [row for rows in section.budgets.values() for row in rows if row.method == "random" and len(row.seeds) < 2 and len(rows) > 1]
    if alone:
        budgets = ", ".join(dict.fromkeys(row.budget for row in alone))
        yield f"random has one seed at {budgets}: differences to it are differences to that draw; run it with --seeds 0,1,2"


def _mixed(section: Section) -> Iterator[str]:
    for name, values in _varying(section.rows):
        yield f"mixed {name} in one table: {', '.join(values)}"


def _varying(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    fields = [{**{k: row.fingerprint.get(k) for k in CONTEXT[:-1]}, **(row.fingerprint.get("versions") or {})} for row in rows]
    names = dict.fromkeys(name for own in fields for name in own)
    values = {name: sorted({str(own.get(name)) for own in fields}) for name in names}
    return [(name, found) for name, found in values.items() if len(found) > 1]


def _positions(section: Section) -> Iterator[str]:
    found: dict[object, dict[str, list[Row]]] = {}
    for row in section.rows:
        setting = str(row.fingerprint["settings"].get("position_ids"))
        found.setdefault((row.method, budget_key(row)), {}).setdefault(setting, []).append(row)
    for own in found.values():
        if len(own) > 1:
            first = next(iter(own.values()))[0]
            yield f"{first.method} {first.budget} stands with position_ids {' and '.join(sorted(own))}; these are different experiments"


def _twice(section: Section) -> Iterator[str]:
    found: dict[str, list[Row]] = {}
    for row in section.rows:
        found.setdefault(_name(section, row, plain=True), []).append(row)
    for name, rows in found.items():
        if len(rows) > 1:
            code = {str(row.fingerprint.get("code"))[:12] for row in rows}
            why = f"code {', '.join(sorted(code))}" if len(code) > 1 else "other samples, versions or settings that the table does not show"
            yield f"{name} stands in {len(rows)} rows: {why}"


def _monotone(section: Section) -> Iterator[str]:
    series: dict[str, list[Row]] = {}
    for row in section.comparable:
        if budget_key(row) is not None:
            series.setdefault(section.labels[row].rpartition(" #")[0] or section.labels[row], []).append(row)
    for rows in series.values():
        ordered = sorted(rows, key=lambda row: budget_key(row) or ())
        for more, fewer in pairwise(ordered):
            if budget_key(more) != budget_key(fewer) and section.resamples.difference(more, fewer).high < 0:
                yield (
                    f"{_name(section, fewer)} ({percent(fewer.macro)}) is above {more.budget} ({percent(more.macro)}) beyond the paired interval"
                )


def _above_request(section: Section) -> Iterator[str]:
    for row in section.rows:
        if row.keep is not None and row.most_retained is not None and row.most_retained > row.keep:
            yield f"{_name(section, row)} left {row.most_retained} visual tokens of one image"


def _above_peak(section: Section) -> Iterator[str]:
    for row in section.rows:
        own = section.measured(row)
        timed = [(own.get("latency_ms"), str(row.fingerprint["device"]), str(row.fingerprint["dtype"]))]
        timed += [(speed.of(row).get("prefill_ms"), speed.device, speed.dtype) for speed in section.speed]
        for ms, device, dtype in timed:
            peak = peak_tflops(device, dtype)
            if peak is not None and ms and (rate := 2 * own.get("tflops", 0) / (ms / 1000)) > peak:
                yield (
                    f"{_name(section, row)}: {rate:.0f} TFLOP/s in {ms:.3g} ms is above the {peak:.0f} of {device}; its time or tokens are wrong"
                )


def peak_tflops(device: str, dtype: str) -> float | None:
    """Returns the most that a device can do in a dtype, in TFLOP/s with multiply and add counted apart; None where it is not known.

    A GeForce has to be named to the end: `Ti` and `Laptop GPU` are other devices.
    """
    words = device.replace("-", " ").split()
    found = next((peaks for name, peaks in _PEAKS.items() if name in words or device.endswith(f" {name}")), None)
    return None if found is None else found[0] if dtype in ("float16", "bfloat16") else found[1]


def _below_floor(section: Section) -> Iterator[str]:
    for row, speed in itertools.product(section.rows, section.speed):
        own = speed.of(row)
        for time, floor in (("prefill_ms", "prefill_floor_ms"), ("latency_ms", "latency_floor_ms")):
            if row.method != FULL and own.get(time, 0) < 0.95 * own.get(floor, 0) and time in own:
                yield (
                    f"{_name(section, row)}: {time} {own[time]:.3g} in {speed.source} at batch {speed.batch} is below its floor {own[floor]:.3g}; "
                    "they were not measured alike"
                )


def check_speed(sections: Sequence[Section], speed: Sequence[Speed]) -> list[str]:
    """Warnings about records of `vtr bench` of which the report shows nothing."""
    found = {}
    for one in speed:
        own = [section for section in sections if one in section.speed]
        if not own:
            found[one.source] = f"{one.source} is about {one.models[0]}, of which there are no results here"
        elif not any(one.of(row) for section in own for row in section.rows):
            found[one.source] = f"{one.source} has no method with the settings and budgets of the results here"
        else:
            found.pop(one.source, None)
    return list(found.values())


def _name(section: Section, row: Row, plain: bool = False) -> str:
    """Returns label and budget; plain without what only tells equal names apart."""
    label = section.labels[row]
    return f"{label.rpartition(' #')[0] or label if plain else label} {row.budget}".strip()
