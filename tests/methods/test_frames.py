"""Whole frames, against the formula in plain Python."""

import pytest

from tests.methods.videos import VIDEOS, budgets, check_all, kept, only_step, select
from tests.views import Video, video_view
from vtr.methods.frames import WholeFrames
from vtr.types import Boundary, Budget


def spaced(n: int, keep: int) -> list[int]:
    return [((2 * i + 1) * n) // (2 * keep) for i in range(keep)]


def reference(video: Video, keep: int) -> list[int]:
    places = video.grid[0] * video.grid[1]
    frames = [[n for n in video.left().tolist() if n // places == t] for t in range(video.frames)]
    frames = [frame for frame in frames if frame]
    for number in range(1, len(frames) + 1):
        chosen = [frames[t] for t in spaced(len(frames), number)]
        if sum(map(len, chosen)) >= keep:
            break
    left, found = keep, []
    for frame in chosen:
        own = min(left, len(frame))
        found += [frame[i] for i in spaced(len(frame), own)]
        left -= own
    return found


@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_it_is_the_formula(video: Video) -> None:
    for keep in budgets(video):
        view = video_view([video], keep)
        assert kept(select(WholeFrames(), view), view) == reference(video, keep)


def test_what_every_method_for_videos_promises() -> None:
    check_all(WholeFrames())


def test_a_multiple_of_a_frame_keeps_whole_frames_and_the_rest_is_of_the_last() -> None:
    view = video_view([Video(8, (2, 2))], 8)
    assert kept(select(WholeFrames(), view), view) == [*range(8, 12), *range(24, 28)]
    view = video_view([Video(8, (2, 2))], 6)
    assert kept(select(WholeFrames(), view), view) == [*range(8, 12), 25, 27]


def test_settings() -> None:
    assert WholeFrames().budget == Budget(keep_ratio=0.25) and only_step(WholeFrames()).where == Boundary()
