"""Tokens of videos frame by frame."""

import torch
from torch.nn import functional as F

from tests.methods.videos import VIDEOS
from tests.views import Video, video_view
from vtr.methods._frames import frames_of
from vtr.ops import frames as module
from vtr.ops.frames import best_in_order, best_of_frames, cosine_to_frame, frame_means, norms, packed_frames, products


def test_every_token_is_at_its_frame_and_place() -> None:
    view = video_view(VIDEOS, 3, filler=2)
    frames = frames_of(view)
    assert frames.tokens.shape[:3] == (6, 13, 16)
    assert torch.equal(frames.flat(frames.real), view.real)
    assert torch.equal(frames.flat(frames.tokens)[view.real], view.tokens[view.real])
    for g, video in enumerate(VIDEOS):
        assert int(frames.real[g].sum()) == view.counts[g] and frames.there[g].tolist() == [t < video.frames for t in range(13)]
        for n in view.real[g].nonzero()[:, 0].tolist():
            t, row, col = view.cells[g, n].tolist()
            assert torch.equal(frames.tokens[g, t, row * video.grid[1] + col], view.tokens[g, n])
    assert not frames.tokens[~frames.real].any()
    assert torch.equal(frames.of(view.tokens), frames.tokens) and torch.equal(frames.of(view.real), frames.real)


def test_whole_videos_of_one_shape_are_not_copied() -> None:
    view = video_view([Video(3, (2, 2)), Video(3, (2, 2), seed=1)], 3)
    frames = frames_of(view)
    assert frames.tokens.data_ptr() == view.tokens.data_ptr() and frames.real.all() and frames.there.all()
    assert torch.equal(frames.flat(frames.tokens), view.tokens)


def test_cosine_to_another_frame(monkeypatch) -> None:
    frames = frames_of(video_view(VIDEOS, 3))
    reference = [-1, 0, 0, 2, *range(3, 12)]
    for chunk in (2**25, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        cosine, paired = cosine_to_frame(frames.tokens, frames.real, reference)
        for t, other in enumerate(reference):
            both = frames.real[:, t] & frames.real[:, other] & (other >= 0)
            assert torch.equal(paired[:, t], both)
            wanted = F.cosine_similarity(frames.tokens[:, t].double(), frames.tokens[:, other].double(), dim=-1)
            assert torch.allclose(cosine[:, t], torch.where(both, wanted, 0), rtol=0, atol=1e-9)
    assert not cosine_to_frame(frames.tokens, frames.real, [-1] * 13)[1].any()


def test_means_and_best() -> None:
    frames = frames_of(video_view(VIDEOS, 3))
    means = frame_means(frames)
    for g in range(6):
        for t in range(13):
            own = frames.tokens[g, t][frames.real[g, t]]
            assert torch.allclose(means[g, t], own.double().mean(0) if len(own) else torch.zeros(8).double())
    score = torch.rand(frames.real.shape)
    quota = frames.real.sum(2).minimum(torch.tensor(2))
    assert torch.equal(best_of_frames(score, frames.real, quota).sum(2), quota)
    first = best_of_frames(score, frames.real, quota)
    for keep in (1, 3, 20):
        wanted = frames.real.sum((1, 2)).minimum(torch.tensor(keep))
        mask = best_in_order(score, [first, frames.real], wanted)
        assert torch.equal(mask.sum((1, 2)), wanted)
        assert not (mask & ~first & (first & ~mask).any((1, 2), keepdim=True)).any(), "nothing of the second tier before all of the first"


def test_lengths_and_products(monkeypatch) -> None:
    frames = frames_of(video_view(VIDEOS, 3))
    for chunk in (2**24, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert torch.allclose(norms(frames.tokens), frames.tokens.double().norm(dim=-1))
        direction = torch.randn(6, 13, 8)
        assert torch.allclose(products(frames.tokens, direction), (frames.tokens.double() * direction.double()[:, :, None]).sum(-1))
        assert torch.allclose(products(frames.tokens, direction[:, :1]), (frames.tokens.double() * direction.double()[:, :1, None]).sum(-1))


def test_packed_frames_can_be_put_back() -> None:
    values, present = torch.rand(2, 5, 3), torch.tensor([[True, False, True, True, False], [False] * 5])
    packed, place = packed_frames(values, present)
    assert torch.equal(packed[0], values[0, [0, 2, 3, 1, 4]])
    assert torch.equal(packed.gather(1, place[..., None].expand_as(values)), values)
