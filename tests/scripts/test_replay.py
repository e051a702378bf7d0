"""The replay runner, the kept copies of reference vectors, and the whole folder of them where it is at hand."""

import filecmp
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts.replay import Vector, close, list_replays, read_vector, replay_file, same_index, summary
from scripts.replay_vectors import main

ROOT = Path(__file__).parents[2]
KEPT = sorted((ROOT / "tests" / "vectors").glob("*.safetensors"))
SHARED = [
    f
    for f in sorted((ROOT.parent / "shared" / "reference-vectors").glob("*.safetensors"))
    if read_vector(f).method in list_replays() and not any(k.name == f.name and filecmp.cmp(k, f, shallow=False) for k in KEPT)
]
"""Vectors beside a checkout that are not kept byte for byte in it: those are replayed once."""
NON_COMMERCIAL = {"divprune", "tome", "centerclip", "prunevid"}


@pytest.mark.parametrize("path", KEPT, ids=lambda p: p.stem)
def test_a_kept_vector_passes(path: Path) -> None:
    result = replay_file(path)
    assert result.passed, result.reason


@pytest.mark.parametrize("path", SHARED, ids=lambda p: p.stem)
def test_a_shared_vector_passes(path: Path) -> None:
    result = replay_file(path)
    assert result.passed, result.reason


def test_kept_vectors_are_small_and_free() -> None:
    assert KEPT and sum(p.stat().st_size for p in KEPT) <= 8 * 2**20
    assert not {read_vector(p).method for p in KEPT} & NON_COMMERCIAL


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


FASTV = next(p for p in KEPT if p.stem == "fastv-keep64")


def test_method_and_parameters_may_be_plain_json_nested_or_in_the_file_name(tmp_path: Path) -> None:
    tensors = load_file(FASTV)
    plain = {"method": "fastv", "image_start": "35", "image_length": "576", "keep": "64"}
    nested = {"method": '"fastv"', "params": json.dumps({"image_start": 35, "image_length": 576})}
    unnamed = {k: v for k, v in plain.items() if k != "method"}
    for name, metadata in (("a", plain), ("b", nested), ("fastv-x-y", unnamed)):
        assert replay_file(write(tmp_path / f"{name}.safetensors", tensors, metadata)).passed
    family = read_vector(write(tmp_path / "c.safetensors", tensors, {"method": "tome-vit"}))
    assert family.method == "tome" and family.param("n", 3) == 3


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "missing.safetensors", "no such file"),
        (lambda folder: folder, "not a file"),
        (lambda folder: [f := folder / "fastv-x.safetensors", f.write_bytes(b"\x08garbage")][0], "not a readable safetensors file"),
        (lambda folder: write(folder / "nobody-1.safetensors", {"x": torch.zeros(1)}), "no replay for method 'nobody'; known: "),
        (lambda folder: write(folder / "fastv-1.safetensors", {"x": torch.zeros(1)}), "fastv: unknown schema with tensors x"),
        (lambda folder: write(folder / "fastv-2.safetensors", load_file(FASTV)), "fastv: no parameter 'image_start' in the metadata"),
    ],
    ids=["missing", "folder", "corrupt", "unknown method", "unknown schema", "parameter"],
)
def test_what_cannot_be_replayed_is_a_failed_line(tmp_path: Path, make, reason: str) -> None:
    result = replay_file(make(tmp_path))
    assert not result.passed and reason in result.reason and str(result).startswith("FAILED")


def altered(tmp_path: Path, source: Path, name: str) -> Path:
    tensors = load_file(source)
    value = tensors[name]
    tensors[name] = value.flip(0).contiguous() if value.dtype == torch.int64 else value + 1e-3
    with_metadata = read_vector(source)
    return write(tmp_path / source.name, tensors, {k: json.dumps(v) for k, v in with_metadata.params.items()})


@pytest.mark.parametrize("path", [p for p in KEPT if p.stem.startswith(("fastv", "shortv-layer"))], ids=lambda p: p.stem)
def test_changing_any_tensor_makes_the_replay_fail(tmp_path: Path, path: Path) -> None:
    for name in load_file(path):
        assert not replay_file(altered(tmp_path, path, name)).passed, name


class Recorded(dict):
    """Tensors that remember which of them were asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("path", KEPT, ids=lambda p: p.stem)
def test_every_tensor_of_a_vector_is_used(path: Path) -> None:
    vector = read_vector(path)
    tensors = Recorded(vector.tensors)
    with torch.no_grad():
        importlib.import_module(f"scripts.replay.{vector.method}").replay(replace(vector, tensors=tensors))
    weights = {name for name in tensors if name.startswith("layers.")}  # loaded all at once
    assert not set(vector.tensors) - weights - tensors.read


def test_comparisons() -> None:
    close("x", torch.tensor([100.0, torch.inf]), torch.tensor([100.0005, torch.inf]))
    with pytest.raises(AssertionError, match="x: largest difference 0.01"):
        close("x", torch.tensor([100.0]), torch.tensor([100.01]))
    with pytest.raises(AssertionError, match="x: inf or NaN in different places"):
        close("x", torch.tensor([torch.nan]), torch.tensor([torch.inf]))
    with pytest.raises(AssertionError, match="x: inf or NaN in different places"):
        close("x", torch.tensor([0.0]), torch.tensor([torch.nan]))
    with pytest.raises(AssertionError, match=r"x: shape \(1,\), expected \(2,\)"):
        same_index("x", torch.tensor([1]), torch.tensor([1, 2]))
    with pytest.raises(AssertionError, match="x: 1 of 3 differ, the first at 1: got 5, expected 2"):
        same_index("x", torch.tensor([1, 5, 3]), torch.tensor([1, 2, 3]))


def test_a_replay_that_compares_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scripts.replay.fastv as module

    def nothing(_vector: Vector) -> None: ...

    monkeypatch.setattr(module, "replay", nothing)
    assert "nothing was compared" in replay_file(FASTV).reason


@pytest.mark.slow
def test_the_script_prints_a_line_per_file_and_a_summary(tmp_path: Path, capsys) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "replay_vectors.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(script, capture_output=True, env=environment, check=False).returncode == 2
    assert main([str(FASTV), str(tmp_path / "x")]) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[-1] == "1 passed, 1 failed" and len(lines) == 3
    assert lines[0].startswith("ok") and lines[1].startswith("FAILED") and "Traceback" not in printed.err
    assert summary([]) == "0 passed, 0 failed"
