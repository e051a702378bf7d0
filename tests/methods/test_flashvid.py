"""FlashVID against the card in plain Python."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.marks import quick_first
from tests.methods.test_fastvid import cut, shared
from tests.methods.test_holitom import clusters
from tests.methods.videos import GEOMETRY, VIDEOS, budgets, check_all, frames_of_video, kept, pivots, select, signal_of, values
from tests.views import Video, video_view
from vtr.methods.flashvid import FlashVID
from vtr.ops import trees as module
from vtr.ops.topk import best_of_groups
from vtr.types import VIDEO, Boundary, Budget, Layer, VtrError
from vtr.types.signals import attention, received

SEEN = received(GEOMETRY.feature_layer)
SIGNALS = {SEEN: signal_of(low=0.1), attention(4): signal_of()}
LONG = [Video(20, (3, 4), seed=21, scenes=5, grain=0.25), Video(11, (4, 4), seed=22, scenes=2, grain=0.2, gone=0.3)]


def spread(tokens: Tensor, weight: Tensor, number: int) -> list[int]:
    """Greedy max-min over scaled columns."""
    unit = F.normalize(tokens, dim=-1)
    distance = (1 - unit @ unit.T) * weight[None]
    n = len(tokens)
    column = [sorted(distance[:, j].tolist())[min(1, n - 1)] for j in range(n)]
    picked = [max(range(n), key=lambda j: (column[j], -j))] if number else []
    while len(picked) < number:
        rest = [j for j in range(n) if j not in picked]
        picked.append(max(rest, key=lambda j: (min(float(distance[i, j]) for i in picked), -j)))
    return picked


def reference(video: Video, keep: int, segments: int, relevance: bool) -> tuple[dict[int, Tensor], dict[int, int]]:
    """Values of what is kept, and the pivot of everything that was merged."""
    places = video.grid[0] * video.grid[1]
    frames = [(t, {t * places + p: token for p, token in frame.items()}) for t, frame in enumerate(frames_of_video(video)) if frame]
    score = SIGNALS[SEEN](video).double()
    counts = [len(frame) for _, frame in frames]
    means = [torch.stack(list(frame.values())).mean(0) for _, frame in frames]
    pieces = cut(means, 0.9, segments)
    home = {i: number for number, piece in enumerate(pieces) for i in piece}
    picked = math.ceil(keep * 0.7 - 1e-9)
    number = shared(list(map(float, counts)), counts, picked)
    found: dict[int, Tensor] = {}
    rest: list[dict[int, Tensor]] = []
    for i, (_, frame) in enumerate(frames):
        names, tokens = list(frame), torch.stack(list(frame.values()))
        weight = score[names] * 1e6
        if relevance:
            weight = weight * (tokens @ torch.stack([means[j] for j in pieces[home[i]]]).mean(0))
        chosen = [names[j] for j in spread(tokens, weight, number[i])]
        found |= {n: frame[n] for n in chosen}
        rest.append({n: token for n, token in frame.items() if n not in chosen})
    sizes = [sum(counts[i] for i in piece) for piece in pieces]
    budget = shared(list(map(float, sizes)), sizes, keep)
    parent: dict[int, int] = {}
    for piece, size, least in zip(pieces, sizes, budget, strict=True):
        links = []
        for i in piece[1:]:
            if frames[i][0] != frames[i - 1][0] + 1:
                continue  # the frame before was emptied
            for n, token in rest[i].items():
                best = [(float(F.cosine_similarity(token, other, dim=0)), -m) for m, other in rest[i - 1].items()]
                if best and max(best)[0] > 0.8:
                    links.append((-max(best)[0], n, -max(best)[1]))
        parent |= {n: m for _, n, m in sorted(links)[: size - least]}

    def root(n: int) -> int:
        return root(parent[n]) if n in parent else n

    members: dict[int, list[Tensor]] = {}
    for own in rest:
        for n, token in own.items():
            members.setdefault(root(n), []).append(token)
    roots = [[n for n in own if n not in parent] for own in rest]
    left = [len(own) for own in roots]
    share = [left[i] * budget[home[i]] / max(sum(left[j] for j in pieces[home[i]]), 1) for i in range(len(frames))]
    centre: dict[int, int] = {}
    for own, wanted in zip(roots, shared(share, left, keep - picked), strict=True):
        if not wanted:
            continue
        mean = torch.stack([torch.stack(members[n]).mean(0) for n in own])
        centres, joined = clusters(mean, wanted, min(max(min(7, wanted), 2), len(own)))
        centre |= {own[j]: own[c] for j, c in enumerate(joined)}
        for c in centres:
            found[own[c]] = torch.stack([mean[j] for j, home_of in enumerate(joined) if home_of == c]).mean(0)
    return found, {n: centre[root(n)] for own in rest for n in own if root(n) in centre}


@pytest.mark.parametrize("relevance", quick_first([True, False]))
@pytest.mark.parametrize("video", [*VIDEOS, *LONG], ids=str)
def test_it_is_the_card(video: Video, relevance: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 300)
    for segments in (8, 2):
        for keep in budgets(video):
            view = video_view([video], keep, signals=SIGNALS)
            answer = select(FlashVID(segments=segments, relevance=relevance), view)
            found, pivot = reference(video, keep, segments, relevance)
            assert kept(answer, view) == sorted(found)
            assert torch.allclose(values(answer, view).double(), torch.stack([found[n] for n in sorted(found)]), rtol=0, atol=1e-5)
            assert pivots(answer, view) == [n if n in found else pivot.get(n, -1) for n in video.left().tolist()]


def test_what_every_method_for_videos_promises() -> None:
    check_all(FlashVID(), SIGNALS)
    check_all(FlashVID(segments=1, diverse=0.0, threshold=0.3, relevance=False), SIGNALS)
    check_all(FlashVID(diverse=1.0), SIGNALS)
    check_all(FlashVID(layer=5), SIGNALS, step=1)


def test_a_tree_of_three_is_their_mean() -> None:
    video = Video(3, (1, 2), scenes=1, grain=0.01)
    view = video_view([video], 1, signals=SIGNALS)
    answer = select(FlashVID(segments=1, diverse=0.0), view)
    tokens = video.tokens(8).view(3, 2, 8)
    assert kept(answer, view) in ([0], [1]) and pivots(answer, view).count(-1) == 0
    assert torch.allclose(values(answer, view)[0], tokens.mean((0, 1)), atol=1e-5), "a cluster is the mean of its trees, of three each"


def test_the_best_of_groups() -> None:
    score, group = torch.tensor([[1.0, 5, 3, 4, 2, 9]]), torch.tensor([[0, 0, 1, 1, 1, 2]])
    real = torch.tensor([[True, True, True, True, True, False]])
    assert best_of_groups(score, real, group, torch.tensor([[1, 2, 1]]))[0].nonzero()[:, 0].tolist() == [1, 2, 3]
    assert not best_of_groups(score, real, group, torch.tensor([[0, 0, 3]])).any()


def test_steps() -> None:
    outer, inner = FlashVID().steps(GEOMETRY)
    assert outer.where == Boundary() and outer.multiple == 1 / 0.3 and outer.on == inner.on == VIDEO
    assert inner.where == Layer(6) and inner.action == "remove", "20 of 28"
    (only,) = FlashVID(inner_ratio=1.0).steps(GEOMETRY)
    assert only.multiple is None and FlashVID().budget == Budget(keep_ratio=0.09375)


def test_settings() -> None:
    with pytest.raises(VtrError, match="flashvid: compat='authors' cannot run on a model: the released code may keep a token twice"):
        FlashVID(compat="authors").steps(GEOMETRY)
    with pytest.raises(ValueError, match="flashvid: diverse must be from 0 to 1, got 2"):
        FlashVID(diverse=2)
    with pytest.raises(ValueError, match="flashvid: inner_ratio must be above 0"):
        FlashVID(inner_ratio=0)
    with pytest.raises(ValueError, match="flashvid: layer 8 is out of range"):
        FlashVID(layer=8).steps(GEOMETRY)
