"""DyCoke against the card in plain Python: tokens at the boundary, and keys while decoding."""

import pytest
import torch
from torch.nn import functional as F

from tests.methods.videos import GEOMETRY, VIDEOS, budgets, check_all, frames_of_video, kept, only_step, select
from tests.views import Video, video_view
from vtr.methods.dycoke import DyCoke, attended, dycoke_authors
from vtr.types import VIDEO, Boundary, Budget, Decode, VtrError
from vtr.types.signals import attention


def reference(video: Video, keep: int) -> list[int]:
    """The card, frame by frame in float64."""
    frames, places = frames_of_video(video), video.grid[0] * video.grid[1]
    whole = [t for t in range(video.frames) if t % 4 == 0]
    others = [t for t in range(video.frames) if t % 4]
    first = sum(len(frames[t]) for t in whole)
    share = shared({t: len(frames[t]) for t in whole}, min(keep, first)) | shared({t: len(frames[t]) for t in others}, max(keep - first, 0))
    found: list[int] = []
    for t, frame in enumerate(frames):
        before = {} if t == 0 else frames[t - (4, 1, 2, 1)[t % 4]]
        new = [place for place in frame if place not in before]
        known = {place: float(F.cosine_similarity(frame[place], before[place], dim=0)) for place in frame if place in before}
        if share[t] < len(new):
            chosen = [new[(2 * i + 1) * len(new) // (2 * share[t])] for i in range(share[t])]
        else:
            chosen = new + sorted(known, key=lambda place: (known[place], place))[: share[t] - len(new)]
        found += sorted(t * places + place for place in chosen)
    return found


def shared(counts: dict[int, int], total: int) -> dict[int, int]:
    """By largest remainder, in proportion to the counts."""
    everything = sum(counts.values())
    wanted = {t: total * count / everything if everything else 0 for t, count in counts.items()}
    share = {t: int(want + 1e-9) for t, want in wanted.items()}
    rest = sorted(counts, key=lambda t: (-round(wanted[t] - share[t], 9), t))
    for t in rest[: total - sum(share.values())]:
        share[t] += 1
    return share


@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_it_is_the_card(video: Video) -> None:
    for keep in budgets(video):
        view = video_view([video], keep)
        assert kept(select(DyCoke(), view), view) == reference(video, keep)


def test_what_every_method_for_videos_promises() -> None:
    check_all(DyCoke())


def test_the_published_ratio_is_a_whole_frame_and_three_tenths_of_three() -> None:
    video = Video(8, (5, 8), scenes=8)
    view = video_view([video], round(0.475 * 320))
    per_frame = torch.tensor(kept(select(DyCoke(), view), view)).div(40, rounding_mode="floor").bincount(minlength=8)
    assert per_frame.tolist() == [40, 12, 12, 12] * 2


def authors(video: Video, pruned: float) -> list[int]:
    """The released code by the card: pairs, then pairs of pairs but for the last window; an odd last frame is lost."""
    frames, places = video.tokens(8).double().unflatten(0, (video.frames, -1)), video.grid[0] * video.grid[1]
    few = int((1 - pruned) * places)
    kept = [list(range(places)) for _ in range(video.frames)]

    def least(t: int, other: int) -> list[int]:
        return F.cosine_similarity(frames[t], frames[other], dim=-1).argsort(stable=True)[:few].tolist()

    done = []
    for i in range(0, video.frames - 1, 2):
        kept[i + 1] = least(i + 1, i)
        done += [i, i + 1]
    for i in range(0, video.frames - 4, 4):
        kept[i + 2] = least(i + 2, i)
    return [t * places + place for t in done for place in kept[t]]


@pytest.mark.parametrize("frames", [5, 6, 7, 8, 9, 12, 13])
def test_the_released_code(frames: int) -> None:
    video = Video(frames, (3, 4), scenes=frames, seed=frames)
    tokens = video.tokens(8).unflatten(0, (frames, -1))[None]
    order, kept = dycoke_authors(tokens, torch.ones(tokens.shape[:3], dtype=torch.bool), [frames], 0.7)
    assert order[0, : int(kept.sum())].tolist() == authors(video, 0.7)


def test_the_released_code_needs_more_than_four_frames() -> None:
    with pytest.raises(
        VtrError, match="dycoke: compat='authors' needs more than 4 frames, as the released code does, got 4; leave compat out"
    ):
        dycoke_authors(torch.rand(1, 4, 3, 2), torch.ones(1, 4, 3, dtype=torch.bool), [4], 0.5)


def test_decoding_attends_to_the_most_attended_where_attention_moved() -> None:
    real = torch.tensor([[True] * 10, [True] * 6 + [False] * 4])
    keep, row = torch.tensor([3, 1]), torch.rand(2, 10)
    mask, similarity = attended(row, None, real, keep)
    assert similarity.tolist() == [0, 0] and mask.sum(1).tolist() == [3, 1]
    assert mask[0].nonzero()[:, 0].tolist() == sorted(row[0].topk(3).indices.tolist())
    other = torch.stack([row[0] * 1.01, torch.rand(10).where(torch.arange(10) == 0, 0.0)])
    mask, similarity = attended(other, row, real, keep)
    assert similarity[0] > 0.9 and torch.equal(mask[0], real[0]), "attention has not moved: everything"
    assert similarity[1] < 0.9 and mask[1].sum() == 1


def test_the_step_while_decoding() -> None:
    method = DyCoke(decode=True, layer=2, pruned=0.5)
    merge, attend = method.steps(GEOMETRY)
    assert merge.where == Boundary() and attend.where == Decode(2) and attend.on == VIDEO and attend.needs == (attention(1),)
    videos = [Video(3, (2, 2)), Video(1, (2, 3), seed=1)]
    view = video_view(videos, 4, signals={attention(1): lambda video: torch.rand(video.frames * video.grid[0] * video.grid[1])})
    first = select(method, view, step=1)
    assert first.keep is not None and first.keep.sum(1).tolist() == [6, 3] and not (first.keep & ~view.real).any()
    second = select(method, view, step=1)
    assert second.keep is not None and torch.equal(second.keep, view.real), "the same attention again"


def test_settings() -> None:
    assert DyCoke().budget == Budget(keep_ratio=0.475) and only_step(DyCoke()).where == Boundary()
    assert DyCoke.published_positions == "renumber"
    with pytest.raises(ValueError, match="dycoke: layer 8 .the paper's L = 8. is out of range"):
        DyCoke(decode=True, layer=8).steps(GEOMETRY)
    with pytest.raises(ValueError, match="dycoke: layer must be at least 1, got 0"):
        DyCoke(layer=0)
    with pytest.raises(ValueError, match="dycoke: pruned must be from 0 to below 1, got 1"):
        DyCoke(pruned=1)
