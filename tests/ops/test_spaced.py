"""Evenly spaced entries, against the formula in plain Python."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.spaced import evenly_spaced


@given(st.lists(st.tuples(st.lists(st.booleans(), min_size=12, max_size=12), st.integers(0, 14)), min_size=1, max_size=4))
def test_ranks_are_floor_of_i_and_a_half_times_n_over_k(rows: list[tuple[list[bool], int]]) -> None:
    mask = evenly_spaced(torch.tensor([[real for real, _ in rows]]), torch.tensor([[keep for _, keep in rows]]))[0]
    for own, (real, keep) in zip(mask, rows, strict=True):
        present = [i for i, there in enumerate(real) if there]
        keep = min(keep, len(present))
        assert own.nonzero()[:, 0].tolist() == [present[(2 * i + 1) * len(present) // (2 * keep)] for i in range(keep)]
