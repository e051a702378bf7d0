"""Cost of choosing on a small shape: every number is measured, the share is of the full model's prefill."""

import pytest

from vtr.bench.choosing import markdown, measure
from vtr.bench.shapes import TINY, build


@pytest.mark.parametrize(("anyres", "tokens"), [(False, 36), (True, 180)])
def test_choosing_is_measured_against_the_full_prefill(anyres, tokens):
    model, inputs = build(TINY, anyres)
    rounds = []
    base, costs = measure(model, inputs, [("random", {"keep": 9}), ("fastv", {"keep": 9, "layer": 1})], 2, lambda: rounds.append(1))
    assert len(rounds) == 6 and base > 0
    assert [cost.method for cost in costs] == ["random", "fastv"]
    assert all(cost.choosing_ms > 0 and cost.share == pytest.approx(100 * cost.choosing_ms / base) for cost in costs)
    table = markdown("llava-tiny", tokens, base, costs)
    assert f"{tokens} visual tokens" in table and table.count("\n| ") == 3
    assert not model._forward_hooks and not model.model._forward_pre_hooks
