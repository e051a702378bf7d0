"""What the page says of a comparison."""

from __future__ import annotations

import re

from vtr.ui.explain import Explanation
from vtr.ui.session import Column, Comparison, PutBack, Refused

POSITIONS = {"keep": "kept as they were", "renumber": "counted anew after every removal"}


def escaped(text: str) -> str:
    """Returns text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", text)


def full_numbers(found: Comparison) -> str:
    """Returns tokens and milliseconds of the full model."""
    return _lines(
        f"{found.visual_tokens} visual tokens", f"{found.full.average_tokens:.1f} a layer", f"prefill {found.full.prefill_ms:.1f} ms"
    )


def numbers(found: Comparison, column: Column | Refused) -> str:
    """Returns tokens and milliseconds of a method, or why it did not run."""
    if isinstance(column, Refused):
        return escaped(column.why)
    outcome = column.outcome
    return _lines(
        f"{sum(outcome.retained)} of {found.visual_tokens} visual tokens",
        f"{outcome.average_tokens:.1f} a layer",
        f"prefill {outcome.prefill_ms:.1f} ms, {outcome.choosing_ms:.1f} choosing",
    )


def _lines(*lines: str) -> str:
    return "  \n".join(lines)


def report_of(column: Column) -> str:
    """Returns what the report says beside the tokens: lengths of the layers, positions, newline tokens, and what was warned of."""
    layers = ", ".join(map(str, column.entry["per_layer"]))
    lines = [f"visual tokens in the layers of the LLM: {layers}", f"positions: {POSITIONS[column.method.position_ids or 'keep']}"]
    if column.entry["newlines"]:
        lines.append(f"newline tokens left: {column.entry['newlines']}")
    if column.entry.get("per_frame"):
        lines.append(f"left of the frames: {', '.join(map(str, column.entry['per_frame']))}")
    return "\n".join(f"- {line}" for line in [*lines, *map(escaped, column.notes)])


def told(explanation: Explanation) -> str:
    """Returns an explanation."""
    return "\n".join(
        f"- {line}" for line in explanation.lines + ([explanation.fixed] if explanation.fixed and not explanation.kept else [])
    )


def told_back(back: PutBack) -> str:
    """Returns whether the answer changed."""
    tokens = ", ".join(map(str, back.tokens))
    left = f"token {tokens} back, {len(back.entry['retained'])} tokens left"
    if back.changed:
        return f"With {left}, the answer **changed**: {escaped(back.before)} became {escaped(back.after)}."
    return f"With {left}, the answer **did not change**: {escaped(back.after)}."
