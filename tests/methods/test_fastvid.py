"""FastVID against the card in plain Python."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.videos import GEOMETRY, VIDEOS, budgets, check_all, frames_of_video, kept, only_step, pivots, select, signal_of, values
from tests.views import Video, video_view
from vtr.methods import fastvid as module
from vtr.methods.fastvid import FastVID
from vtr.types import Boundary, Budget, VtrError
from vtr.types.signals import received

SEEN = received(GEOMETRY.feature_layer)
SIGNALS = {SEEN: signal_of()}
LONG = [Video(20, (3, 4), seed=21, scenes=5, grain=0.4), Video(11, (4, 4), seed=22, scenes=2, grain=0.6, gone=0.3)]


def shared(weights: list[float], caps: list[int], total: int) -> list[int]:
    """By largest remainder with caps."""
    total, full = min(total, sum(caps)), set[int]()
    while True:
        free = [i for i in range(len(caps)) if i not in full and weights[i] > 0 and caps[i] > 0]
        left = total - sum(caps[i] for i in full)
        wanted = {i: left * weights[i] / sum(weights[j] for j in free) for i in free}
        over = [i for i in free if wanted[i] >= caps[i]]
        if not over:
            break
        full |= set(over)
    share = [caps[i] if i in full else math.floor(wanted[i] + 1e-9) if i in wanted else 0 for i in range(len(caps))]
    for i in sorted(free, key=lambda i: (-round(wanted[i] - math.floor(wanted[i] + 1e-9), 9), i))[: total - sum(share)]:
        share[i] += 1
    return share


def cut(means: list[Tensor], threshold: float, least: int) -> list[list[int]]:
    cosine = [round(float(F.cosine_similarity(a, b, dim=0)), 9) for a, b in pairwise(means)]
    lowest = sorted(range(len(cosine)), key=lambda i: (cosine[i], i))[: least - 1]
    pieces: list[list[int]] = [[]]
    for i in range(len(means)):
        pieces[-1].append(i)
        if i < len(cosine) and (cosine[i] < threshold or i in lowest):
            pieces.append([])
    return pieces


def densest(tokens: Tensor, number: int) -> list[int]:
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[1] ** 0.5
    density = torch.exp(-distance.sort(1).values[:, :4].square().mean(1)).tolist()
    score = []
    for i in range(len(tokens)):
        denser = [float(distance[i, j]) for j in range(len(tokens)) if (density[j], -j) > (density[i], -i)]
        score.append((min(denser) if denser else float(distance.max())) * density[i])
    return sorted(range(len(tokens)), key=lambda i: (-score[i], i))[:number]


def reference(video: Video, keep: int, segments: int = 8) -> tuple[dict[int, Tensor], dict[int, int]]:
    """Values of what is kept, and the pivot of everything that joined one."""
    places = video.grid[0] * video.grid[1]
    frames = [(t, frame) for t, frame in enumerate(frames_of_video(video)) if frame]
    score = signal_of()(video)
    counts = [len(frame) for _, frame in frames]
    pieces = cut([torch.stack(list(frame.values())).mean(0) for _, frame in frames], 0.9, segments)
    weight = [0.0] * len(frames)
    for piece in pieces:
        anchors = piece[::-1][::4]
        for i in anchors:
            weight[i] = len(piece) / len(anchors)
    wanted = int(keep * 0.4 + 1e-9)
    salient = shared(list(map(float, counts)), counts, keep - wanted)
    room = [count - own if w else 0 for count, own, w in zip(counts, salient, weight, strict=True)]
    context = shared(weight, room, wanted)
    left = keep - sum(salient) - sum(context)
    more = shared(list(map(float, counts)), [c - s - x for c, s, x in zip(counts, salient, context, strict=True)], left)
    salient = [a + b for a, b in zip(salient, more, strict=True)]
    found: dict[int, Tensor] = {}
    rest: list[dict[int, Tensor]] = []
    for (t, frame), own in zip(frames, salient, strict=True):
        top = sorted(frame, key=lambda p: (-float(score[t * places + p]), p))[:own]
        found |= {t * places + p: frame[p] for p in top}
        rest.append({t * places + p: token for p, token in frame.items() if p not in top})
    if keep == sum(counts):
        return {t * places + p: token for t, frame in frames for p, token in frame.items()}, {}
    nearest: dict[int, tuple[float, int]] = {}
    for piece in pieces:
        candidates = {n: token for i in piece for n, token in rest[i].items()}
        for i in piece:
            if not context[i]:
                continue
            numbers = list(rest[i])
            pivots = sorted(numbers[j] for j in densest(torch.stack(list(rest[i].values())), context[i]))
            members: dict[int, list[Tensor]] = {pivot: [] for pivot in pivots}
            for n, token in candidates.items():
                close, pivot = max((float(F.cosine_similarity(token, rest[i][p], dim=0)), -p) for p in pivots)
                members[-pivot].append(token)
                nearest[n] = max(nearest.get(n, (-2.0, 0)), (close, pivot))
            for pivot in pivots:
                w = max(1 / (len(members[pivot]) + 1), 0.6)
                found[pivot] = w * rest[i][pivot] + (1 - w) * torch.stack(members[pivot]).mean(0)
    return found, {n: -pivot for n, (_, pivot) in nearest.items()}


@pytest.mark.parametrize("video", [*VIDEOS, *LONG], ids=str)
def test_it_is_the_card(video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 500)
    for segments in (8, 2):
        for keep in budgets(video):
            view = video_view([video], keep, signals=SIGNALS)
            answer = select(FastVID(segments=segments), view)
            found, pivot = reference(video, keep, segments)
            assert kept(answer, view) == sorted(found)
            assert torch.allclose(values(answer, view).double(), torch.stack([found[n] for n in sorted(found)]), rtol=0, atol=1e-5)
            assert pivots(answer, view) == [n if n in found else pivot.get(n, -1) for n in video.left().tolist()]


def test_what_every_method_for_videos_promises() -> None:
    check_all(FastVID(), SIGNALS)
    check_all(FastVID(segments=2, threshold=0.5, context=1.0, every=2, neighbours=2), SIGNALS)
    check_all(FastVID(context=0.0), SIGNALS)


def test_settings() -> None:
    assert FastVID().budget == Budget(keep_ratio=0.1) and only_step(FastVID()).where == Boundary()
    with pytest.raises(VtrError, match="fastvid: compat='authors' cannot run on a model: the released code reads SigLIP's pooling head"):
        FastVID(compat="authors").steps(GEOMETRY)
    with pytest.raises(ValueError, match="fastvid: context must be from 0 to 1, got 2"):
        FastVID(context=2)
    with pytest.raises(ValueError, match="fastvid: every must be at least 1, got 0"):
        FastVID(every=0)
