"""V-CAST against the card in plain Python."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.videos import VIDEOS, budgets, check_all, frames_of_video, kept, only_step, select
from tests.views import Video, video_view
from vtr.methods.vcast import VCast, frame_budgets, shared_by_loop
from vtr.types import Boundary, Budget

EPS = 1e-6


def curvatures(means: list[Tensor]) -> list[float]:
    turn = [1.0] * len(means)
    for t in range(1, len(means) - 1):
        before, behind = means[t] - means[t - 1], means[t + 1] - means[t]
        turn[t] = 1 - float(F.cosine_similarity(before, behind, dim=0, eps=EPS))
    return turn


def shared(turn: list[float], counts: list[int], keep: int, authors: bool, least: int = 1) -> list[int]:
    base = [min(least, keep // len(counts), count) for count in counts]
    weights = [math.exp(c / 0.7) for c in turn]
    rest, share = keep - sum(base), list(base)
    if authors:
        wanted = [rest * w / sum(weights) for w in weights]
        share = [b + min(math.floor(x), c - b) for b, x, c in zip(base, wanted, counts, strict=True)]
        while sum(share) < keep:
            open_to = [t for t in range(len(counts)) if share[t] < counts[t]]
            share[max(open_to, key=lambda t: (round(wanted[t] - math.floor(wanted[t]), 9), -t))] += 1
        return share
    full: set[int] = set()
    while True:  # frames that their share would overfill are full; what they cannot take goes to the others
        free = [t for t in range(len(counts)) if t not in full]
        left = rest - sum(counts[t] - base[t] for t in full)
        wanted = {t: left * weights[t] / sum(weights[u] for u in free) for t in free}
        over = [t for t in free if wanted[t] >= counts[t] - base[t]]
        if not over:
            break
        full |= set(over)
    share = [counts[t] if t in full else base[t] + math.floor(wanted[t]) for t in range(len(counts))]
    by_rest = sorted(free, key=lambda t: (-round(wanted[t] - math.floor(wanted[t]), 9), t))
    for t in by_rest[: keep - sum(share)]:
        share[t] += 1
    return share


def reference(video: Video, keep: int, authors: bool = False) -> list[int]:
    places = video.grid[0] * video.grid[1]
    frames = [(t, frame) for t, frame in enumerate(frames_of_video(video)) if frame]
    means = [F.normalize(torch.stack(list(frame.values())).mean(0), dim=0, eps=EPS) for _, frame in frames]
    share = shared(curvatures(means), [len(frame) for _, frame in frames], keep, authors)
    found: list[int] = []
    for (t, frame), mean, own in zip(frames, means, share, strict=True):
        norms = {place: float(token.norm()) for place, token in frame.items()}
        low, high = min(norms.values()), max(norms.values())
        score = {
            place: 1 - float(F.cosine_similarity(token, mean, dim=0, eps=EPS)) + (norms[place] - low) / (high - low + EPS)
            for place, token in frame.items()
        }
        found += [t * places + place for place in sorted(score, key=lambda place: (-round(score[place], 5), place))[:own]]
    return sorted(found)


@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_it_is_the_card(video: Video, authors: bool) -> None:
    for keep in budgets(video):
        view = video_view([video], keep)
        assert kept(select(VCast(compat="authors" if authors else None), view), view) == reference(video, keep, authors)


def test_what_every_method_for_videos_promises() -> None:
    check_all(VCast())
    check_all(VCast(compat="authors"))
    check_all(VCast(least=3, temperature=0.1))


def test_remainders() -> None:
    turn, count = torch.zeros(1, 4), torch.full((1, 4), 10)
    assert frame_budgets(turn, count, torch.tensor([19]))[0].tolist() == [5, 5, 5, 4], "largest remainder, one per frame"
    assert frame_budgets(turn, count, torch.tensor([19]), loop=True)[0].tolist() == [7, 4, 4, 4], "the code: all to the first"
    base = torch.tensor([[0, 0, 0]])
    given = shared_by_loop(base, torch.tensor([[0.5, 0.26, 0.24]]), torch.tensor([[1, 4, 9]]), torch.tensor([10]))
    assert given[0].tolist() == [1, 4, 5], "0.6 of the second is the largest fraction until that frame is full"


def test_settings() -> None:
    assert VCast().budget == Budget(keep_ratio=0.25) and only_step(VCast()).where == Boundary()
    with pytest.raises(ValueError, match="vcast: temperature must be above 0, got 0"):
        VCast(temperature=0)
    with pytest.raises(ValueError, match="vcast: compat must be None or 'authors'"):
        VCast(compat="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vcast: least must be"):
        VCast(least=-1)
