import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.schedule import checked_counts, checked_layers, least_average, nearest_table, scaled_layers, shares_of


@pytest.mark.parametrize("depth", [4, 5, 8, 12, 24, 28, 32, 40, 80])
@pytest.mark.parametrize("layers", [(8, 16, 24), (3, 7, 16), (2, 3, 4), (7, 9, 12)])
def test_scaled_layers_are_ascending_and_inside_the_llm(layers, depth):
    scaled = scaled_layers(layers, depth)
    assert len(scaled) == 3 and scaled[0] >= 1 and scaled[-1] < depth
    assert scaled[0] < scaled[1] < scaled[2]


def test_scaled_layers_keep_the_relative_depth():
    assert scaled_layers((8, 16, 24), 32) == (8, 16, 24)
    assert scaled_layers((8, 16, 24), 40) == (10, 20, 30)
    assert scaled_layers((3, 7, 16), 64) == (6, 14, 32)
    assert scaled_layers((2, 3, 4), 4) == (1, 2, 3)
    with pytest.raises(ValueError, match="3 removals needs an LLM of at least 4 layers, this one has 3"):
        scaled_layers((8, 16, 24), 3)


def test_shares_are_the_way_from_the_last_count_to_all():
    shares = shares_of((288, 144, 72), 576)
    assert [72 + round(s * (576 - 72)) for s in shares] == [288, 144, 72]
    assert shares_of((5, 5), 5) == (0.0, 0.0)


def test_least_average_is_the_mean_over_layers():
    per_layer = [1.0] * 8 + [0.5] * 8 + [0.25] * 8 + [0.0] * 8
    assert least_average((8, 16, 24), (0.5, 0.25, 0.0), 32) == pytest.approx(sum(per_layer) / 32)


def test_schedules_are_checked():
    assert checked_layers("x", None) is None and checked_counts("x", None, 2) is None
    assert checked_layers("x", [1, 5], 2) == (1, 5) and checked_counts("x", [9, 9], 2) == (9, 9)
    for wrong in ("12", [1.0], [True], 3):
        with pytest.raises(TypeError, match="x: layers must be a list"):
            checked_layers("x", wrong)
        with pytest.raises(TypeError, match="x: counts must be a list"):
            checked_counts("x", wrong, 2)
    for wrong in ([], [0, 2], [2, 2], [3, 1]):
        with pytest.raises(ValueError, match="x: layers must be ascending and at least 1"):
            checked_layers("x", wrong)
    with pytest.raises(ValueError, match="x: layers must name 3 layers"):
        checked_layers("x", [1, 2], 3)
    for wrong in ([5], [5, 6], [5, 0]):
        with pytest.raises(ValueError, match="x: counts must be 2 keep counts"):
            checked_counts("x", wrong, 2)


def test_the_nearest_table_is_taken_and_for_averages_one_within_reach():
    tables = {192: (309, 204, 113), 64: (82, 32, 18)}
    for keep, expected in ((113, 192), (400, 192), (18, 64), (1, 64)):
        assert nearest_table(tables, (3, 7, 16), 32, keep=keep / 576, n=576) == expected
    for average, expected in ((206, 192), (150, 192), (110, 64), (20, 64)):
        assert nearest_table(tables, (3, 7, 16), 32, average=average / 576, n=576) == expected


ascending = st.sets(st.integers(1, 31), min_size=1, max_size=5).map(sorted)


@given(ascending, st.integers(2, 80))
def test_any_schedule_lands_ascending_inside_any_llm(layers, depth):
    if len(layers) >= depth:
        with pytest.raises(ValueError, match=f"a schedule of {len(layers)} removals needs an LLM of at least"):
            scaled_layers(layers, depth)
        return
    scaled = scaled_layers(layers, depth)
    assert list(scaled) == sorted(set(scaled)) and len(scaled) == len(layers) and scaled[0] >= 1 and scaled[-1] < depth
    assert scaled_layers(layers, 32) == tuple(layers)


@given(ascending, st.integers(32, 80), st.data())
def test_the_least_average_is_the_mean_over_layers_of_what_is_left(layers, depth, data):
    count = len(layers)
    counts = sorted(data.draw(st.lists(st.integers(1, 576), min_size=count, max_size=count)), reverse=True)
    shares = shares_of(counts, 576)
    assert list(shares) == sorted(shares, reverse=True) and shares[-1] == 0 and shares[0] <= 1
    per_layer = [1.0 if layer < layers[0] else shares[sum(layer >= at for at in layers) - 1] for layer in range(depth)]
    assert least_average(layers, shares, depth) == pytest.approx(sum(per_layer) / depth)
