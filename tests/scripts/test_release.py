"""`make release-check` on wheels made up here: what it shows of them, and what it refuses."""

import runpy
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def release():
    return runpy.run_path(str(ROOT / "scripts" / "release.py"))


def wheel(folder: Path, **files: int) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(folder / "made.whl", "w") as archive:
        for name, size in files.items():
            archive.writestr(name, b"0" * size)
    return folder / "made.whl"


def test_a_good_wheel_is_shown_with_its_largest_files_first(release, tmp_path, capsys):
    given = {"small": 10_000, "large": 300_000}
    assert release["faults"](wheel(tmp_path / "wheel", **given), wheel(tmp_path / "sdist", **given)) == []
    assert capsys.readouterr().out.splitlines() == ["made.whl: 0.31 MB, 2 files", "    0.30 MB  large", "    0.01 MB  small"]


def test_a_large_wheel_and_one_with_other_files_than_the_sdist_are_refused(release, tmp_path):
    found = release["faults"](wheel(tmp_path / "wheel", a=20_000_000, weights=10), wheel(tmp_path / "sdist", a=1, notes=1))
    assert found == ["20.00 MB, more than 20", "not in both wheel and sdist: notes", "not in both wheel and sdist: weights"]


def test_a_command_that_fails_ends_the_check(release, tmp_path):
    with pytest.raises(SystemExit, match=r"said\n\nrelease: the command above failed"):
        release["run"](tmp_path, "sh", "-c", "echo said; exit 3")
    assert release["run"](tmp_path, "pwd").strip() == str(tmp_path)
