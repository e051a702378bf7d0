"""Rows of the dense table: intervals, equal work, files."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.pages import dense


def counts(*right: int) -> np.ndarray:
    """One scene each, two classes of 10 pixels, so many of either right."""
    found = np.zeros((len(right), 8, 8), dtype=np.int64)
    for scene, n in enumerate(right):
        found[scene, :2, :2] = [[n, 10 - n], [10 - n, n]]
    return found


def row(label: str, method: str, miou: float, speed: float) -> dense.DenseRow:
    return dense.DenseRow(label, method, {}, miou, (miou - 90, -3.0, 1.0), [miou] * 8, [576, 289], 1.5, speed, 2.0, 10.0)


def test_mean_iou_is_over_all_pixels_of_all_scenes():
    assert dense.mean_iou(counts(10, 10)) == 100
    assert dense.mean_iou(counts(10, 0)) == pytest.approx(100 * 10 / 30)


def test_the_interval_is_paired():
    full = counts(*[10, 4] * 20)
    assert dense.change(full, full) == (0, 0, 0)
    worse = counts(*[9, 3] * 20)
    found, low, high = dense.change(worse, full, resamples=200)
    assert low < found < high < 0
    assert found == pytest.approx(dense.mean_iou(worse) - dense.mean_iou(full))
    assert high - low < 5  # scenes differ by far more


def test_table_file_and_plot(tmp_path: Path):
    table = [row("full", "full", 90, 10), row("expedit alpha=3", "expedit", 88, 15)]
    text = dense.markdown(table)
    assert "| expedit alpha=3 | 289 | 1.50 | 88.0 | -2.0 (-3.0 to +1.0) | 15.0 | 1.50 | 10 |" in text
    dense.write_rows(tmp_path / "dense.json", table, {"scenes": 5})
    content = json.loads((tmp_path / "dense.json").read_text())
    assert content["format"] == "vtr-dense" and content["rows"][1]["miou"] == 88 and content["conditions"] == {"scenes": 5}
    dense.plot(table, tmp_path / "dense.svg")
    assert "alpha=3" in (tmp_path / "dense.svg").read_text()
