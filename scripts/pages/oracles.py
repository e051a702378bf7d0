"""The tables of oracles as markdown: LLaVA by oracle and precision, every other family by mechanism."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch
import transformers

from vtr.markdown import markdown_table
from vtr.testing import oracles, tiny_models
from vtr.testing.compare import Setup, against_masks
from vtr.testing.fake_flash import flash_attention
from vtr.testing.new_tokens import NEW_TOKENS
from vtr.testing.probes import EveryNth, MergePairs, Ragged

COLUMNS = [("sdpa", torch.float64), ("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)]


def cell(name: str, kinds: tuple[str, ...], attention: str, dtype: torch.dtype) -> str:
    """Returns the worst of all hosts."""
    if (attention == "eager" and name in oracles.ONLY_SDPA) or (dtype == torch.bfloat16 and name in oracles.DISCRETE):
        return "-"
    worst = max(oracles.ORACLES[name](Setup(kind, attention, dtype)) for kind in kinds)
    limit = oracles.tolerance(name, dtype)
    return ("equal" if worst == 0 else f"{worst:.1e}") + ("" if worst <= limit else " (!)")


MECHANISMS = {
    "nothing removed": ("O1",),
    "boundary": ("O3", "O3b", "O3c"),
    "inside the LLM": ("O4",),
    "frozen": ("O8",),
    "tower": ("O9", "O9b"),
    "batch = rows alone": ("O5",),
    "decoding": ("O6",),
    "static cache": ("O7",),
    "beams, embeddings, lookup": ("O7b", "O7c", "O12b"),
    "FlashAttention": ("O10",),
    "second turn": ("O12",),
}


def of_family(kind: str, names: tuple[str, ...]) -> str:
    """Returns the worst of some oracles on a kind of model, those that its host refuses left out."""
    run = [name for name in names if name not in tiny_models.FAMILIES[kind].refused]
    if "O10" in run and not _takes_flash_attention(kind):
        return "not even unreduced"
    for name in set(names) - set(run):
        assert oracles.judged(name, Setup(kind)) == 0, f"{kind}: {name} must be refused"
    dtype = torch.float32 if kind.endswith("moe") else torch.float64
    found = [(oracles.judged(name, Setup(kind, dtype=dtype)), oracles.tolerance(name, dtype, kind)) for name in run]
    if not found:
        return "refused"
    worst = max(value for value, _ in found)
    return ("equal" if worst == 0 else f"{worst:.0e}") + ("" if all(value <= limit for value, limit in found) else " (!)")


def _takes_flash_attention(kind: str) -> bool:
    """Whether the unreduced model runs on the stand-in kernels in this release of transformers."""
    model, batch = tiny_models.model_of(kind), tiny_models.batch_of(kind)
    try:
        with torch.no_grad(), flash_attention(model):
            model(**batch.inputs, use_cache=False)
    except AssertionError:
        return False
    return True


def families() -> str:
    """Returns the table of the other families by mechanism."""
    body = [[f"`{kind}`", *(of_family(kind, names) for names in MECHANISMS.values())] for kind in tiny_models.OTHER_KINDS]
    return f"{_versions()}.\n\n" + markdown_table(["kind", *MECHANISMS], body)


def videos() -> str:
    """Returns the table of videos by mechanism, in float64."""
    body = []
    for kind in tiny_models.VIDEO_KINDS:
        setup, mixed = Setup(kind, dtype=torch.float64), Setup(kind.replace("_clips", "_mixed"), dtype=torch.float64)
        both = [[EveryNth(stride=3), Ragged(stage="prefill", layer=2)], [MergePairs(), EveryNth(stage="prefill", layer=3)]]
        beside = max(against_masks(mixed, plan, mixed.batch(*tiny_models.MIXED)) for plan in both)
        more = [beside, *(oracle(setup) for oracle in NEW_TOKENS.values())]
        found = ["equal" if value == 0 else f"{value:.0e}" + ("" if value <= 1e-6 else " (!)") for value in more]
        body.append([f"`{kind}`", *(of_family(kind, names) for names in MECHANISMS.values()), *found])
    header = ["kind", *MECHANISMS, "images beside videos (O11)", "new tokens choose keys (O16)", "earlier keys go (O17)"]
    return f"{_versions()}.\n\n" + markdown_table(header, body)


def llava() -> str:
    """Returns the table of LLaVA by oracle and precision."""
    kinds, body = tiny_models.ALL_KINDS, []
    for name, oracle in oracles.ORACLES.items():
        title = (oracle.__doc__ or "").split("\n")[0].rstrip(".").replace("O", "**O", 1).replace(":", "**", 1)
        body.append([title, *(cell(name, kinds, *column) for column in COLUMNS)])
    header = ["oracle", *(f"{attention} {str(dtype)[6:]}" for attention, dtype in COLUMNS)]
    return f"{_versions()}; worst of {', '.join(kinds)}.\n\n" + markdown_table(header, body)


def merged(tables: Sequence[str]) -> str:
    """Returns tables that this module made under several releases of transformers as one: a number where they agree, else all, `a / b`.

    Raises:
        ValueError: they differ in more than the release of transformers and their numbers.
    """
    heads, *rows = zip(*(table.strip().splitlines() for table in tables), strict=True)
    releases = [head.removeprefix("transformers ").split(",")[0] for head in heads]
    rests = {head.split(",", 1)[1] for head in heads}
    if len(rests) > 1:
        raise ValueError(f"merged: tables must be of one torch and one day, got {sorted(rests)}; run them again")
    cells = [list(zip(*(line.split(" | ") for line in same), strict=True)) for same in rows]
    body = "\n".join(" | ".join(one[0] if len(set(one)) == 1 else _all_of(one) for one in row) for row in cells)
    return f"transformers {' / '.join(releases)} (one number where they agree),{rests.pop()}\n{body}\n"


def _all_of(cells: Sequence[str]) -> str:
    """Returns `a / b` of cells, the last of a row with its border."""
    border = " |" if cells[0].endswith(" |") else ""
    return " / ".join(cell.removesuffix(" |") for cell in cells) + border


def _versions() -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__}, CPU, {datetime.date.today()}"
