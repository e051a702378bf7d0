"""`vtr info METHOD`: everything about one method."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vtr.cli._common import out, reported
from vtr.cli.list_ import facts
from vtr.registry import default_settings, method_class
from vtr.types import BUDGETS, Method

SHARED = {
    "keep": "visual tokens left per image after the last removal",
    "keep_ratio": "the same as a share of the image's visual tokens, in (0, 1]",
    "average_keep": "the same as a mean over the LLM's layers",
    "position_ids": "keep: survivors keep their positions; renumber: 0, 1, 2, ... after every removal",
    "newlines": "newline tokens kept: rows (that still have a visual token), all or none",
    "seed": "of the random choice",
}


@reported
def info(method: Annotated[str, typer.Argument(help="Name of a method, see `vtr list`.")]) -> None:
    """Explain one method: paper, stage, signals, settings, cost."""
    from rich.table import Table

    cls = method_class(method)
    row = facts(cls.name)
    out.print(f"[bold]{cls.name}[/]  {row['title']}")
    facts_table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _lines(row, cls.card.code, cls.default_budget, adaptive_by_default(cls)):
        facts_table.add_row(f"[dim]{name}[/]", value)
    out.print(facts_table)
    settings = Table("setting", "default", "meaning", box=None, header_style="bold", pad_edge=False)
    meanings = {**SHARED, **cls.card.settings}
    for name, default in default_settings(cls).items():
        if cls.default_budget is None and name in BUDGETS:
            continue
        settings.add_row(name, "" if default is None else str(default), meanings.get(name, ""))
    out.print()
    out.print(settings)
    out.print()
    budget = "" if cls.default_budget is None else " --keep 64"
    out.print(f"vtr run --model tiny-llava --image FILE --question TEXT --method {cls.name}{budget}", style="dim", soft_wrap=True)


def adaptive_by_default(cls: type[Method]) -> bool:
    """Tells whether a method that takes a budget decides itself how many tokens stay when none is given."""
    try:
        return cls.default_budget is not None and cls().budget is None
    except TypeError:  # settings without a default
        return False


def _lines(row: dict[str, Any], code: str, budget: Any, adaptive: bool) -> list[tuple[str, str]]:
    paper = ", ".join(part for part in (row["paper"], row["venue"], f"arXiv {row['arxiv']}" if row["arxiv"] else "") if part)
    given = "none: the method has no budget" if budget is None else ", ".join(f"{k}={v:.4g}" for k, v in vars(budget).items() if v)
    given = "none: each image decides" if adaptive else given
    lines = [
        ("paper", paper),
        ("code", code),
        ("stage", ", ".join(row["stages"])),
        ("reads", row["signals"]),
        ("needs", ", ".join({"cls": "a CLS token", "text": "the question", "anyres": "AnyRes"}[need] for need in row["needs"])),
        ("cost", row["cost"]),
        ("budget", given + ("" if row["exact"] else "; not exact: the count depends on the image unless keep is given")),
        ("remarks", ", ".join(row["marks"])),
    ]
    return [(name, value) for name, value in lines if value]
