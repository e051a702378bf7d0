from dataclasses import replace

import pytest
import torch

from scripts.replay._llama import rope
from tests.methods.handmade import IMAGES, LLAVA, chosen, make_view, select_without_sync
from vtr.methods.sparsevlm_plus import TABLES, SparseVLMPlus, corrected_score, gravity
from vtr.types import Budget

DEEP = replace(LLAVA, llm_layers=32, most_tokens=576)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_gravity_is_the_product_of_rotated_ones(head_dim):
    position = torch.tensor([[0, 3, 17, 100, 611]])
    ones = rope(torch.ones(1, 5, 1, head_dim), position)[0, :, 0]
    got = gravity(position, position, head_dim)
    torch.testing.assert_close(got[0], (ones @ ones.T * head_dim**-0.5).double(), atol=1e-4, rtol=0)
    assert torch.allclose(gravity(position + 1000, position + 1000, head_dim), got)


def test_scores_are_those_of_the_definition():
    random = torch.Generator().manual_seed(0)
    rows, pull = torch.rand(2, 5, 4, 6, generator=random), torch.rand(2, 4, 6, generator=random) + 0.5
    by, real = torch.tensor([[True, False, True, True], [False, True, False, False]]), torch.ones(2, 6, dtype=torch.bool)
    real[1, :2] = False
    got = corrected_score(rows, by, real, pull, 3)
    for g in range(2):
        light = (rows[g].double() / pull[g])[:, by[g]][:, :, real[g]]
        heads = light.sum((1, 2)).topk(3).indices
        torch.testing.assert_close(got[g, real[g]], light[heads].mean((0, 1)))
        assert not got[g, ~real[g]].any()
    torch.testing.assert_close(corrected_score(rows, by, real, pull, 99), corrected_score(rows, by, real, pull, 5))


def with_rows(view, step):
    rows = torch.rand(3, view.text.real.shape[1], 3000, generator=torch.Generator().manual_seed(2))[:, :, view.patch]
    view.signals = {step.needs[0]: rows.permute(2, 0, 1, 3)}
    return view


@pytest.mark.parametrize("position_ids", ["keep", "renumber"])
def test_batch_and_padding_change_nothing(position_ids):
    method = SparseVLMPlus(position_ids=position_ids)
    first, step, *_ = method.steps(LLAVA)

    def kept(view):
        first.select(view)
        return chosen(view, step.select(with_rows(view, step)).keep)

    together = kept(make_view(IMAGES, 12))
    assert [len(k) for k in together] == [12] * 4
    for image, expected in zip(IMAGES, together, strict=True):
        assert torch.equal(kept(make_view([image], 12, filler=4))[0], expected)


def test_selections_never_wait_for_the_device():
    view = make_view(IMAGES, 9)
    first, step, *_ = SparseVLMPlus(position_ids="renumber").steps(LLAVA)
    select_without_sync(first, view)
    first.select(view)
    select_without_sync(replace(step, select=lambda v: step.select(replace(v, per_token={"place": v.patch}))), with_rows(view, step))


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_schedules_and_budgets(table):
    method = SparseVLMPlus(table=table)
    assert method.budget == Budget(keep_ratio=TABLES[table][-1] / 576)
    last = method.budget.resolve(576)
    stages = method.steps(DEEP)[1:]
    assert [(s.layer, last + round(s.share * (576 - last))) for s in stages] == list(zip((3, 7, 16), TABLES[table]))
    assert all(s.needs[0].heads and s.needs[0].layer == s.layer - 1 for s in stages)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="table must be one of 192, 128, 96, 64"):
        SparseVLMPlus(table=1)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        SparseVLMPlus(heads=0)
    with pytest.raises(ValueError, match="rope_base must be above 0"):
        SparseVLMPlus(rope_base=0)
    with pytest.raises(ValueError, match="is a budget already"):
        SparseVLMPlus(counts=(3, 2, 1), keep=3)
