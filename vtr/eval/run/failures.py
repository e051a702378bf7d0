"""Failed cells: what was run and how it ended, in the sub-folder `failed` of a result folder, so that no result is mistaken for one.

Layout of a file: format "vtr-failure", schema 1, fingerprint, error (one line), kind (of exception), traceback, when (UTC).
"""

from __future__ import annotations

import json
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from vtr.eval.run.results import cell_path
from vtr.files import write_atomic

FORMAT, SCHEMA = "vtr-failure", 1
_TEXTS = ("error", "kind", "traceback", "when")


class Failure(NamedTuple):
    """Why a cell has no result."""

    error: str
    kind: str
    traceback: str = ""


def failure_of(error: BaseException) -> Failure:
    """Returns what a file of a failure keeps of an exception."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return Failure(lines[0] if lines else type(error).__name__, type(error).__name__, "".join(traceback.format_exception(error)))


def failure_path(folder: str | Path, fingerprint: dict[str, Any]) -> Path:
    """Returns the file of a failure: in `failed` beside the results, under the name that the result would have."""
    path = cell_path(folder, fingerprint)
    return path.parent / "failed" / path.name


def write_failure(folder: str | Path, fingerprint: dict[str, Any], failure: Failure) -> Path:
    """Records a failed cell atomically; a later attempt replaces it, a later result removes it."""
    path = failure_path(folder, fingerprint)
    path.parent.mkdir(exist_ok=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"format": FORMAT, "schema": SCHEMA, "fingerprint": fingerprint, **failure._asdict(), "when": when}
    write_atomic(path, json.dumps(content, indent=1) + "\n")
    return path


def read_failure(path: Path) -> dict[str, Any] | None:
    """Returns a recorded failure, None when there is none or the file is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(content, dict) and content.get("format") == FORMAT and content.get("schema") == SCHEMA
    whole = whole and isinstance(content.get("fingerprint"), dict) and all(isinstance(content.get(name), str) for name in _TEXTS)
    return content if whole else None


def read_failures(folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns all recorded failures of a result folder, ordered by file name, and a line for every file among them that is not one."""
    found, problems = [], []
    for path in sorted((Path(folder) / "failed").glob("*.json")):
        content = read_failure(path)
        if content:
            found.append(content)
        else:
            problems.append(f"failed/{path.name}: not a record of a failed cell")
    return found, problems


def clear_failure(folder: str | Path, fingerprint: dict[str, Any]) -> None:
    """Forgets a failure, for there is a result now."""
    failure_path(folder, fingerprint).unlink(missing_ok=True)
