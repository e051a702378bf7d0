"""Training through a reduced model: labels follow the survivors, gradients flow."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import vtr
from tests import reference, tiny_models
from tests.marks import quick_first
from tests.oracles import Setup, expected_of
from tests.probes import EveryNth, Freeze, MergePairs, Ragged, TowerTop, recorded
from tests.tiny_models import batch_of, build, model_of

PLANS = {
    "boundary": [EveryNth(stride=3)],
    "ragged": [Ragged(), EveryNth(stage="prefill", layer=2)],
    "tower": [TowerTop(), EveryNth()],
    "merge": [MergePairs(), MergePairs(stage="prefill", layer=3)],
    "frozen": [EveryNth(), Freeze()],
}


def labels_of(batch: tiny_models.Batch) -> torch.Tensor:
    """Every text token is a target."""
    return torch.where(batch.valid & ~batch.visual, batch.inputs["input_ids"], -100)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@pytest.mark.parametrize("pad", quick_first(["left", "right"]))
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@torch.no_grad()
def test_the_loss_is_that_of_the_survivors(kind, pad, plan):
    setup = Setup(kind, dtype=torch.float64)
    batch = setup.batch(pad=pad)
    labels = labels_of(batch)
    with recorded() as choices, vtr.reduced(setup.model, plan):
        output = setup.model(**batch.inputs, labels=labels, position_ids=batch.positions)
    expected = expected_of(batch, choices)
    expected.freeze = (1, 3) if isinstance(plan[-1], Freeze) else ()
    keep = expected.drops[-1][1]
    logits = reference.masked_logits(setup.model, batch, expected)
    rows = [(logits[row, keep[row]], labels[row, keep[row]]) for row in range(len(keep))]
    shifted = torch.cat([row[:-1] for row, _ in rows]), torch.cat([target[1:] for _, target in rows])
    assert float(output.loss) == pytest.approx(float(cross_entropy(shifted[0].float(), shifted[1], ignore_index=-100)), abs=1e-5)


@torch.no_grad()
def test_labels_without_a_removal_change_nothing():
    model, batch = model_of("llava"), batch_of("llava")
    full = model(**batch.inputs, labels=labels_of(batch)).loss
    with vtr.reduced(model, "random", keep=36):
        assert torch.equal(model(**batch.inputs, labels=labels_of(batch)).loss, full)


def test_labels_are_not_modified():
    model, batch = model_of("llava"), batch_of("llava")
    labels = labels_of(batch)
    before = labels.clone()
    with torch.no_grad(), vtr.reduced(model, PLANS["ragged"]):
        model(**batch.inputs, labels=labels)
    assert torch.equal(labels, before)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_gradients_flow_through_a_reduced_model(kind, plan):
    model, batch = build(kind).requires_grad_(True), batch_of(kind)
    with vtr.reduced(model, plan):
        model(**batch.inputs, labels=labels_of(batch)).loss.backward()
    base = model.model
    weights = {
        "LLM": base.language_model.layers[4].mlp.up_proj.weight,
        "projector": base.multi_modal_projector.linear_1.weight,
        "tower": base.vision_tower.encoder.layers[0].mlp.fc1.weight,
    }
    for name, weight in weights.items():
        assert weight.grad is not None and bool(weight.grad.isfinite().all()) and float(weight.grad.abs().sum()) > 0, name


def test_gradient_checkpointing_is_refused():
    model, batch = build("llava").requires_grad_(True).train(), batch_of("llava")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # renamed after 5.17
    enable()
    with vtr.reduced(model, PLANS["ragged"]), pytest.raises(vtr.VtrError, match=r"gradient checkpointing .*switch it off"):
        model(**batch.inputs, labels=labels_of(batch), use_cache=False)
