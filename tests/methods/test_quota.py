"""QuoTA against the card in plain Python, frame by frame in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.methods.test_prunevid import TALL
from tests.methods.videos import (
    GEOMETRY,
    budgets,
    check_dtypes,
    check_still,
    check_views,
    frames_of_video,
    kept,
    only_step,
    pivots,
    select,
    values,
)
from tests.views import Video, video_view
from vtr.methods._quota import authors_budgets, authors_frames, authors_grid, authors_weights, frame_quotas, frame_weights, shrunk
from vtr.methods.quota import QuoTA
from vtr.types import Boundary, Budget, View, VtrError
from vtr.types.signals import frame_score

SIGNAL = frame_score()


def scores_of(video: Video) -> Tensor:
    made = torch.rand(video.frames, generator=torch.Generator().manual_seed(video.seed + 40)) ** 3
    made[:: 4 + video.seed % 3] = 0
    return made


def with_scores(videos: list[Video], keep: list[int] | int, scores: list[Tensor] | None = None, **options) -> View:
    view = video_view(videos, keep, **options)
    rows = [scores_of(video) for video in videos] if scores is None else scores
    view.signals = {SIGNAL: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}
    return view


def shared(weights: list[float], counts: list[int], keep: int) -> list[int]:
    """Water filling, then largest remainder; frames without weight come last."""
    share, left = [0] * len(counts), keep
    for own in ([t for t, w in enumerate(weights) if w > 0], [t for t, w in enumerate(weights) if w == 0]):
        open_to = [t for t in own if counts[t]]
        room = min(left, sum(counts[t] for t in open_to))
        left -= room
        wanted: dict[int, float] = {}
        while open_to:
            whole = sum(weights[t] or 1.0 for t in open_to)
            wanted = {t: room * (weights[t] or 1.0) / whole for t in open_to}
            full = [t for t in open_to if wanted[t] >= counts[t] - 1e-9]
            if not full:
                break
            for t in full:
                share[t] = counts[t]
                room -= counts[t]
                open_to.remove(t)
                wanted.pop(t)
        for t, value in wanted.items():
            share[t] = math.floor(value + 1e-9)
        for t in sorted(wanted, key=lambda t: (-round(wanted[t] - share[t], 9), t))[: room - sum(share[t] for t in wanted)]:
            share[t] += 1
    return share


def cells(n: int, rows: int, cols: int) -> list[tuple[float, float]]:
    """Centers `(row, col)` of the cells of a frame, in token coordinates."""
    side = max((h for h in range(1, rows + 1) if h * h - h <= n * rows / cols + 1e-9 and h <= n), default=1)
    side = min(max(side, -(-n // cols)), rows)
    found = []
    for band in range(side):
        across = (band + 1) * n // side - band * n // side
        found += [((2 * band + 1) * rows / (2 * side) - 0.5, (2 * i + 1) * cols / (2 * across) - 0.5) for i in range(across)]
    return found


def at_place(frame: dict[int, Tensor], rows: int, cols: int, y: float, x: float) -> tuple[Tensor, list[int]]:
    """Bilinear value between the tokens that are there, and these tokens."""
    y, x = min(max(y, 0), rows - 1), min(max(x, 0), cols - 1)
    total, weights, used = torch.zeros(8, dtype=torch.float64), 0.0, []
    for place, token in frame.items():
        weight = max(0.0, 1 - abs(place // cols - y)) * max(0.0, 1 - abs(place % cols - x))
        if weight > 0:
            total, weights = total + weight * token, weights + weight
            used.append(place)
    return total / weights, used


def reference(video: Video, keep: int, scores: Tensor) -> tuple[dict[int, Tensor], dict[int, int]]:
    frames, (rows, cols) = frames_of_video(video), video.grid
    places = rows * cols
    weights = [float(s) ** 2 if frame else 0.0 for s, frame in zip(scores.double(), frames, strict=True)]
    if not any(weights):
        weights = [float(bool(frame)) for frame in frames]
    tokens: dict[int, Tensor] = {}
    pivot: dict[int, int] = {}
    for t, (frame, n) in enumerate(zip(frames, shared(weights, [len(frame) for frame in frames], keep), strict=True)):
        pivot.update({t * places + p: -1 for p in frame})
        if not n:
            continue
        made: dict[int, Tensor] = {}
        centers = cells(n, rows, cols) if n < len(frame) else []
        for y, x in centers:
            middle = math.floor(y + 0.5 + 1e-9) * cols + math.floor(x + 0.5 + 1e-9)
            if middle not in frame:
                continue
            made[middle], _ = at_place(frame, rows, cols, y, x)
            for p in frame:
                if abs(p // cols - y) < 1 and abs(p % cols - x) < 1 and home(p, n, rows, cols) == (y, x):
                    pivot[t * places + p] = t * places + middle
        spare = [p for p in sorted(frame) if p not in made][: n - len(made)]
        made.update({p: frame[p] for p in spare})
        pivot.update({t * places + p: t * places + p for p in made})
        tokens.update({t * places + p: value for p, value in made.items()})
    return tokens, pivot


def home(place: int, n: int, rows: int, cols: int) -> tuple[float, float]:
    """The center of the cell that a token lies in."""
    centers = cells(n, rows, cols)
    lines = sorted({y for y, _ in centers})
    y = lines[(2 * (place // cols) + 1) * len(lines) // (2 * rows)]
    own = sorted(x for v, x in centers if v == y)
    return y, own[(2 * (place % cols) + 1) * len(own) // (2 * cols)]


@pytest.mark.parametrize("video", TALL, ids=str)
def test_it_is_the_card(video: Video) -> None:
    for keep in budgets(video):
        for scores in (scores_of(video), torch.zeros(video.frames), torch.linspace(0.1, 0.11, video.frames)):
            view = with_scores([video], keep, [scores])
            answer = select(QuoTA(), view)
            tokens, pivot = reference(video, keep, scores)
            assert kept(answer, view) == sorted(tokens) and len(tokens) == keep
            assert torch.allclose(values(answer, view).double(), torch.stack([tokens[n] for n in sorted(tokens)]), atol=1e-5)
            assert pivots(answer, view) == [pivot[n] for n in video.left().tolist()]


@pytest.mark.parametrize("grid", [(6, 6), (5, 8), (9, 4)])
def test_whole_rectangles_are_an_interpolation(grid: tuple[int, int]) -> None:
    video = Video(1, grid, seed=3)
    tokens = video.tokens(8).unflatten(0, grid).permute(2, 0, 1)[None]
    for rows in range(1, grid[0] + 1):
        cols = rows * grid[1] // grid[0]
        if cols * grid[0] != rows * grid[1]:
            continue
        view = with_scores([video], rows * cols)
        want = F.interpolate(tokens, size=(rows, cols), mode="bilinear")[0].flatten(1).T
        assert torch.allclose(values(select(QuoTA(), view), view), want, atol=1e-6)


@pytest.mark.parametrize("side", [3, 8, 14])
def test_rows_of_cells_are_those_of_the_code(side: int) -> None:
    share = torch.arange(side * side + 1)
    cut = shrunk(share[None], torch.tensor([[side, side]]), side * side)
    assert cut.pivot.sum(2)[0].tolist() == share.tolist(), "as many cells as tokens, all at places of their own"
    rows = cut.pivot[0].unflatten(1, (side, side)).any(2).sum(1)
    for n in range(1, side * side + 1):
        assert rows[n] == authors_grid(n)[0] or authors_grid(n)[0] * side < n


def test_what_every_method_for_videos_promises() -> None:
    method = Scored()
    check_views(method)
    check_still(method)
    check_dtypes(method)


class Scored(QuoTA):
    """Scores that only depend on the frame, for Views made without any."""

    def steps(self, geometry):  # type: ignore[no-untyped-def]
        (step,) = super().steps(geometry)
        inner = step.select
        assert inner is not None

        def scored(view: View):  # type: ignore[no-untyped-def]
            at = torch.arange(view.views, device=view.tokens.device)
            view.signals = {SIGNAL: ((at * 7 + 3) % 11 / 11.0).expand(len(view.grids), -1)}
            return inner(view)

        object.__setattr__(step, "select", scored)
        return (step,)


def test_batches_have_the_scores_of_each() -> None:
    keep = [len(video.left()) // 3 or 1 for video in TALL]
    view = with_scores(TALL, keep)
    answer = select(QuoTA(), view)
    for row, video in enumerate(TALL):
        alone = with_scores([video], keep[row])
        assert kept(select(QuoTA(), alone), alone) == kept(answer, view, row)


def test_weights() -> None:
    scores = torch.tensor([[0.5, 1.0, 0.0, 0.9], [0.0, 0.0, 0.0, 0.0], [float("nan"), 0.2, 0.2, 0.0]])
    there = torch.tensor([[True, True, True, False], [True, True, False, True], [True, True, True, True]])
    want = [[0.2, 0.8, 0, 0], [1 / 3, 1 / 3, 0, 1 / 3], [0, 0.5, 0.5, 0]]
    assert torch.allclose(frame_weights(scores, there), torch.tensor(want, dtype=torch.float64))
    share = frame_quotas(torch.tensor([[0.9, 0.1, 0.1]]), torch.tensor([[4, 10, 10]]), torch.tensor([9]))
    assert share[0].tolist() == [4, 3, 2], "what the first cannot take goes to the others"
    assert frame_weights(torch.tensor([[1e-30, 2e-30]]), torch.ones(1, 2, dtype=torch.bool))[0].tolist() == [0.2, 0.8]


def test_the_released_code() -> None:
    weights = authors_weights(torch.tensor([0.6, 0.3, 0.05, 0.03, 0.02]).double().sqrt(), cap=0.25)
    assert torch.allclose(weights, torch.tensor([0.25, 0.25, 1 / 12, 0.05, 1 / 30], dtype=torch.float64))
    assert authors_budgets(weights, 99).tolist() == [24, 24, 8, 4, 3]
    assert [authors_grid(n) for n in (0, 1, 2, 3, 6, 8, 9, 12)] == [(0, 0), (1, 1), (2, 1), (2, 1), (3, 2), (3, 2), (3, 3), (4, 3)]
    tokens = torch.rand(2, 4, 4, 3)
    big, none = authors_frames(tokens, [30, 0], "v1")
    assert big.shape == (6, 5, 3) and not len(none), "v1 has no cap"
    pooled, _ = authors_frames(tokens, [4, 1], "v2")
    assert torch.allclose(pooled, tokens[0].unflatten(0, (2, 2)).unflatten(2, (2, 2)).mean((1, 3)))
    picked, rest = authors_frames(tokens, [3, 0], "v3")
    assert torch.equal(picked, tokens[0].flatten(0, 1)[[0, 7, 15]]) and rest.shape == (0, 3)


def test_settings() -> None:
    assert QuoTA().budget == Budget(keep_ratio=0.25) and only_step(QuoTA()).where == Boundary()
    assert only_step(QuoTA()).needs == (SIGNAL,) and QuoTA.card.experimental
    with pytest.raises(ValueError, match="quota: exponent must be at least 0"):
        QuoTA(exponent=-1.0)
    with pytest.raises(
        VtrError, match="quota: compat='authors' cannot run on a model: the released code makes frames larger than they are"
    ):
        QuoTA(compat="authors").steps(GEOMETRY)
