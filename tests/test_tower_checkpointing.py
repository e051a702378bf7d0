"""Gradient checkpointing of the vision tower alone: refused under what acts in the tower, exact under what reads it."""

import pytest
import torch

import vtr
from tests.tiny_models import batch_of, build

INSIDE = {"tome": {"keep": 12}, "expedit": {"alpha": 1, "grid": (3, 3), "tau": 0.1}}


def gradient(model, name, settings):
    batch = batch_of("llava")
    pixels = batch.inputs["pixel_values"].clone().requires_grad_()
    with vtr.reduced(model, name, **settings):
        model(**{**batch.inputs, "pixel_values": pixels}, use_cache=False).logits.square().mean().backward()
    return pixels.grad


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize(("name", "settings"), [*INSIDE.items(), ("hired", {"keep": 12})])
def test_gradients_are_those_without_checkpointing_or_it_is_refused(name, settings, reentrant):
    model = build("llava").train().requires_grad_(True)
    wanted, tower = gradient(model, name, settings), model.model.vision_tower
    enable = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable  # renamed after 5.17
    enable({"use_reentrant": reentrant})
    if name in INSIDE:
        with pytest.raises(vtr.VtrError, match=r"gradient checkpointing runs layers twice.* switch it off"):
            gradient(model, name, settings)
        with torch.no_grad(), vtr.reduced(model, name, **settings):
            assert model(**batch_of("llava").inputs).logits.isfinite().all()
    else:
        assert torch.equal(gradient(model, name, settings), wanted)
