"""What was measured of each method, a line per model, task and budget: of the embedded checkpoints it comes with vtr, in `eval/measured`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vtr.eval.report.guard import REFERENCES, no_better
from vtr.eval.report.section import Section
from vtr.eval.report.tables import against
from vtr.eval.stats import Interval
from vtr.recipes import shared_folders
from vtr.types.errors import WrongValue

FILE = "embedded.csv"


@dataclass(frozen=True)
class Measured:
    """One method at one budget; scores are percent, empty where there is none.

    Args:
        on: model and task: `tiny-llava on shapes v1`.
        method: registry name.
        label: with what differs from its defaults: `fastv layer=3`.
        budget: `keep 64`, empty without one.
        macro, low, high: accuracy over families, and its 95 % interval.
        random, pool, full: macro accuracy of the rows that it is compared with.
        verdict: against `random`, in words.
        no_better: families on which it is not better than `random` or `pool`, joined by commas; `-` where it was not compared.
        tokens, average: visual tokens left at the end of the LLM, and their mean over its layers.
        samples, seeds: how many.
        versions: torch and transformers.
    """

    on: str
    method: str
    label: str
    budget: str
    macro: str
    low: str
    high: str
    random: str
    pool: str
    full: str
    verdict: str
    no_better: str
    tokens: str
    average: str
    samples: str
    seeds: str
    versions: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What a later measurement replaces."""
        return self.on, self.label, self.budget

    @property
    def setting(self) -> str:
        """Budget, and what differs from the defaults: `keep 144 frames=each`."""
        return " ".join(part for part in (self.budget, self.label.removeprefix(self.method).strip()) if part)

    @property
    def families_no_better(self) -> str:
        """`no_better` in words: families, `-` for none of them, empty where it was not compared."""
        return "" if self.no_better == "-" else self.no_better.replace(",", ", ") or "-"

    @property
    def score(self) -> str:
        """Macro accuracy with its interval: `87.6 (84.4-90.2)`."""
        return f"{self.macro} ({self.low}-{self.high})"


def measured_in(section: Section) -> list[Measured]:
    """Returns a line for every row of a section of a report, in the order of its budgets."""
    found = []
    for row in [*section.free, *(row for rows in section.budgets.values() for row in rows)]:
        partners = {name: section.partner(row, name) for name in REFERENCES}
        partners["full"] = section.full(row)
        shown = {name: "" if other is None or other is row else _percent(other.macro)[0] for name, other in partners.items()}
        own, versions = no_better(section, row), row.fingerprint.get("versions") or {}
        macro, low, high = _percent(row.macro)
        found.append(
            Measured(
                on=section.title,
                method=row.method,
                label=section.names[row],
                budget=row.budget,
                macro=macro,
                low=low,
                high=high,
                verdict=against(section, row).text,
                no_better="-" if own is None else ",".join(own),
                tokens=_number(row.means.get("retained")),
                average=_number(row.means.get("average_tokens")),
                samples=str(sum(map(len, row.samples.values()))),
                seeds=str(max(len(row.seeds), 1)),
                versions=", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions),
                **shown,
            )
        )
    return found


def read_measured(file: Path | None = None) -> list[Measured]:
    """Returns the lines of a file of `write_measured`; without one those that come with vtr, none where they are not installed.

    Raises:
        ValueError: the file has other columns.
    """
    if file is None:
        file = next((Path(folder, FILE) for folder in shared_folders("eval/measured") if Path(folder, FILE).is_file()), None)
        if file is None:
            return []
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        wanted = [one.name for one in fields(Measured)]
        if reader.fieldnames != wanted:
            raise WrongValue(f"read_measured: {file} needs the columns {', '.join(wanted)}, got {', '.join(reader.fieldnames or ())}")
        return [Measured(**row) for row in reader]


def merged(old: Iterable[Measured], new: Iterable[Measured]) -> list[Measured]:
    """Returns old lines with the new ones in their place: what was measured again counts once."""
    return list({one.key: one for one in (*old, *new)}.values())


def as_csv(lines: Sequence[Measured]) -> str:
    """Returns the content of a file that `read_measured` reads."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [one.name for one in fields(Measured)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(one) for one in lines)
    return stream.getvalue()


def _percent(value: Interval) -> list[str]:
    return [f"{100 * end:.1f}" for end in value]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
