"""Properties of compaction and gathering, against plain Python."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.gather import compaction, index_to_mask, left_align, take

masks = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 8).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=rows, max_size=rows)
    )
)


def survivors(row: list[bool]) -> list[int]:
    return [i for i, stays in enumerate(row) if stays]


@given(masks)
def test_compaction_is_right_aligned_in_original_order(rows: list[list[bool]]) -> None:
    keep = torch.tensor(rows)
    index, real = compaction(keep)
    width = max(len(survivors(row)) for row in rows)
    assert index.shape == real.shape == (len(rows), width)
    for row, at, there in zip(rows, index.tolist(), real.tolist(), strict=True):
        kept = survivors(row)
        assert at[width - len(kept) :] == kept and there == [False] * (width - len(kept)) + [True] * len(kept)
        assert not any(row[i] for i in at[: width - len(kept)]), "filler is made of removed tokens"
    assert all(torch.equal(a, b) for a, b in zip(compaction(keep, width), (index, real), strict=True)), "a known width changes nothing"


@given(masks)
def test_left_align_is_left_aligned_in_original_order(rows: list[list[bool]]) -> None:
    width = max(len(survivors(row)) for row in rows)
    index, real = left_align(torch.tensor(rows), width)
    for row, at, there in zip(rows, index.tolist(), real.tolist(), strict=True):
        kept = survivors(row)
        assert at[: len(kept)] == kept and there == [True] * len(kept) + [False] * (width - len(kept))


@given(masks)
def test_index_to_mask_undoes_both(rows: list[list[bool]]) -> None:
    keep = torch.tensor(rows)
    assert torch.equal(index_to_mask(*compaction(keep), keep.shape[1]), keep)
    assert torch.equal(index_to_mask(*left_align(keep, keep.shape[1]), keep.shape[1]), keep)


def test_take_works_along_any_dimension_and_broadcasts_the_batch() -> None:
    tensor = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    index = torch.tensor([[0, 2], [1, 1]])
    assert torch.equal(take(tensor, index), torch.stack([tensor[0][[0, 2]], tensor[1][[1, 1]]]))
    one = torch.arange(6).view(1, 6)
    assert take(one, index).tolist() == [[0, 2], [1, 1]], "a batch of 1 is shared by all rows"
    positions = torch.arange(3 * 2 * 6).view(3, 2, 6)
    assert torch.equal(take(positions, index, dim=-1)[2], take(positions[2], index))
