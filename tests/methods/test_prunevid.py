"""PruneVid against the card in plain Python, one token after the other in float64."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.marks import quick_only
from tests.methods.videos import GEOMETRY, VIDEOS, budgets, check_all, frames_of_video, kept, pivots, select, values
from tests.views import Video, video_view
from vtr.methods import _prunevid
from vtr.methods._prunevid import refined
from vtr.methods.prunevid import BLOCK, PruneVid, attended_blocks, prunevid_authors, question_score
from vtr.ops.blocks import all_at_once
from vtr.ops.frames import Frames
from vtr.types import VIDEO, Boundary, Budget, Layer, Text
from vtr.types.signals import TEXT, attention

TALL = [*VIDEOS, Video(12, (5, 6), seed=7, scenes=3, grain=0.4), Video(8, (4, 5), seed=8, scenes=2, gone=0.1, grain=0.2)]
Key = tuple[str, int, int]
"""`still` or `moves`, first frame of the segment or frame, place."""


def peaks(points: list[Tensor], clusters: int) -> tuple[list[int], list[int]]:
    """Centers, best first, and for each point the number of its center."""
    n, k = len(points), min(7, len(points))
    far = [[float((a - b).norm()) / math.sqrt(len(a)) for b in points] for a in points]
    density = [math.exp(-sum(d * d for d in sorted(row)[:k]) / k) for row in far]
    score = []
    for i in range(n):
        denser = [far[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        score.append((min(denser) if denser else max(map(max, far))) * density[i])
    centers = sorted(range(n), key=lambda i: (-score[i], i))[:clusters]
    joins = [i if i in centers else min(sorted(centers), key=lambda c: far[i][c], default=-1) for i in range(n)]
    return centers, joins


def contiguous(labels: list[int]) -> list[int]:
    """Step 2 of the card on one list."""

    def runs(of: list[int]) -> list[tuple[int, int]]:
        ends = [t for t in range(1, len(of) + 1) if t == len(of) or of[t] != of[t - 1]]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    longest = {label: max(b - a for a, b in runs(labels) if labels[a] == label) for label in labels}
    now: list[int | None] = list(labels)
    for a, b in runs(labels):
        if b - a < longest[labels[a]] or b - a == 1:
            now[a:b] = [None] * (b - a)
    t = 0
    while t < len(now):
        if now[t] is not None:
            t += 1
            continue
        end = next((u for u in range(t, len(now)) if now[u] is not None), len(now))
        left = next((t - u for u in range(t) if all(now[v] == now[t - 1] for v in range(u, t))), 0)
        right = next((u - end for u in range(end, len(now) + 1) if u == len(now) or now[u] != now[end]), 0) if end < len(now) else 0
        label = 0 if not left and not right else now[t - 1] if left >= right else now[end]
        now[t:end] = [label] * (end - t)
        t = end
    return [int(label) for label in now if label is not None]


def shared(sizes: list[int], keep: int) -> list[int]:
    """Largest remainder, small blocks counting twice, none above its size."""
    weight = [n if n > 14 else 2 * n for n in sizes]
    full: set[int] = set()
    while True:
        open_to = [i for i, n in enumerate(sizes) if n and i not in full]
        left = keep - sum(sizes[i] for i in full)
        wanted = {i: left * weight[i] / sum(weight[j] for j in open_to) for i in open_to}
        over = {i for i in open_to if wanted[i] >= sizes[i] - 1e-9}
        if not over:
            break
        full |= over
    share = [n if i in full else math.floor(wanted[i] + 1e-9) if n else 0 for i, n in enumerate(sizes)]
    for i in sorted(wanted, key=lambda i: (-round(wanted[i] - math.floor(wanted[i] + 1e-9), 9), i))[: keep - sum(share)]:
        share[i] += 1
    return share


class Left(NamedTuple):
    tokens: dict[int, Tensor]  # original number of a pivot -> value
    pivot: dict[int, int]  # original number of a token -> that of its pivot, -1 for none
    sizes: list[tuple[int, int, int]]  # per segment


def reference(video: Video, keep: int | None, tau: float = 0.8, ratio: float = 0.25, width: int = 8) -> Left:
    frames, places = frames_of_video(video, width), video.grid[0] * video.grid[1]
    there = [t for t, frame in enumerate(frames) if frame]
    means = [torch.stack(list(frames[t].values())).mean(0) for t in there]
    centers, joins = peaks(means, max(1, int(len(there) * ratio)))
    labels = contiguous([centers.index(c) for c in joins])
    starts = [t for i, t in enumerate(there) if i == 0 or labels[i] != labels[i - 1]]
    segments = [[t for t in there if a <= t < b] for a, b in zip(starts, [*starts[1:], len(frames)], strict=True)]

    alike: dict[tuple[int, int], float] = {}
    for own in segments:
        for place in range(places):
            units = [x / x.norm() for t in own if (x := frames[t].get(place)) is not None]
            if len(units) > 1:
                pairs = [float(a @ b) for i, a in enumerate(units) for j, b in enumerate(units) if i != j]
                alike[own[0], place] = sum(pairs) / len(pairs)
    still = sorted((s for s in alike if alike[s] > tau), key=lambda s: (-alike[s], s))
    if keep is not None:
        saved, spare = 0, sum(map(len, frames)) - keep
        for i, (start, place) in enumerate(still):
            saved += sum(place in frames[t] for t in next(own for own in segments if own[0] == start)) - 1
            if saved > spare:
                still = still[:i]
                break

    blocks: list[list[tuple[int, Tensor, list[int]]]] = []  # pivot, value, tokens
    counts = []
    for own in segments:
        first = own[0]
        where = sorted(place for start, place in still if start == first)
        stands = []
        for place in where:
            numbers = [t * places + place for t in own if place in frames[t]]
            stands.append((numbers[0], torch.stack([frames[n // places][place] for n in numbers]).mean(0), numbers))
        moves = [[(t * places + p, x, [t * places + p]) for p, x in sorted(frames[t].items()) if p not in where] for t in own]
        blocks += [stands, *moves]
        counts.append((len(own), len(moves)))
    sizes = [len(block) for block in blocks]
    share = [n if n <= 14 else int(n * 0.5) for n in sizes] if keep is None else shared(sizes, keep)
    left = Left({}, {}, [])
    for block, clusters in zip(blocks, share, strict=True):
        if not block:
            continue
        centers, joins = peaks([value for _, value, _ in block], clusters)
        for center in centers:
            left.tokens[block[center][0]] = torch.stack([block[i][1] for i, c in enumerate(joins) if c == center]).mean(0)
        for (_, _, numbers), center in zip(block, joins, strict=True):
            left.pivot.update(dict.fromkeys(numbers, block[center][0] if clusters else -1))
    at = 0
    for window, _ in counts:
        left.sizes.append((share[at], sum(share[at + 1 : at + 1 + window]), window))
        at += 1 + window
    return left


@pytest.mark.parametrize("video", TALL, ids=str)
def test_it_is_the_card(video: Video) -> None:
    for keep in budgets(video):
        view = video_view([video], keep)
        answer, want = select(PruneVid(), view), reference(video, keep)
        assert kept(answer, view) == sorted(want.tokens) and len(want.tokens) == keep
        assert torch.allclose(values(answer, view).double(), torch.stack([want.tokens[n] for n in sorted(want.tokens)]), atol=1e-5)
        assert pivots(answer, view) == [want.pivot[n] for n in video.left().tolist()]


@pytest.mark.parametrize("tau", quick_only((-1.0, 0.9), [-1.0, 0.5, 0.9, 1.0]))
@pytest.mark.parametrize("ratio", quick_only((0.1, 1.0), [0.1, 0.5, 1.0]))
def test_other_settings(tau: float, ratio: float) -> None:
    for video in TALL[-2:]:
        view = video_view([video], 50)
        answer, want = select(PruneVid(tau=tau, segment_ratio=ratio, alpha=None), view), reference(video, 50, tau, ratio)
        assert kept(answer, view) == sorted(want.tokens)
        assert pivots(answer, view) == [want.pivot[n] for n in video.left().tolist()]


@pytest.mark.parametrize("seed", range(4))
def test_the_released_counts(seed: int) -> None:
    video = Video(12, (4, 5 + seed % 2), seed=seed, scenes=2 + seed % 3, grain=0.45)
    tokens = video.tokens(16).view(1, video.frames, -1, 16)
    real = torch.ones(tokens.shape[:3], dtype=torch.bool)
    made = prunevid_authors(Frames(tokens, real, torch.arange(real.numel()).view(real.shape), real[..., 0], real.numel()), 0.8, 0.25, 0.5)
    want = reference(video, None, width=16)
    assert list(zip(made.static.tolist(), made.moving.tolist(), made.window.tolist(), strict=True)) == want.sizes
    assert len(made.values) == len(want.tokens) and torch.equal(made.block, made.block.sort().values)
    near = torch.cdist(made.values.double(), torch.stack(list(want.tokens.values()))).amin(1)
    assert near.max() < 1e-5


def test_segments() -> None:
    random = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 17, (600,), generator=random)
    labels = [torch.randint(0, 1 + i % 5, (16,), generator=random).repeat_interleave(1 + i % 3)[:16] for i in range(600)]
    found = refined(torch.stack(labels), counts)
    for row, label, count in zip(found.tolist(), labels, counts.tolist(), strict=True):
        assert row[:count] == contiguous(label[:count].tolist())


def test_what_every_method_for_videos_promises() -> None:
    check_all(PruneVid())
    check_all(PruneVid(alpha=None, tau=0.3, segment_ratio=0.5))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = [len(video.left()) // 3 or 1 for video in TALL]
    whole = select(PruneVid(), video_view(TALL, keep))
    monkeypatch.setattr(_prunevid, "CHUNK", 700)
    view = video_view(TALL, keep)
    parts = select(PruneVid(), view)
    assert whole.keep is not None and parts.keep is not None and torch.equal(whole.keep, parts.keep)
    for row in range(len(TALL)):
        assert pivots(whole, view, row) == pivots(parts, view, row)
        assert torch.allclose(values(whole, view, row), values(parts, view, row), rtol=0, atol=1e-6)


def asked(videos: list[Video], heads: int = 3, words: int = 5) -> dict:
    """Attention of text, different for every video."""

    def rows(video: Video) -> Tensor:
        made = torch.rand(video.frames * video.grid[0] * video.grid[1], heads, words, generator=torch.Generator().manual_seed(video.seed))
        return made.softmax(0)

    return {attention(10, TEXT, heads=True): rows}


def second(videos: list[Video], keep: list[int]) -> tuple:
    """A View at the LLM layer, as if nothing had been merged: blocks are those of frames, every other place stands still."""
    view = video_view(videos, keep, signals=asked(videos))
    signal = attention(10, TEXT, heads=True)
    view.signals = {signal: view.signals[signal].permute(0, 2, 3, 1)}  # (G, H, M, N)
    instruction = torch.arange(5) > torch.arange(len(videos))[:, None] % 3
    view.text = Text(torch.zeros(len(videos), 5, 8), torch.ones_like(instruction), instruction)
    still = view.cells[..., 2] % 2 == 0
    view.per_token[BLOCK] = torch.where(still, 0, 2 * view.cells[..., 0] + 1)
    return view, signal


def test_the_question_chooses_in_every_block() -> None:
    keep = [len(video.left()) * 2 // 5 or 1 for video in TALL]
    view, signal = second(TALL, keep)
    still = view.cells[..., 2] % 2 == 0
    step = PruneVid(layer=11).steps(GEOMETRY_12)[1]
    assert step.select is not None
    answer = step.select(view)
    assert answer.keep.sum(1).tolist() == keep and not (answer.keep & ~view.real).any()
    for g, video in enumerate(TALL):
        own = view.real[g].nonzero()[:, 0].tolist()
        block = {n: int(view.per_token[BLOCK][g, n]) for n in own}
        score = {n: float(view.signals[signal][g][:, view.text.instruction[g], n].max()) for n in own}
        sizes = [sum(b == block_of for b in block.values()) for block_of in range(max(block.values()) + 1)]
        wanted = [keep[g] * n / len(own) for n in sizes]
        share = [math.floor(w + 1e-9) for w in wanted]
        for i in sorted(range(len(sizes)), key=lambda i: (-round(wanted[i] - math.floor(wanted[i] + 1e-9), 9), i))[: keep[g] - sum(share)]:
            share[i] += 1
        best = [n for b, k in enumerate(share) for n in sorted((n for n in own if block[n] == b), key=lambda n: (-score[n], n))[:k]]
        assert answer.keep[g].nonzero()[:, 0].tolist() == sorted(best)
        alone, _ = second([video], [keep[g]])
        alone.text = Text(*(part[g : g + 1] for part in view.text))
        assert torch.equal(step.select(alone).keep[0][alone.real[0]], answer.keep[g][view.real[g]])
    view.per_token.pop(BLOCK)
    unmerged = step.select(view).keep
    assert unmerged.sum(1).tolist() == keep, "where the budget of the boundary was all there is, frames are blocks"
    view.per_token[BLOCK] = torch.where(still, 0, 2 * view.cells[..., 0] + 1)
    with all_at_once(), FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(getattr(view, name)) for name in ("real", "keep", "cells")}
        text = Text(*map(mode.from_tensor, view.text))
        notes = {BLOCK: mode.from_tensor(view.per_token[BLOCK])}
        signals = {signal: mode.from_tensor(view.signals[signal])}
        assert step.select(replace(view, **fake, text=text, per_token=notes, signals=signals)).keep.shape == view.real.shape


def test_the_released_share_of_every_block() -> None:
    block = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 5]])
    score = torch.tensor([[3.0, 2, 4, 1, 1, 1, 9, 0, 7]])
    found = attended_blocks(score, block, torch.ones(1, 9, dtype=torch.bool), None, 6)
    assert found[0].nonzero()[:, 0].tolist() == [2, 3, 6], "one of three, two of five, none of one"
    rows = torch.rand(1, 2, 3, 9)
    assert torch.equal(question_score(rows, torch.tensor([[False, True, True]])), rows[:, :, 1:].amax((1, 2)))


GEOMETRY_12 = replace(GEOMETRY, llm_layers=12)


def test_settings() -> None:
    merge, prune = PruneVid(layer=11).steps(GEOMETRY_12)
    assert PruneVid().budget == Budget(keep_ratio=0.17) and merge.where == Boundary() and merge.multiple == 2.5
    assert prune.where == Layer(11) and prune.earlier_keys and merge.on == prune.on == VIDEO
    (only,) = PruneVid(alpha=None).steps(GEOMETRY)
    assert only.multiple is None
    assert [PruneVid().steps(replace(GEOMETRY, llm_layers=n))[1].layer for n in (2, 8, 28, 32, 64)] == [1, 3, 10, 11, 22]
    with pytest.raises(ValueError, match="prunevid: layer 11 is out of range: this LLM has 8 layers"):
        PruneVid(layer=11).steps(GEOMETRY)
    with pytest.raises(ValueError, match="prunevid: alpha must be above 0 and at most 1"):
        PruneVid(alpha=0.0)
    with pytest.raises(ValueError, match="prunevid: layer must be"):
        PruneVid(layer=0)
    with pytest.raises(ValueError, match="prunevid: segment_ratio must be above 0"):
        PruneVid(segment_ratio=0.0)
    with pytest.raises(ValueError, match="prunevid: compat='authors' keeps what tau, a cluster ratio of 0.5 and alpha leave, got .*keep=9"):
        PruneVid(compat="authors", keep=9).steps(GEOMETRY_12)
