"""FastV: the choice itself, its signal, and the layers it accepts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.views import grid_cells, one_row, view_of
from vtr.methods.fastv import FastV, fastv_score
from vtr.ops.topk import topk_mask
from vtr.types import Budget, Geometry, Signal

GEOMETRY = Geometry("test", 4, 2, 1, True, (6, 6), 5, 36)


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_the_highest_mean_attention_stays_and_ties_go_to_the_lowest_index(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randint(0, 4, (1, 3, n), generator=generator) / 4
    score = fastv_score(attention)
    mean = [sum(attention[0, h, i].item() for h in range(3)) / 3 for i in range(n)]
    torch.testing.assert_close(score[0], torch.tensor(mean))
    exact = [sum(int(attention[0, h, i] * 4) for h in range(3)) for i in range(n)]
    for keep in range(n + 1):
        kept = topk_mask(torch.tensor([exact]), torch.ones(1, n).bool(), torch.tensor([keep]))[0].nonzero()[:, 0].tolist()
        assert kept == sorted(sorted(range(n), key=lambda i: (-exact[i], i))[:keep])


def test_reads_the_last_tokens_row_of_the_layer_before() -> None:
    row = Signal("rows", layer=2, queries="last")
    (step,) = FastV(layer=3, keep=4).steps(GEOMETRY)
    assert (step.stage, step.layer, step.needs) == ("prefill", 3, (row,)) and step.select is not None
    score = torch.rand(2, 36)
    view = view_of([grid_cells(6, 6), grid_cells(4, 5)], [4, 7], (6, 6), signals={row: score})
    keep = step.select(view).keep
    assert keep.sum(1).tolist() == [4, 7] and not (keep & ~view.real).any()
    assert keep[0].nonzero()[:, 0].tolist() == score[0].topk(4).indices.sort().values.tolist()
    assert torch.equal(step.select(one_row(view, 1)).keep[0], keep[1, :20])


def test_defaults_are_the_papers_headline_setting() -> None:
    assert FastV().budget == Budget(keep_ratio=0.5) and FastV().layer == 2 and FastV.published_positions == "keep"
    assert Budget(keep_ratio=0.5).resolve(575) == 288 and Budget(keep_ratio=0.5).resolve(577) == 288  # half to even, as the authors


def test_layer_zero_is_refused_and_the_papers_number_named() -> None:
    with pytest.raises(ValueError, match=r"fastv: layer must be at least 1, got 0 \(the paper's K = 0\)"):
        FastV(layer=0)
    with pytest.raises(TypeError, match="fastv: layer must be an integer, got '2'"):
        FastV(layer="2")  # type: ignore[arg-type]


def test_a_layer_out_of_range_names_both_numbers() -> None:
    assert FastV(layer=4).steps(GEOMETRY)
    with pytest.raises(ValueError, match=r"fastv: layer 5 \(the paper's K = 5\) is out of range: this LLM has 5 layers; use 1 to 4"):
        FastV(layer=5).steps(GEOMETRY)
