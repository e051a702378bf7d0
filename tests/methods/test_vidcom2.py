"""VidCom2 against the card in plain Python."""

import math

import pytest
import torch
from torch import Tensor

from tests.methods.videos import VIDEOS, budgets, check_all, frames_of_video, kept, only_step, select
from tests.views import Video, video_view
from vtr.methods._frames import frames_of
from vtr.methods.vidcom2 import VidCom2, likeness, quiet_channels, vidcom2
from vtr.types import Boundary, Budget

WIDTH = 12


def reference(video: Video, keep: int, exact: bool = True, temperature: float = 0.01) -> list[int]:
    """The card, token by token in float64."""
    places = video.grid[0] * video.grid[1]
    frames = [(t, frame) for t, frame in enumerate(frames_of_video(video, WIDTH)) if frame]
    everything = torch.stack([token for _, frame in frames for token in frame.values()])
    channels = everything.var(0, unbiased=False).argsort(stable=True)[: WIDTH // 2].sort().values

    def unit(token: Tensor) -> Tensor:
        return token[channels] / token[channels].norm()

    def like(token: Tensor, centre: Tensor) -> float:
        away = float((unit(token) - centre).square().sum())
        return sum(math.exp(-away / (2 * alpha)) for alpha in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    middle = torch.stack([unit(token) for token in everything]).mean(0)
    base, score, apart = keep / len(everything), {}, []
    for t, frame in frames:
        own = torch.stack([unit(token) for token in frame.values()]).mean(0)
        video_like = {place: like(token, middle) for place, token in frame.items()}
        apart.append(-sum(video_like.values()) / len(frame))
        score[t] = {t * places + place: video_like[place] + like(token, own) for place, token in frame.items()}
    powers = [math.exp((z - max(apart)) / temperature) for z in apart]
    chosen: list[int] = []
    for (t, frame), power in zip(frames, powers, strict=True):
        share = min(base * (1 + power / sum(powers) - 1 / len(frames)), 1)
        chosen += sorted(score[t], key=lambda n: (score[t][n], n))[: min(max(1, round(share * len(frame))), len(frame))]
    if not exact:
        return sorted(chosen)
    every = {n: value for own in score.values() for n, value in own.items()}
    firsts = [min(score[t], key=lambda n: (score[t][n], n)) for t, _ in frames] if keep >= len(frames) else []
    tiers = [firsts, chosen, list(every)]
    found: list[int] = []
    for tier in tiers:
        left = sorted((n for n in tier if n not in found), key=lambda n: (every[n], n))
        found += left[: keep - len(found)]
    return sorted(found)


@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_it_is_the_card(video: Video) -> None:
    for keep in budgets(video):
        view = video_view([video], keep, width=WIDTH)
        assert kept(select(VidCom2(), view), view) == reference(video, keep)
        frames = frames_of(view)
        like = likeness(frames, quiet_channels(frames))
        mask = frames.flat(vidcom2(like, frames.real, view.keep / view.counts[0], None))
        assert view.patch[0][mask[0]].tolist() == reference(video, keep, exact=False)


def test_what_every_method_for_videos_promises() -> None:
    check_all(VidCom2())
    check_all(VidCom2(temperature=1.0, channel_ratio=1.0))


def test_settings() -> None:
    assert VidCom2().budget == Budget(keep_ratio=0.25) and only_step(VidCom2()).where == Boundary()
    with pytest.raises(ValueError, match="vidcom2: channel_ratio must be above 0 and at most 1, got 0"):
        VidCom2(channel_ratio=0)
    with pytest.raises(ValueError, match="vidcom2: temperature must be above 0"):
        VidCom2(temperature=0)
