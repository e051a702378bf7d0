"""`make lock` on an environment made up here: what it follows, and how it writes it."""

import importlib.util
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "lock.py"


@pytest.fixture
def lock(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("lock", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TARGET", tmp_path / "tested.txt")
    monkeypatch.syspath_prepend(tmp_path)
    return module


def install(folder, name, version, *requires):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    (info / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")


def test_what_is_required_directly_or_not_is_pinned_and_nothing_else(lock, tmp_path):
    ours = ("made-torch>=2", "made-b[fast]>=1; extra == 'eval'", "made-page; extra == 'page'", "made-windows; sys_platform == 'made up'")
    install(tmp_path, "visual-token-reduction", "0.1.0", *ours)
    install(tmp_path, "made-torch", "2.13.0+cpu", "Made_C")
    install(tmp_path, "made-b", "1.5", "made-quick; extra == 'fast'", "visual-token-reduction")
    install(tmp_path, "made-quick", "3")
    install(tmp_path, "Made_C", "0.1rc1", "made-torch")
    install(tmp_path, "made-bystander", "9")
    assert lock.main() == 0
    header, *pins = lock.TARGET.read_text().splitlines()
    assert pins == ["made-b==1.5", "made-c==0.1rc1", "made-quick==3", "made-torch==2.13.0"]
    assert re.fullmatch(r"# .*`make lock`: \d{4}-\d\d-\d\d, Python 3\.\d+\.\d+, \w+ \w+\.", header)


def test_a_package_that_is_missing_is_named_and_nothing_is_written(lock, tmp_path, capsys):
    install(tmp_path, "visual-token-reduction", "0.1.0", "made-up-and-missing")
    assert lock.main() == 1
    assert re.search(
        r"lock: made-up-and-missing is not installed in .*; run `make test` in this environment first", capsys.readouterr().err
    )
    assert not lock.TARGET.exists()
