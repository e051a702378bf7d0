"""Plain references choose what the methods choose; the table of both is complete."""

import pytest
import torch

import vtr
from vtr.bench import selections, tables
from vtr.bench.cases import CASES, ONLY_CROPS, Given
from vtr.bench.plain import shared_out
from vtr.bench.plain_patch import merging
from vtr.ops.topk import quota
from vtr.registry import list_methods

SIZES = [pytest.param(1, 12, id="one view"), pytest.param(5, 40, id="five views")]


@pytest.mark.parametrize(("views", "keep"), SIZES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_plain_reference_keeps_the_same_tokens(name, batch, views, keep):
    if name in ONLY_CROPS and views == 1:
        return
    case = CASES[name](Given(views, batch, keep, grid=(6, 6), width=64, heads=4))
    ours, found = case.ours(), case.run_plain()
    chosen = ours.index if ours.keep is None else [mask.nonzero()[:, 0] for mask in ours.keep]
    assert len(chosen) == case.rows
    rows = list(zip(*found[0], strict=True)) if case.together else found
    for row, plain in enumerate(rows):
        index, values = plain if isinstance(plain, tuple) else (plain, None)
        assert chosen[row].tolist() == index.tolist()
        if values is not None:
            torch.testing.assert_close(ours.tokens[row] if ours.keep is None else ours.tokens[row, index], values, atol=1e-5, rtol=1e-5)


def test_cases_are_methods():
    assert set(CASES) <= set(list_methods()) and set(CASES) >= ONLY_CROPS


@pytest.mark.parametrize("seed", range(5))
def test_plain_shares_are_those_of_the_quota(seed):
    dice = torch.Generator().manual_seed(seed)
    weight, room = torch.rand(6, generator=dice).double(), torch.randint(1, 30, (6,), generator=dice)
    for total in range(int(room.sum()) + 1):
        assert shared_out(weight, room.tolist(), total) == quota(weight[None], room[None], torch.tensor([total]))[0].tolist()


def test_times_launches_and_memory_of_both_are_in_the_table(monkeypatch):
    monkeypatch.setattr(selections, "LEAST_MS", 0.1)
    monkeypatch.setattr(selections, "SIZES", {36: (1, 12), 180: (5, 40)})
    monkeypatch.setattr(selections, "Given", lambda *args, **kwargs: Given(*args, grid=(6, 6), width=64, heads=4, **kwargs))
    rows = selections.time_selections("cpu", repeats=2, methods=("divprune", "globalcom2"), tokens=(36, 180), batches=(1,))
    assert [(row["method"], row["tokens"]) for row in rows] == [("divprune", 36), ("divprune", 180), ("globalcom2", 180)]
    for row in rows:
        assert len(row["ms"]) == len(row["plain_ms"]) == 2 and min(*row["ms"], *row["plain_ms"]) > 0
        assert row["launches"] > 0 and row["plain_launches"] > 0 and row["waits"] == 0
        assert row["peak_bytes"] > 0 and row["plain_peak_bytes"] > 0
    assert rows[0]["map_bytes"] == 0 and rows[2]["map_bytes"] == 5 * 4 * 37**2 * 4
    head, body = tables.selections_table([*rows, {"method": "tome", "tokens": 36, "batch": 8, "left_out": "needs 9 GiB"}])
    assert len(body) == 4 and all(len(line) == len(head) for line in body)


@pytest.mark.parametrize(
    ("asked", "message"), [({"methods": ["fast"]}, "no plain reference for 'fast'"), ({"tokens": [12]}, "576 or 2880")]
)
def test_what_has_no_reference_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        selections.time_selections("cpu", **asked)


@torch.no_grad()
def test_a_plain_patch_of_a_vit_gives_the_logits_that_vtr_gives():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=4).eval()  # 36 patches and CLS
    pixels = torch.randn(2, 3, 96, 96)
    full = model(pixels)
    with vtr.reduced(model, "tome", keep=16):
        ours = model(pixels)
    with merging(model, [5] * 4):
        plain = model(pixels)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, full, atol=1e-4) and torch.equal(model(pixels), full), "and nothing stays"


def test_what_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(selections, "SIZES", {36: (1, 12), 180: (5, 40)})
    monkeypatch.setattr(selections, "Given", lambda *args, **kwargs: Given(*args, grid=(6, 6), width=64, heads=4, **kwargs))
    rows = selections.time_selections("cpu", methods=("divprune",), tokens=(36, 180), batches=(1,), longest_s=0.0)
    assert [row["left_out"] for row in rows] == ["more than 0 s for the reference"] * 2 and not any("ms" in row for row in rows)
