#!/usr/bin/env python
"""Prints the oracle table of this environment as markdown, for docs/oracles.md: largest absolute difference of logits by oracle and precision.

.venv/bin/python scripts/oracle_table.py > table.md             # LLaVA by oracle and precision, for docs/oracles.md
.venv/bin/python scripts/oracle_table.py --families > table.md  # every other family by mechanism, for docs/models.md
"""

import datetime
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from tests import oracles, tiny_models  # noqa: E402
from vtr.markdown import markdown_table  # noqa: E402

COLUMNS = [("sdpa", torch.float64), ("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)]


def cell(name: str, kinds: tuple[str, ...], attention: str, dtype: torch.dtype) -> str:
    """Returns the worst of all hosts."""
    if (attention == "eager" and name in oracles.ONLY_SDPA) or (dtype == torch.bfloat16 and name in oracles.DISCRETE):
        return "-"
    worst = max(oracles.ORACLES[name](oracles.Setup(kind, attention, dtype)) for kind in kinds)
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
    for name in set(names) - set(run):
        assert oracles.judged(name, oracles.Setup(kind)) == 0, f"{kind}: {name} must be refused"
    dtype = torch.float32 if kind.endswith("moe") else torch.float64
    found = [(oracles.judged(name, oracles.Setup(kind, dtype=dtype)), oracles.tolerance(name, dtype, kind)) for name in run]
    if not found:
        return "refused"
    worst = max(value for value, _ in found)
    return ("equal" if worst == 0 else f"{worst:.0e}") + ("" if all(value <= limit for value, limit in found) else " (!)")


def families() -> None:
    """Prints the table of the other families."""
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, CPU, {datetime.date.today()}.\n")
    body = [[f"`{kind}`", *(of_family(kind, names) for names in MECHANISMS.values())] for kind in tiny_models.OTHER_KINDS]
    print(markdown_table(["kind", *MECHANISMS], body))


def main() -> None:
    transformers.logging.set_verbosity_error()
    if "--families" in sys.argv[1:]:
        return families()
    kinds = tiny_models.ALL_KINDS
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, CPU, {datetime.date.today()}; worst of {', '.join(kinds)}.\n"
    )
    body = []
    for name, oracle in oracles.ORACLES.items():
        title = (oracle.__doc__ or "").split("\n")[0].rstrip(".").replace("O", "**O", 1).replace(":", "**", 1)
        body.append([title, *(cell(name, kinds, *column) for column in COLUMNS)])
    print(markdown_table(["oracle", *(f"{attention} {str(dtype)[6:]}" for attention, dtype in COLUMNS)], body))


if __name__ == "__main__":
    main()
