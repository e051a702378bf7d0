"""Segments of videos, in plain Python."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from vtr.ops.segments import segments


@given(st.integers(0, 10**6), st.lists(st.booleans(), min_size=1, max_size=9), st.integers(1, 6), st.sampled_from([-1.0, 0.0, 0.5, 1.0]))
def test_cuts_are_where_frames_differ(seed: int, present: list[bool], least: int, threshold: float) -> None:
    direction = torch.randn(1, len(present), 3, generator=torch.Generator().manual_seed(seed))
    found = segments(direction, torch.tensor([present]), threshold, least)
    frames = [t for t, there in enumerate(present) if there]
    cosine = [float(F.cosine_similarity(direction[0, a].double(), direction[0, b].double(), dim=0)) for a, b in pairwise(frames)]
    lowest = sorted(range(len(cosine)), key=lambda i: (cosine[i], i))[: least - 1]
    pieces: list[list[int]] = [[]]
    for i, t in enumerate(frames):
        pieces[-1].append(t)
        if i < len(cosine) and (cosine[i] < threshold or i in lowest):
            pieces.append([])
    wanted = {t: (n, len(piece), len(piece) - 1 - i) for n, piece in enumerate(pieces) for i, t in enumerate(piece)}
    for t in range(len(present)):
        assert tuple(int(values[0, t]) for values in found) == wanted.get(t, (-1, 0, 0))


def test_equal_frames_are_cut_from_the_first_on() -> None:
    found = segments(torch.ones(1, 6, 4), torch.ones(1, 6, dtype=torch.bool), 0.9, 3)
    assert found.number[0].tolist() == [0, 1, 2, 2, 2, 2]
