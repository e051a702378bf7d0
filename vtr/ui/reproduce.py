"""A comparison as a command and as a script; both run as they stand."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from typing import Any

from vtr.types import Method
from vtr.ui.session import Comparison, Session

_SCRIPT = """\
import vtr
{imports}
from vtr.eval.run.compare import compare
from vtr.models.loading import load_model

model, processor = load_model({name!r}, device={device!r}, dtype={dtype!r})
method = vtr.create_method({method})
found = compare(model, processor, {images}, {question!r}, method, max_new_tokens={tokens}, videos={videos})
print(found.full.answer, "|", found.reduced.answer, "|", found.reduced.retained)
"""


def command(session: Session, found: Comparison, method: Method) -> str:
    """Returns the `vtr run` command of one method of a comparison."""
    media = found.media
    parts = ["vtr", "run", "--model", session.name, f"--{media.kind}", str(media.path), "--question", found.question]
    parts += ["--frames", str(media.frames)] if media.video else []
    parts += ["--method", method.name]
    for name, value in _settings(method).items():
        options = {"keep": "--keep", "keep_ratio": "--keep-ratio"}
        parts += [options[name], str(value)] if name in options else ["--set", f"{name}={json.dumps(value)}"]
    parts += ["--max-new-tokens", str(found.max_new_tokens)]
    parts += ["--device", session.device] if session.device else []
    parts += ["--dtype", session.dtype] if session.dtype != "auto" else []
    return shlex.join(parts)


def script(session: Session, found: Comparison, method: Method) -> str:
    """Returns a Python script of one method of a comparison."""
    media, path = found.media, str(found.media.path)
    return _SCRIPT.format(
        imports="from vtr.data.frames import read_video" if media.video else "from vtr.data.pictures import open_image",
        name=session.name,
        device=session.device,
        dtype=session.dtype,
        method=", ".join([repr(method.name), *(f"{name}={value!r}" for name, value in _settings(method).items())]),
        images="[]" if media.video else f"[open_image({path!r})]",
        videos=f"[read_video({path!r}, {media.frames})]" if media.video else "()",
        question=found.question,
        tokens=found.max_new_tokens,
    )


def _settings(method: Method) -> dict[str, Any]:
    """Returns the settings that are not a default of the method."""
    shown = {f.name: getattr(method, f.name) for f in fields(method)}
    return {f.name: shown[f.name] for f in fields(method) if shown[f.name] != f.default and f.name not in ("position_ids", "frames")}
