"""`vtr info METHOD`: everything about one method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.cli._common import out, reported
from vtr.cli.list_ import facts
from vtr.registry import method_class
from vtr.types import BUDGETS
from vtr.types.errors import WrongValue
from vtr.types.settings import default_settings

SHARED = {
    "keep": "visual tokens left per image, or whole video, after the last removal",
    "keep_ratio": "the same as a share of the image's visual tokens, in (0, 1]",
    "average_keep": "the same as a mean over the LLM's layers",
    "position_ids": "keep: survivors keep their positions; renumber: 0, 1, 2, ... after every removal; the default is the published one",
    "newlines": "newline tokens kept: rows (that still have a visual token), all or none",
    "frames": "what it sees of a video: each (frame as an image, with its share of the budget) or all (of them as one image); default: its own",
    "seed": "of the random choice",
}


@reported
def info(
    method: Annotated[str, typer.Argument(help="Name of a method, see `vtr list`.")],
    results: Annotated[
        list[Path] | None, typer.Option(help="Folder of vtr eval or sweep to show in place of what comes with vtr; repeatable.")
    ] = None,
) -> None:
    """Explain one method: paper, stage, signals, settings, cost, and what was measured of it."""
    from rich.table import Table

    cls = method_class(method)
    row = facts(cls.name)
    out.print(f"[bold]{cls.name}[/]  {row['title']}")
    facts_table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _lines(row, cls.card.code, cls.default_budget):
        facts_table.add_row(f"[dim]{name}[/]", value)
    out.print(facts_table)
    settings = Table("setting", "default", "meaning", box=None, header_style="bold", pad_edge=False)
    meanings = {**SHARED, **cls.card.settings}
    for name, default in default_settings(cls).items():
        if not cls.takes_budget and name in BUDGETS:
            continue
        settings.add_row(name, "" if default is None else str(default), meanings.get(name, ""))
    out.print()
    out.print(settings)
    _print_measured(cls.name, results or [])
    out.print()
    budget = " --keep 64" if cls.takes_budget else ""
    shown = "tiny-llava-video --video" if cls.card.needs_video else "tiny-llava --image"
    out.print(f"vtr run --model {shown} FILE --question TEXT --method {cls.name}{budget}", style="dim", soft_wrap=True)


def _print_measured(method: str, folders: list[Path]) -> None:
    """Prints what was measured of a method, in the folders or in the file that comes with vtr; nothing where nothing was."""
    from rich.table import Table

    from vtr.eval.measured import measured_in, read_measured
    from vtr.eval.report import read_folders
    from vtr.eval.report.build import sections_of

    for folder in folders:
        if not folder.is_dir():
            raise WrongValue(f"info: no folder {str(folder)!r}; fill one with vtr eval --out first")
    lines = [one for section in sections_of(read_folders(folders)[0]) for one in measured_in(section)] if folders else read_measured()
    own = [one for one in lines if one.method == method]
    out.print()
    if not own:
        where = f"in {', '.join(map(str, folders))}" if folders else "on the embedded checkpoints"
        out.print(f"measured: nothing of {method} {where}", style="dim", soft_wrap=True)
        return
    table = Table(
        "measured on", "budget", "macro accuracy", "random", "pool", "full", "tokens", "average", "not better than random or pool on"
    )
    table.box, table.pad_edge, table.header_style = None, False, "bold"
    for one in own:
        others = (one.random, one.pool, one.full, one.tokens, one.average, one.families_no_better)
        table.add_row(one.on, one.setting, one.score, *others)
    out.print(table)


def _lines(row: dict[str, Any], code: str, budget: Any) -> list[tuple[str, str]]:
    paper = ", ".join(part for part in (row["paper"], row["venue"], f"arXiv {row['arxiv']}" if row["arxiv"] else "") if part)
    given = "none: the method has no budget" if budget is None else ", ".join(f"{k}={v:.4g}" for k, v in vars(budget).items() if v)
    given = "none: each image decides; with keep exactly so many stay" if row["adaptive"] else given
    lines = [
        ("paper", paper),
        ("code", code),
        ("stage", ", ".join(row["stages"])),
        ("reads", row["signals"]),
        (
            "needs",
            ", ".join(
                {"cls": "a CLS token", "text": "the question", "anyres": "AnyRes", "video": "a video"}[need] for need in row["needs"]
            ),
        ),
        ("cost", row["cost"]),
        ("budget", given + ("" if row["exact"] else "; not exact: at most so many stay")),
        ("remarks", ", ".join(row["marks"])),
    ]
    return [(name, value) for name, value in lines if value]
