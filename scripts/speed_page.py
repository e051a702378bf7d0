#!/usr/bin/env python
"""Writes the page of speeds from records of `vtr bench --json`: `python scripts/speed_page.py`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pages.speed import page
from vtr.bench.record import read_records
from vtr.files import write_atomic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/speed.md"))
    parser.add_argument("--records", type=Path, default=Path("eval/speed"), help="folder of records")
    given = parser.parse_args()
    found = read_records(given.records)
    write_atomic(given.page, page(found))
    print(f"{len(found)} records written to {given.page}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
