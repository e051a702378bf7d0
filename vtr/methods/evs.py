"""EVS: drop what looks as it did at the same place of the frame before.

Paper: Bagrov et al. (NVIDIA), 2025, arXiv 2510.14624; the algorithm is that of vLLM's implementation.
Code:  github.com/vllm-project/vllm vllm/multimodal/evs.py at 094f117 (the file also carries a proprietary notice): nothing copied, checked
against its outputs.
Stage: boundary. Reads: visual tokens. Batch: any. Deterministic: yes.

1. The novelty of a token is 1 - cosine to the token at the same place of the frame before; that of the first frame is above all others.
2. The most novel tokens of the whole video stay, in their order; a quiet frame may keep none.

Paper to code: q -> 1 - keep_ratio. vLLM keeps `max(P, int(T P (1 - q)))` tokens, P being those of a frame (`evs_count`).
Departures: the budget is exact, and may be below one frame: then evenly spaced tokens of the first frame stay, where vLLM keeps the whole
frame (`compat="authors"`). Cosines are computed in float64, where the code uses the dtype of the embeddings. Where an earlier method removed the
token at the same place of the frame before, a token counts as new. Positions are those of the unreduced prompt, where vLLM lets text restart
behind the width of the grid, with `compat` as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from vtr.methods._frames import authors_ratio, frames_of
from vtr.ops.canvas import on_device
from vtr.ops.frames import best_of_video, cosine_to_frame
from vtr.ops.spaced import evenly_spaced
from vtr.registry import register_method
from vtr.types import VIDEO, Boundary, Budget, Card, Geometry, Method, Remove, Selection, Stage, Step, View, check_choices


def evs(tokens: Tensor, real: Tensor, keep: Tensor) -> Tensor:
    """Keeps the tokens that changed most since the frame before.

    Args:
        tokens: `(G, T, P, D)`, one video per row, any float dtype; cosines in float64.
        real: `(G, T, P)` bool.
        keep: `(G,)` int64, at most `real.sum((1, 2))`.

    Returns:
        Keep mask `(G, T, P)` bool with exactly `keep` True per row; ties go to the first in time, then in raster order. `O(T P D)`, no sync.
    """
    cosine, paired = cosine_to_frame(tokens, real, range(-1, tokens.shape[1] - 1))
    new = real & ~paired
    first = keep.minimum(new.sum((1, 2)))
    start = evenly_spaced(new.flatten(1), first).view(real.shape)
    return start | best_of_video(1 - cosine, paired, keep - first)


def evs_count(frames: int, places: int, pruned: float) -> int:
    """Returns how many tokens vLLM keeps of a video, `pruned` being its rate q."""
    return max(places, int(frames * places * (1 - pruned)))


@register_method("evs")
@dataclass(frozen=True, kw_only=True)
class EVS(Method):
    """The default is q = 0.7, that of the model the method was published with; positions are kept."""

    compat: Literal["authors"] | None = None

    stages: ClassVar[tuple[Stage, ...]] = ("boundary",)
    default_budget: ClassVar[Budget | None] = Budget(keep_ratio=0.3)
    card: ClassVar[Card] = Card(
        title="Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference",
        paper="Bagrov et al., 2025",
        arxiv="2510.14624",
        code="github.com/vllm-project/vllm (vllm/multimodal/evs.py, not used)",
        cost="one cosine per token and a sort, O(N D)",
        needs_video=True,
        settings={"compat": "'authors': vLLM's count for keep_ratio, never below one frame"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, self.name)

    def steps(self, geometry: Geometry) -> tuple[Step, ...]:
        if self.compat is None:
            return (Remove(Boundary(), _select, on=VIDEO),)
        return (Remove(Boundary(), partial(_as_authors, 1 - authors_ratio(self)), on=VIDEO, counted=False),)


def _as_authors(pruned: float, view: View) -> Selection:
    shapes = [(len(own), math.prod(view.grid(group))) for group, own in enumerate(view.grids)]
    keep = [min(evs_count(*shape, pruned), count) for shape, count in zip(shapes, view.counts, strict=True)]
    return _select(replace(view, keep=on_device([keep], view.real.device)[0]))


def _select(view: View) -> Selection:
    frames = frames_of(view)
    return Selection(keep=frames.flat(evs(frames.tokens, frames.real, view.keep)))
