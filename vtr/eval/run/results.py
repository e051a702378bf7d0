"""One JSON file per cell: what was run (fingerprint), under which conditions, and the outcome of every sample.

A file is complete or not there: it is written beside its place, flushed to the disk and renamed. Reading trusts nothing: format, schema,
the key of the fingerprint and the digest of the content are checked.

Layout of a file:
    format, schema      "vtr-cell", 1
    key                 sha256 of the fingerprint; two cells with one key are the same experiment
    fingerprint         method, settings, seed, model, task, dtype, attention, device, versions, max_new_tokens, code (hash of our sources), and
                        min_pixels and max_pixels where they are not the processor's own; visuals (each, prompt) of a task with videos on a
                        model that takes images only; frame_scores (the model that scored frames) where a method reads that; a plan is `a+b` with
                        the settings of its methods in order under `plan`
    conditions          what may change times but not answers: batch size, threads, platform, git (commit, dirty), start, seconds
    summary             scores and means, derived from samples; `metrics` of the task's own making where it has some
    samples             one line per sample: id, family, answer, prediction, correct, frames (of a task with videos), visual_tokens and retained
                        per image or video, average_tokens, per_layer (visual tokens at each LLM layer), text_tokens, newlines (before, left),
                        latency_ms (its share of the batch), frame_scores (of its videos) and scorer_prompts, scorer_visual_tokens, scorer_tflops
                        and scorer_seconds (what scoring took, measured once for all cells) where a method reads them
    digest              sha256 of everything above
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vtr.files import write_atomic
from vtr.types import BUDGETS
from vtr.types.errors import WrongValue

FORMAT = "vtr-cell"
SCHEMA = 1
_PARTS = ("fingerprint", "conditions", "summary", "samples")


class ResultError(WrongValue):
    """A file in a result folder that is not a complete cell of ours."""


def content_hash(content: Any) -> str:
    """Returns the sha256 of the canonical JSON of `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def cell_path(folder: str | Path, fingerprint: dict[str, Any]) -> Path:
    """Returns the file of a result, readable and unique: `tiny-llava.fastv.keep-64.shapes.seed-0.1a2b3c4d5e6f.json`."""
    settings = fingerprint["settings"]
    budget = next((f"{k}-{settings[k]}" for k in BUDGETS if settings.get(k) is not None), None)
    seed = fingerprint["seed"]
    parts = [fingerprint["model"]["name"].split("/")[-1], fingerprint["method"], budget, fingerprint["task"]["name"]]
    parts.append(None if seed is None else f"seed-{seed}")
    readable = ".".join(re.sub(r"[^A-Za-z0-9._+-]", "-", str(part)) for part in parts if part is not None)
    return Path(folder) / f"{readable}.{content_hash(fingerprint)[:12]}.json"


def write_cell(folder: str | Path, **parts: Any) -> Path:
    """Writes one finished cell atomically.

    Args:
        folder: result folder, which exists.
        **parts: `fingerprint`, `conditions`, `summary`, `samples`.
    """
    fingerprint = parts["fingerprint"]
    content = {"format": FORMAT, "schema": SCHEMA, "key": content_hash(fingerprint), **{name: parts[name] for name in _PARTS}}
    content["digest"] = content_hash(content)
    path = cell_path(folder, fingerprint)
    write_atomic(path, _one_line_per_sample(content))
    return path


def _one_line_per_sample(content: dict[str, Any]) -> str:
    lines = [json.dumps(sample, allow_nan=False) for sample in content["samples"]]
    mark = content["key"]  # cannot occur among the samples' place
    frame = json.dumps({**content, "samples": f"samples {mark}"}, indent=1, allow_nan=False)
    return frame.replace(f'"samples {mark}"', "[\n  " + ",\n  ".join(lines) + "\n ]") + "\n"


def read_cell(path: str | Path) -> dict[str, Any]:
    """Returns one cell, checked.

    Raises:
        ResultError: truncated, foreign, of another schema, or changed since it was written.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        dangling = path.is_symlink() and isinstance(error, FileNotFoundError)
        reason = "it is a link to a file that is not there" if dangling else str(error.strerror).lower()
        raise ResultError(f"{path.name}: cannot be read ({reason})") from None
    except ValueError as error:
        raise ResultError(f"{path.name}: not complete JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ResultError(f"{path.name}: not a result of vtr eval")
    if content.get("schema") != SCHEMA:
        raise ResultError(f"{path.name}: schema {content.get('schema')!r}, this version reads {SCHEMA}")
    digest = content.pop("digest", None)
    if digest != content_hash(content) or content.get("key") != content_hash(content.get("fingerprint")):
        raise ResultError(f"{path.name}: content does not match its digest; it was edited or damaged")
    if any(name not in content for name in _PARTS):
        raise ResultError(f"{path.name}: parts missing")
    return content


def read_folder(folder: str | Path, leave: Collection[Path] = ()) -> tuple[list[dict[str, Any]], list[str]]:
    """All complete cells of a folder but those at the paths to leave out, ordered by file name, and one line for every `*.json` that is not one."""
    cells, problems = [], []
    for path in sorted(path for path in Path(folder).glob("*.json") if path not in leave):
        try:
            cells.append(read_cell(path))
        except ResultError as error:
            problems.append(str(error))
    return cells, problems


def prepare_folder(folder: str | Path) -> Path:
    """Returns the folder, created if needed and known to be writable.

    Raises:
        OSError: it cannot be created or written, with a message that says so.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, probe = tempfile.mkstemp(prefix=".probe.", dir=folder)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise OSError(f"out: cannot write to {str(folder)!r} ({error.strerror}); choose another folder with --out") from None
    return folder
