"""Windows of videos, against every possible partition."""

from itertools import combinations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.static_windows import static_windows


def gain_of(close: list[list[bool]], start: int, end: int) -> int:
    return (end - start) * sum(all(close[t][p] for t in range(start + 1, end + 1)) for p in range(len(close[0])))


def best_gain(close: list[list[bool]], longest: int) -> int:
    frames, best = len(close), 0
    for number in range(frames):
        for cuts in combinations(range(1, frames), number):
            pieces = list(zip((0, *cuts), (*cuts, frames), strict=True))
            if all(stop - first <= longest for first, stop in pieces):
                best = max(best, sum(gain_of(close, first, stop - 1) for first, stop in pieces))
    return best


videos = st.integers(1, 6).flatmap(lambda t: st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=t, max_size=t))


@given(st.lists(videos, min_size=1, max_size=3), st.integers(1, 7))
def test_no_partition_saves_more(batch: list[list[list[bool]]], longest: int) -> None:
    most = max(map(len, batch))
    close, there = torch.zeros(len(batch), most, 3, dtype=torch.bool), torch.zeros(len(batch), most, dtype=torch.bool)
    for g, video in enumerate(batch):
        video[0] = [False] * 3
        close[g, : len(video)], there[g, : len(video)] = torch.tensor(video), True
    found = static_windows(close, there, longest)
    for g, video in enumerate(batch):
        starts = found.start[g, : len(video)].unique().tolist()
        pieces = list(zip(starts, [*starts[1:], len(video)], strict=True))
        for first, stop in pieces:
            assert stop - first <= longest
            assert found.start[g, first:stop].eq(first).all() and found.last[g, first:stop].eq(stop - 1).all()
            for t in range(first, stop):
                for p in range(3):
                    wanted = stop - first > 1 and all(video[u][p] for u in range(first + 1, stop))
                    assert bool(found.static[g, t, p]) == wanted
        assert int(found.gain[g]) == sum(gain_of(video, first, stop - 1) for first, stop in pieces) == best_gain(video, longest)


def test_ties_take_the_single_frame_then_the_shortest_window() -> None:
    close = torch.tensor([[[False], [True], [False], [True], [True]]])
    found = static_windows(close, torch.ones(1, 5, dtype=torch.bool))
    assert found.start[0].tolist() == [0, 0, 2, 2, 2]
    nothing = static_windows(torch.zeros(1, 4, 2, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool))
    assert nothing.start[0].tolist() == [0, 1, 2, 3] and int(nothing.gain) == 0


def best_windows(close: list[list[bool]]) -> list[tuple[int, int]]:
    """The card's dynamic programme in plain Python: windows (first, last), last frame inclusive."""
    best, came = [0], []
    for end in range(len(close)):
        value, start = best[end], end
        for first in range(end - 1, -1, -1):
            if best[first] + gain_of(close, first, end) > value:
                value, start = best[first] + gain_of(close, first, end), first
        best.append(value)
        came.append(start)
    found, end = [], len(close) - 1
    while end >= 0:
        found.append((came[end], end))
        end = came[end] - 1
    return found[::-1]
