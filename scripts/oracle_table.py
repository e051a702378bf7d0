#!/usr/bin/env python
"""Prints the oracle table of this environment as markdown, for docs/oracles.md: largest absolute difference of logits by oracle and precision.

.venv/bin/python scripts/oracle_table.py > table.md
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


def main() -> None:
    transformers.logging.set_verbosity_error()
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
