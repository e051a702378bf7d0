"""EVS against the card in plain Python, and vLLM's counts."""

import pytest
import torch
from torch.nn import functional as F

from tests.methods.videos import VIDEOS, budgets, check_all, frames_of_video, kept, only_step, select
from tests.views import Video, video_view
from vtr.methods.evs import EVS, evs_count
from vtr.types import Boundary, Budget


def reference(video: Video, keep: int) -> list[int]:
    """The card, token by token in float64."""
    frames, places = frames_of_video(video), video.grid[0] * video.grid[1]
    new, known = [], []
    for t, frame in enumerate(frames):
        for place, token in frame.items():
            before = frames[t - 1].get(place) if t else None
            if before is None:
                new.append(t * places + place)
            else:
                known.append((1 - float(F.cosine_similarity(token, before, dim=0)), -(t * places + place)))
    if keep < len(new):
        return [new[(2 * i + 1) * len(new) // (2 * keep)] for i in range(keep)]
    return sorted(new + [-number for _, number in sorted(known, reverse=True)[: keep - len(new)]])


@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_it_is_the_card(video: Video) -> None:
    for keep in budgets(video):
        view = video_view([video], keep)
        assert kept(select(EVS(), view), view) == reference(video, keep)


def test_what_every_method_for_videos_promises() -> None:
    check_all(EVS())


def test_the_first_frame_stays_and_quiet_frames_may_keep_nothing() -> None:
    video = Video(4, (2, 3), scenes=2, grain=0.0)
    view = video_view([video], 12)
    assert kept(select(EVS(), view), view) == [*range(6), *range(12, 18)], "the second scene starts at frame 2"


def test_counts_of_vllm() -> None:
    assert evs_count(10, 100, 0.9) == 100
    assert evs_count(20, 50, 0.9) == 99, "1 - 0.9 is a little below 0.1"
    assert evs_count(1, 50, 0.9) == 50


def test_settings() -> None:
    assert EVS().budget == Budget(keep_ratio=0.3) and only_step(EVS()).where == Boundary()
    with pytest.raises(ValueError, match="evs: compat must be None or 'authors', got 'vllm'"):
        EVS(compat="vllm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="evs: sees the frames of a video together, got frames='each'"):
        EVS(frames="each")


def test_half_precision_ties_are_not_decided_by_rounding() -> None:
    video = Video(3, (4, 4), grain=0.01)
    half = video_view([video], 20, dtype=torch.bfloat16)
    assert len(kept(select(EVS(), half), half)) == 20
