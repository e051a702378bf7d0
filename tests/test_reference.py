"""The reference that the oracles compare with is right about the unmodified model, and its own parts about arithmetic."""

import pytest
import torch

from tests import reference, tiny_models
from tests.reference import Expected


@pytest.mark.parametrize("kind", tiny_models.ALL_KINDS)
@pytest.mark.parametrize("pad", ["left", "right"])
@torch.no_grad()
def test_without_changes_it_is_the_model(kind, pad):
    model, batch = tiny_models.model_of(kind, dtype=torch.float64), tiny_models.batch_of(kind, pad=pad, dtype=torch.float64)
    keep = batch.valid
    full = model(**batch.inputs, position_ids=batch.positions).logits
    same = reference.masked_logits(model, batch, Expected(drops=[(0, keep), (3, keep)], tower_drops=[]))
    assert reference.difference(batch, keep, full, same) < 1e-6


@pytest.mark.parametrize("kind", tiny_models.ALL_KINDS)
def test_spots_cover_every_placeholder_once(kind):
    batch = tiny_models.batch_of(kind, tiny_models.WITH_TEXT_ONLY)
    found = reference.spots(batch)
    assert [len(spot.positions) for spot in found] == batch.counts()
    covered = torch.zeros_like(batch.visual, dtype=torch.long)
    for spot in found:
        covered[spot.row, spot.positions] += 1
        covered[spot.row, list(spot.newlines)] += 1
        assert sorted(i for row in spot.members for i in row.tolist()) == list(
            range(36 if "next" in kind else len(spot.positions), len(spot.positions))
        )
    assert torch.equal(covered.bool(), batch.visual) and int(covered.max()) == 1


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@torch.no_grad()
def test_hidden_tokens_do_not_reach_the_others(kind):
    model, batch = tiny_models.model_of(kind), tiny_models.batch_of(kind)
    spot = reference.spots(batch)[0]
    keep = batch.valid.clone()
    keep[spot.row, spot.positions[5:]] = False
    before = reference.masked_logits(model, batch, Expected(drops=[(0, keep)]))

    def disturb(module, args, kwargs):  # other values for the hidden tokens
        return args, {**kwargs, "inputs_embeds": torch.where((keep | ~batch.valid)[..., None], kwargs["inputs_embeds"], 3.0)}

    handle = model.model.language_model.register_forward_pre_hook(disturb, with_kwargs=True)
    try:
        after = reference.masked_logits(model, batch, Expected(drops=[(0, keep)]))
    finally:
        handle.remove()
    assert torch.equal(before[keep], after[keep])


def test_average_weighs_by_size():
    hidden = torch.tensor([[[1.0], [3.0], [10.0]]])
    merged = reference.average(hidden, torch.tensor([[1.0, 3.0, 1.0]]), torch.tensor([[0, 0, 2]]))
    assert merged[0, 0, 0] == 2.5 and merged[0, 2, 0] == 10.0


@torch.no_grad()
def test_one_token_less_is_seen():
    """The oracles have teeth: a reference that hides one token more differs visibly."""
    model, batch = tiny_models.model_of("llava"), tiny_models.batch_of("llava")
    keep = batch.valid.clone()
    full = reference.masked_logits(model, batch, Expected())
    spot = reference.spots(batch)[0]
    keep[spot.row, spot.positions[7]] = False
    less = reference.masked_logits(model, batch, Expected(drops=[(0, keep)]))
    assert float((full - less)[keep].abs().max()) > 0.05
