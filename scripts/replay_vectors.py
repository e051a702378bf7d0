#!/usr/bin/env python
"""Replays reference vectors: one line per file, the last line `N passed, N failed`. Exit code 1 if one failed.

Example: scripts/replay_vectors.py tests/vectors/*.safetensors
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.replay import replay_file, summary


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    results = []
    for path in paths:
        results.append(replay_file(path))
        print(results[-1], flush=True)
    print(summary(results))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
