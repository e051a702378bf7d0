"""What every method for videos promises, checked on hand-made Views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.methods.handmade import LLAVA, select_without_sync
from tests.views import Video, video_view
from vtr.types import VIDEO, Method, Selection, Signal, Step, View

GEOMETRY = replace(LLAVA, kinds=("image", "video"), has_cls=False, prefix_tokens=0)
VIDEOS = [
    Video(6, (3, 4), seed=1),
    Video(9, (2, 2), seed=2, scenes=9),
    Video(4, (4, 4), seed=3, gone=0.4, scenes=2),
    Video(1, (3, 5), seed=4, scenes=1),
    Video(13, (2, 3), seed=5, gone=0.2, scenes=4, grain=0.05),
    Video(2, (1, 1), seed=6, scenes=1),
]
STILL = Video(5, (3, 3), seed=9, scenes=1, grain=0.0)
Signals = Mapping[Signal, Callable[[Video], Tensor]]


def only_step(method: Method) -> Step:
    """The one step of a method."""
    (step,) = method.steps(GEOMETRY)
    assert step.on == VIDEO and step.select is not None
    return step


def select(method: Method, view: View, step: int = 0) -> Selection:
    """What a step of a method answers."""
    found = method.steps(GEOMETRY)[step]
    assert found.select is not None
    answer = found.select(view)
    assert isinstance(answer, Selection) and answer.keep is not None
    return answer


def kept(selection: Selection, view: View, row: int = 0) -> list[int]:
    """Original numbers of the tokens that a video keeps."""
    assert selection.keep is not None
    return view.patch[row][selection.keep[row]].tolist()


def values(selection: Selection, view: View, row: int = 0) -> Tensor:
    """Values of the tokens that a video keeps."""
    tokens = view.tokens if selection.tokens is None else selection.tokens
    assert selection.keep is not None
    return tokens[row][selection.keep[row]]


def pivots(selection: Selection, view: View, row: int = 0) -> list[int]:
    """Original number of the pivot of each token that a video had, -1 for none."""
    assert selection.assign is not None
    own = selection.assign[row][view.real[row]]
    return torch.where(own >= 0, view.patch[row][own.clamp_min(0)], -1).tolist()


def budgets(video: Video) -> list[int]:
    """Keep counts worth trying: one, few, about a quarter, more than half, all."""
    n = len(video.left())
    return sorted({min(max(k, 1), n) for k in (1, 2, video.frames - 1, video.frames + 1, round(0.15 * n), n // 4, 2 * n // 3, n - 1, n)})


def check_views(method: Method, signals: Signals | None = None, step: int = 0, width: int = 8, videos: Sequence[Video] = VIDEOS) -> None:
    """Exact counts in batches, each video as alone, nothing but real tokens, no waiting, all kept bit for bit; a budget of its own each turn."""
    for turn in range(3):
        keep = [own[turn * (len(own) - 1) // 2] for own in map(budgets, videos)]  # the least, the middle one, all
        view = video_view(videos, keep, signals=signals, filler=turn % 3, width=width)
        before = view.tokens.clone()
        answer = select(method, view, step)
        assert answer.keep is not None
        assert answer.keep.sum(1).tolist() == view.keeps and not (answer.keep & ~view.real).any()
        assert torch.equal(view.tokens, before), "the tokens of the View are not written to"
        assert answer.tokens is None or (answer.tokens.dtype == view.tokens.dtype and answer.tokens[view.real].isfinite().all())
        for row, video in enumerate(videos):
            alone = video_view([video], [keep[row]], signals=signals, width=width)
            own = select(method, alone, step)
            assert kept(own, alone) == kept(answer, view, row)
            assert torch.allclose(values(own, alone), values(answer, view, row), rtol=0, atol=1e-5)
            check_pivots(answer, view, row)
            if answer.assign is not None:
                assert pivots(own, alone) == pivots(answer, view, row)
            if keep[row] == view.counts[row]:
                assert torch.equal(values(answer, view, row), before[row][view.real[row]])
        if turn == 1:
            select_without_sync(method.steps(GEOMETRY)[step], view)


def check_pivots(answer: Selection, view: View, row: int) -> None:
    """A kept token names itself, others a kept one or none."""
    if answer.assign is None:
        return
    assert answer.keep is not None
    keep, assign = answer.keep[row], answer.assign[row]
    itself = torch.arange(len(keep))
    assert torch.equal(assign[keep], itself[keep])
    merged = (assign >= 0) & view.real[row]
    assert keep[assign[merged]].all()


def check_still(method: Method, signals: Signals | None = None, step: int = 0) -> None:
    """Frames that are all the same, and tokens that are all zero, give exact counts and no NaN."""
    for keep in budgets(STILL)[::2]:
        for blank in (False, True):
            view = video_view([STILL, STILL], keep, signals=signals)
            if blank:
                view.tokens.zero_()
            answer = select(method, view, step)
            assert answer.keep is not None and answer.keep.sum(1).tolist() == [keep, keep]
            assert torch.equal(answer.keep[0], answer.keep[1])
            assert answer.tokens is None or answer.tokens.isfinite().all()


def check_dtypes(method: Method, signals: Signals | None = None, step: int = 0) -> None:
    """Half precision chooses what the same numbers in float32 choose, and gives its own dtype back."""
    for dtype in (torch.float16, torch.bfloat16):
        view = video_view(VIDEOS, 9, dtype=dtype, signals=signals)
        answer = select(method, view, step)
        wide = select(method, replace(view, tokens=view.tokens.float()), step)
        assert answer.keep is not None and wide.keep is not None and torch.equal(answer.keep, wide.keep)
        assert answer.tokens is None or answer.tokens.dtype == dtype


def check_all(method: Method, signals: Signals | None = None, step: int = 0) -> None:
    """All of the above."""
    check_views(method, signals, step)
    check_still(method, signals, step)
    check_dtypes(method, signals, step)


def frames_of_video(video: Video, width: int = 8, dtype: torch.dtype = torch.float64) -> list[dict[int, Tensor]]:
    """For plain references: of every frame the tokens that are left, place -> vector."""
    places = video.grid[0] * video.grid[1]
    tokens = video.tokens(width).to(dtype)
    found: list[dict[int, Tensor]] = [{} for _ in range(video.frames)]
    for number in video.left().tolist():
        found[number // places][number % places] = tokens[number]
    return found


def signal_of(scale: float = 1.0, low: float = 0.0) -> Callable[[Video], Any]:
    """A random positive number for every token of a video."""

    def made(video: Video) -> Tensor:
        random = torch.Generator().manual_seed(video.seed + 5)
        return low + scale * torch.rand(video.frames * video.grid[0] * video.grid[1], generator=random)

    return made
