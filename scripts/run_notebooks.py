#!/usr/bin/env python
"""Runs notebooks/*.ipynb and stores what they print and draw: `make notebooks`, or with names of files."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def run(file: Path, folder: Path) -> nbformat.NotebookNode:
    """Returns a notebook as it is after all its cells have run in `folder`, with nothing in it that depends on the run but the outputs."""
    notebook = nbformat.read(file, as_version=4)
    os.environ.update(
        PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore:IProgress"
    )  # of the kernel; the widgets that tqdm looks for are not needed
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        for data in (output.get("data", {}) for output in cell.get("outputs", ())):
            if "image/jpeg" in data:  # a picture of PIL, which is there as a large PNG, too
                del data["image/png"]
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    return notebook


def main(names: list[str]) -> int:
    for file in [Path(name).resolve() for name in names] or sorted((ROOT / "notebooks").glob("*.ipynb")):
        os.makedirs(ROOT / "out", exist_ok=True)
        nbformat.write(run(file, ROOT / "out"), file)
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
