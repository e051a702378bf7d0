#!/usr/bin/env python
"""Prints the oracle table of this environment as markdown, for docs/oracles.md: largest absolute difference of logits by oracle and precision.

.venv/bin/python scripts/oracle_table.py > table.md             # LLaVA by oracle and precision, for docs/oracles.md
.venv/bin/python scripts/oracle_table.py --families > table.md  # every other family by mechanism, for docs/models.md
.venv/bin/python scripts/oracle_table.py --videos > table.md    # videos by mechanism, for docs/video.md
.venv/bin/python scripts/oracle_table.py --merge 1.md 2.md > table.md  # tables of several releases of transformers as one
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from scripts.pages.oracles import families, llava, merged, videos  # noqa: E402

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if "--merge" in sys.argv[1:]:
        print(merged([Path(name).read_text(encoding="utf-8") for name in sys.argv[2:]]), end="")
        sys.exit()
    print(families() if "--families" in sys.argv[1:] else videos() if "--videos" in sys.argv[1:] else llava())
