"""The JSON that `vtr bench` leaves: where it ran, the options, and every counted round."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import vtr
from vtr.bench.stopwatch import clock_name
from vtr.types.errors import WrongValue

FORMAT, SCHEMA = "vtr-bench", 1
KEPT, FLOOR, METHOD = "kept floor", "schedule floor", "method"
"""Kinds of rows, beside `FULL`."""


def environment(device: torch.device) -> dict[str, Any]:
    """Returns device, driver, versions, clock and date."""
    import transformers

    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "kind": device.type,
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": None if cuda else round(os.getloadavg()[0], 1),
        "clock": clock_name(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vtr": vtr.__version__,
        },
        "date": str(datetime.datetime.now(datetime.UTC).date()),
    }


def make_record(kind: str, facts: Mapping[str, Any], **content: Any) -> dict[str, Any]:
    """Returns one record: `kind` is `model` (cells of a model) or `ops` (functions by themselves), `facts` from `environment`."""
    return {"format": FORMAT, "schema": SCHEMA, "kind": kind, "environment": dict(facts), **content}


def to_text(record: Mapping[str, Any]) -> str:
    """Returns JSON with milliseconds rounded to four digits behind the point."""
    return json.dumps(_rounded(record), indent=1, allow_nan=False) + "\n"


def read_records(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the name and content of all records of a folder, by name.

    Raises:
        ValueError: a `*.json` there is no record of this schema.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WrongValue(f"bench: {path.name} is not complete JSON ({error}); measure it again") from None
        if not is_record(content):
            raise WrongValue(f"bench: {path.name} is not a result of vtr bench with schema {SCHEMA}; measure it again or take it away")
        found.append((path.stem, content))
    return found


def is_record(content: Any) -> bool:
    """Tells whether the content of a JSON file is a record of this schema."""
    return isinstance(content, dict) and (content.get("format"), content.get("schema")) == (FORMAT, SCHEMA)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(v) for v in value]
    return value


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        names = [line.split(":", 1)[1].strip() for line in facts.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
