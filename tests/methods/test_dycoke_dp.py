"""DyCoke's choice of keys for new tokens, against the card in plain Python."""

import math

import pytest
import torch
from torch import Tensor

from tests.methods.videos import VIDEOS
from tests.views import video_view
from vtr.methods._dycoke_dp import attended_tokens, select_attended


def attention_rows(steps: int, count: int, seed: int) -> list[Tensor]:
    """What new tokens pay to the visual tokens: now and then almost the same as before."""
    random = torch.Generator().manual_seed(seed)
    rows, made = [], torch.rand(count, generator=random)
    for step in range(steps):
        made = made + 0.02 * torch.rand(count, generator=random) if step % 3 == 1 else torch.rand(count, generator=random) ** 6
        rows.append(made / made.sum())
    return rows


def reference(rows: list[Tensor], pruned: float, threshold: float, authors: bool) -> list[list[int]]:
    """The card, one new token after the other."""
    found: list[list[int]] = []
    before: list[float] | None = None
    for row in rows:
        now = row.double().tolist()
        wide = math.sqrt(sum(x * x for x in now))
        alike = 0.0
        if before is not None:
            alike = sum(x * y for x, y in zip(now, before, strict=True)) / (wide * math.sqrt(sum(y * y for y in before)))
        if alike < threshold:
            best = sorted(range(len(now)), key=lambda i: (-now[i], i))[: max(int(len(now) * (1 - pruned)), 1)]
            found.append(sorted(best))
        else:
            found.append(list(range(len(now))) if authors else found[-1])
        before = now
    return found


@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize("pruned", [0.0, 0.7, 0.99])
def test_it_is_the_card(pruned: float, authors: bool) -> None:
    counts = [24, 7, 1]
    rows = [attention_rows(7, count, seed) for seed, count in enumerate(counts)]
    real = torch.arange(24) >= 24 - torch.tensor(counts)[:, None]
    before: tuple[Tensor, Tensor] | None = None
    found: list[list[list[int]]] = [[] for _ in counts]
    for step in range(7):
        paid = torch.full((3, 24), 9.0)
        for g, count in enumerate(counts):
            paid[g, 24 - count :] = rows[g][step]
        chosen = attended_tokens(paid, real, before, pruned, authors=authors)
        before = torch.where(real, paid, 0), chosen.keep
        for g, count in enumerate(counts):
            found[g].append((chosen.keep[g].nonzero()[:, 0] - (24 - count)).tolist())
    assert found == [reference(own, pruned, 0.9, authors) for own in rows]


def test_the_choice_lives_in_the_memory_of_the_view() -> None:
    view = video_view(VIDEOS, 5)
    row = torch.rand(view.real.shape, generator=torch.Generator().manual_seed(1))
    first = select_attended(view, row, 0.7)
    again = select_attended(view, row * 1.01, 0.7)
    assert first.keep is not None and again.keep is not None and torch.equal(first.keep, again.keep)
    assert first.keep.sum(1).tolist() == [max(int(n * (1 - 0.7)), 1) for n in view.counts]
    other = select_attended(view, 1 - row.sqrt().sqrt(), 0.7)
    assert other.keep is not None and not torch.equal(other.keep, first.keep)
    whole = select_attended(view, 1 - row.sqrt().sqrt(), 0.7, authors=True)
    assert whole.keep is not None and torch.equal(whole.keep, view.real)


def test_half_precision_and_blank_attention() -> None:
    real = torch.ones(2, 10, dtype=torch.bool)
    paid = torch.zeros(2, 10, dtype=torch.bfloat16)
    first = attended_tokens(paid, real, None)
    assert first.keep.sum(1).tolist() == [3, 3] and torch.equal(first.keep[0, :3], torch.ones(3, dtype=torch.bool))
    then = attended_tokens(paid, real, (paid, first.keep))
    assert then.similarity.tolist() == [0, 0] and torch.equal(then.keep, first.keep)
