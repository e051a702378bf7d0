"""The notebooks run from any folder, and what they store is what a reader should see: pictures, no error, not much of it."""

from pathlib import Path

import pytest

from tests.docs.pages import ROOT

nbformat = pytest.importorskip("nbformat", reason="the extra `docs` is not installed")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300_000


def test_there_are_three() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["add_a_method", "compare", "quickstart"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_what_is_stored_is_whole(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from the top: make notebooks"
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert [output for output in outputs if {"image/png", "image/jpeg"} & set(output.get("data", {}))]
    assert file.stat().st_size < LARGEST and "FAIL" not in str(outputs)
    assert ROOT.as_posix() not in str(outputs) and "site-packages" not in str(outputs), "of somebody's machine"
    for number, cell in enumerate(cells):
        compile(cell.source, f"{file.name}, cell {number}", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_from_any_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.run_notebooks import run

    for name in ("PYTHONPATH", "PYTHONWARNINGS"):  # `run` sets them, and this puts them back
        monkeypatch.setenv(name, "")
    done, stored = run(file, tmp_path), nbformat.read(file, as_version=4)
    assert [cell.source for cell in done.cells] == [cell.source for cell in stored.cells]
    errors = [output for cell in done.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    assert not errors
