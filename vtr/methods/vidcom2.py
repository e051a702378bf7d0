"""VidCom2: keep the tokens least like their frame and the whole video, more of frames that stand out.

Paper: Liu et al., EMNLP 2025, arXiv 2505.14454.
Code:  github.com/xuyang-liu16/VidCom2 at 944a17d, Apache-2.0: nothing copied, checked against its outputs.
Stage: boundary. Reads: visual tokens. Batch: any. Deterministic: yes.

1. The half of the channels whose values vary least over the video is used, and tokens are scaled to length 1 over these.
2. The centre of the video is the mean of its tokens, that of a frame the mean of the frame's; centres are not scaled.
3. A token is as like a centre as the sum over a = 1/8, 1/4, 1/2, 1, 2 of exp(-distance^2 / (2 a)) says.
4. A frame stands out by minus the mean likeness of its tokens to the video; p is the softmax of that over 0.01. With T frames and a share
   r of all tokens to keep, a frame is to keep the share r (1 + p - 1/T) of its tokens, at most all and at least one token.
5. In every frame the tokens least like both centres stay.
6. If that makes more or fewer than the budget: of all chosen ones those most like their centres go, or of all others those least like them
   stay, be they of any frame; every frame keeps its first choice while the budget has one token per frame.

Paper to code: R -> keep_ratio, tau -> temperature. The channels of step 1 are only in the code, which made the published numbers.
Departure: step 6; the code keeps what step 5 gives (`compat="authors"`). Frames that an earlier method emptied are left out. The authors put
newline tokens of LLaVA-Video behind all tokens of a frame; here they stay where they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vtr.methods._frames import authors_ratio, frames_of
from vtr.ops.frames import Frames, best_in_order, best_of_frames, frame_sums, norms, products, rounded, stretches
from vtr.registry import register_method
from vtr.types import VIDEO, Boundary, Budget, Card, Geometry, Method, Remove, Selection, Stage, Step, View, check_choices

ALPHAS = (0.125, 0.25, 0.5, 1.0, 2.0)
EPS = 1e-12


class Likeness(NamedTuple):
    """How much each token is like its video and its frame, `(G, T, P)` float64 each, higher is more; 0 where there is no token."""

    video: Tensor
    frame: Tensor


def quiet_channels(frames: Frames, share: float = 0.5) -> Tensor:
    """Returns the channels `(G, C)` int64, ascending, whose variance over all tokens of a video is lowest; ties: lowest index."""
    tokens, real = frames.tokens, frames.real
    mean = frame_sums(tokens).sum(1) / real.sum((1, 2)).clamp_min(1)[:, None]
    spread = torch.zeros_like(mean)
    for some in stretches(tokens):
        away = (tokens[:, some].double() - mean[:, None, None]).square_().mul_(real[:, some, :, None])
        spread = spread + away.sum((1, 2))
    count = max(1, int(tokens.shape[-1] * share))
    return spread.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def likeness(frames: Frames, channels: Tensor) -> Likeness:
    """Compares each token with the centre of its video and of its frame, over `channels (G, C)` alone. `O(T P D)`, no host sync."""
    real, count = frames.real, frames.real.sum(2)
    some = frames.tokens.gather(3, channels[:, None, None].expand(*real.shape, -1))
    norm = norms(some)
    scale = 1 / norm.clamp_min(EPS)
    weight = (scale * real)[:, :, None]  # (G, T, 1, P)
    per_frame = torch.cat([(weight[:, at] @ some[:, at].double())[:, :, 0] for at in stretches(some)], 1)  # (G, T, C) sums
    video = per_frame.sum(1, keepdim=True) / count.sum(1).clamp_min(1)[:, None, None]

    def like(centre: Tensor) -> Tensor:  # (G, T or 1, C)
        along = products(some, centre) * scale
        away = ((norm * scale).square() + centre.square().sum(-1, keepdim=True) - 2 * along).clamp_min(0)
        return torch.stack([torch.exp(-away / (2 * alpha)) for alpha in ALPHAS]).sum(0) * real

    return Likeness(like(video), like(per_frame / count.clamp_min(1)[..., None]))


def frame_shares(video: Tensor, real: Tensor, base: Tensor, temperature: float = 0.01) -> Tensor:
    """Share of its tokens that each frame is to keep.

    Args:
        video: `(G, T, P)` likeness to the video.
        real: `(G, T, P)` bool.
        base: `(G,)` float, the share of all tokens that is to stay.
        temperature: of the softmax.

    Returns:
        `(G, T)`, at most 1.
    """
    count = real.sum(2)
    apart = (-video.sum(2) / count.clamp_min(1)).masked_fill(count == 0, -torch.inf).float()  # as the authors, whose halves round alike
    bonus = ((apart - apart.amax(1, keepdim=True)) / temperature).softmax(1)
    frames = (count > 0).sum(1).clamp_min(1)[:, None]
    return (base[:, None].to(bonus.dtype) * (1 + bonus - 1 / frames)).clamp_max(1)


def vidcom2(like: Likeness, real: Tensor, base: Tensor, keep: Tensor | None, temperature: float = 0.01) -> Tensor:
    """Keeps the tokens least like their video and frame.

    Args:
        like: of each token.
        real: `(G, T, P)` bool.
        base: `(G,)` float, the share of all tokens that is to stay.
        keep: `(G,)` int64, exactly so many tokens; None: as many as rounding per frame gives, as in the released code.
        temperature: of the softmax over frames.

    Returns:
        Keep mask `(G, T, P)` bool; ties go to the lowest index. No host sync.
    """
    count = real.sum(2)
    score = -rounded(like.video + like.frame)
    wanted = (frame_shares(like.video, real, base, temperature) * count).round().long().clamp_min(1).minimum(count)
    chosen = best_of_frames(score, real, wanted)
    if keep is None:
        return chosen
    first = best_of_frames(score, real, count.clamp_max(1)) & ((count > 0).sum(1) <= keep)[:, None, None]
    return best_in_order(score, [first, chosen, real], keep)


@register_method("vidcom2")
@dataclass(frozen=True, kw_only=True)
class VidCom2(Method):
    """The default is the authors' 25 %; positions are kept, as on Qwen-VL."""

    temperature: float = 0.01
    channel_ratio: float = 0.5
    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.25)
    card: ClassVar[Card] = Card(
        title="Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models",
        paper="Liu et al., 2025",
        venue="EMNLP 2025",
        arxiv="2505.14454",
        code="github.com/xuyang-liu16/VidCom2",
        cost="variance of the channels, two products of half the channels with centres, O(N D)",
        needs_video=True,
        settings={
            "temperature": "of the softmax over frames; higher shares tokens more evenly over frames",
            "channel_ratio": "share of the channels, those that vary least, that tokens are compared by; 1 = all",
            "compat": "'authors': as many tokens as rounding per frame makes of keep_ratio",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, self.name)
        if not self.temperature > 0:
            raise ValueError(f"vidcom2: temperature must be above 0, got {self.temperature}; the authors use 0.01")
        if not 0 < self.channel_ratio <= 1:
            raise ValueError(f"vidcom2: channel_ratio must be above 0 and at most 1, got {self.channel_ratio}; the authors use 0.5")

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        if self.compat is None:
            return (Remove(Boundary(), self._select, on=VIDEO),)
        return (Remove(Boundary(), partial(self._select, ratio=authors_ratio(self)), on=VIDEO, counted=False),)

    def _select(self, view: View, ratio: float | None = None) -> Selection:
        frames = frames_of(view)
        like = likeness(frames, quiet_channels(frames, self.channel_ratio))
        base = (
            view.keep.double() / view.real.sum(1).clamp_min(1) if ratio is None else torch.full_like(view.keep, ratio, dtype=torch.float64)
        )
        return Selection(keep=frames.flat(vidcom2(like, frames.real, base, view.keep if ratio is None else None, self.temperature)))
