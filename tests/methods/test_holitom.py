"""HoliTom against the card in plain Python: windows, clusters and the merge inside the LLM."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.videos import GEOMETRY, VIDEOS, budgets, check_all, frames_of_video, kept, pivots, select, signal_of, values
from tests.ops.test_static_windows import best_windows
from tests.views import Video, video_view
from vtr.methods.holitom import HoliTom
from vtr.types import VIDEO, Boundary, Budget, Layer
from vtr.types.signals import attention, received

SEEN = received(GEOMETRY.feature_layer)
SIGNALS = {SEEN: signal_of(), attention(4): signal_of(), attention(1): signal_of()}
STEADY = [
    Video(8, (3, 4), seed=11, scenes=2, grain=0.1),
    Video(7, (4, 4), seed=12, scenes=3, grain=0.35),
    Video(5, (3, 3), seed=13, scenes=1, grain=0.3, gone=0.2),
    Video(12, (2, 3), seed=14, scenes=4, grain=0.45),
]


def shared(counts: list[int], total: int) -> list[int]:
    wanted = [total * count / max(sum(counts), 1) for count in counts]
    share = [int(want + 1e-9) for want in wanted]
    rest = sorted(range(len(counts)), key=lambda i: (-round(wanted[i] - share[i], 9), i))
    for i in rest[: total - sum(share)]:
        share[i] += 1
    return share


def clusters(tokens: Tensor, number: int, neighbours: int) -> tuple[list[int], list[int]]:
    """Density peaks of `tokens (n, D)`: centres in ascending order, and the centre of each token."""
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[1] ** 0.5
    density = torch.exp(-distance.sort(1).values[:, :neighbours].square().mean(1)).tolist()
    n = len(tokens)
    score = []
    for i in range(n):
        denser = [float(distance[i, j]) for j in range(n) if (density[j], -j) > (density[i], -i)]
        score.append((min(denser) if denser else float(distance.max())) * density[i])
    centres = sorted(range(n), key=lambda i: (-score[i], i))[:number]
    own = [i if i in centres else min(centres, key=lambda c: (float(distance[i, c]), centres.index(c))) for i in range(n)]
    return sorted(centres), own


def reference(video: Video, keep: int) -> tuple[list[int], list[Tensor], dict[int, int]]:
    """Kept numbers, their values, and the pivot of each merged token."""
    frames, places = frames_of_video(video), video.grid[0] * video.grid[1]
    score = signal_of()(video)
    cosine = {
        (t, p): float(F.cosine_similarity(frames[t][p], frames[t - 1][p], dim=0))
        for t in range(1, video.frames)
        for p in frames[t]
        if p in frames[t - 1]
    }
    close = [[cosine.get((t, p), -1) > 0.8 for p in range(places)] for t in range(video.frames)]
    found: dict[int, Tensor] = {}
    pivot: dict[int, int] = {}
    cut = best_windows(close)
    static = {
        (first, last): [p for p in range(places) if last > first and all(close[t][p] for t in range(first + 1, last + 1))]
        for first, last in cut
    }
    dynamic = {t: [p for p in frames[t] if p not in static[window]] for window in cut for t in range(window[0], window[1] + 1)}
    firsts = {first: len(static[first, last]) for first, last in cut}
    blocks = [len(dynamic[t]) for t in range(video.frames)] + [firsts.get(t, 0) for t in range(video.frames)]
    extra = max(keep - sum(blocks), 0)
    share = shared(blocks, keep - extra)
    later = [(t, p) for first, last in cut for t in range(first + 1, last + 1) for p in static[first, last]]
    apart = sorted(later, key=lambda at: (round(cosine[at], 9), at))[:extra]
    for t, p in apart:
        found[t * places + p] = frames[t][p]
    for t in range(video.frames):
        for p in sorted(dynamic[t], key=lambda p: (-float(score[t * places + p]), p))[: share[t]]:
            found[t * places + p] = frames[t][p]
    for (first, last), own in static.items():
        number = share[video.frames + first]
        if not number:
            continue
        members = {p: [t for t in range(first, last + 1) if (t, p) not in apart] for p in own}
        mean = torch.stack([torch.stack([frames[t][p] for t in members[p]]).mean(0) for p in own])
        centres, home = clusters(mean, number, min(max(min(7, number), 2), len(own)))
        for c in centres:
            others = [i for i, h in enumerate(home) if h == c and i != c]
            found[first * places + own[c]] = 0.6 * mean[c] + 0.4 * mean[others].mean(0) if others else mean[c]
        for i, h in enumerate(home):
            for t in members[own[i]]:
                pivot[t * places + own[i]] = first * places + own[h]
    return sorted(found), [found[n] for n in sorted(found)], pivot


@pytest.mark.parametrize("video", [*VIDEOS, *STEADY], ids=str)
def test_it_is_the_card(video: Video) -> None:
    for keep in budgets(video):
        view = video_view([video], keep, signals=SIGNALS)
        answer = select(HoliTom(), view)
        numbers, tokens, pivot = reference(video, keep)
        assert kept(answer, view) == numbers
        assert torch.allclose(values(answer, view).double(), torch.stack(tokens), rtol=0, atol=1e-5)
        wanted = [n if n in numbers else pivot.get(n, -1) for n in video.left().tolist()]
        assert pivots(answer, view) == wanted


def test_what_every_method_for_videos_promises() -> None:
    check_all(HoliTom(), SIGNALS)
    check_all(HoliTom(tau=0.5, beta=1.0, neighbours=2), SIGNALS)


@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_the_merge_inside_the_llm(video: Video) -> None:
    tokens, row = video.tokens(8)[video.left()].double(), signal_of()(video)[video.left()]
    for keep in budgets(video):
        view = video_view([video], keep, signals=SIGNALS)
        answer = select(HoliTom(layer=5), view, step=1)
        stay = sorted(sorted(range(len(row)), key=lambda n: (-float(row[n]), n))[:keep])
        wanted = tokens.clone()
        for n in range(len(row)):
            if n not in stay:
                pivot = max(stay, key=lambda k: (float(F.cosine_similarity(tokens[n], tokens[k], dim=0)), -k))
                wanted[pivot] = (wanted[pivot] + tokens[n]) / 2
        assert kept(answer, view) == video.left()[stay].tolist()
        assert torch.allclose(values(answer, view).double(), wanted[stay], rtol=0, atol=1e-5)


def test_what_the_inner_step_promises() -> None:
    check_all(HoliTom(layer=5), SIGNALS, step=1)


def test_steps() -> None:
    outer, inner = HoliTom().steps(GEOMETRY)
    assert outer.where == Boundary() and outer.multiple == 2 and outer.on == inner.on == VIDEO
    assert inner.where == Layer(5) and inner.multiple is None, "18 of 28"
    (only,) = HoliTom(inner_ratio=1.0).steps(GEOMETRY)
    assert only.multiple is None
    assert HoliTom().budget == Budget(keep_ratio=0.125) and HoliTom.published_positions == "renumber"


def test_settings() -> None:
    with pytest.raises(ValueError, match="holitom: layer 8 .the paper's k = 8. is out of range"):
        HoliTom(layer=8).steps(GEOMETRY)
    with pytest.raises(ValueError, match="holitom: inner_ratio must be above 0"):
        HoliTom(inner_ratio=0)
    with pytest.raises(ValueError, match="holitom: beta must be from 0 to 1"):
        HoliTom(beta=2)
