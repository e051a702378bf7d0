"""Arguments that count tokens follow the tokens that are left: labels for any forward, positions in `logits_to_keep`."""

import inspect

import pytest
import torch
from torch.nn.functional import cross_entropy

import vtr
from tests import tiny_models
from tests.probes import ByAttention, EveryNth, Freeze, Ragged, TowerTop
from tests.tiny_models import Shot, batch_of, model_of

pytestmark = pytest.mark.usefixtures("no_gradients")
FP64 = torch.float64
PLANS = ([EveryNth(stride=3)], [Ragged(), ByAttention(keep=5)], [TowerTop()], [EveryNth(), Freeze()])


def labels_of(batch):
    return torch.where(batch.valid & ~batch.visual, batch.inputs["input_ids"], -100)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_forward_that_was_replaced_finds_labels_as_long_as_its_logits(kind, plan):
    """As fused losses do: they read the labels themselves, behind the model's forward."""
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, dtype=FP64)
    labels = labels_of(batch)
    original = model.forward

    def fused(*args, labels=None, **kwargs):
        out = original(*args, **kwargs)
        return out, cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)

    with vtr.reduced(model, plan):
        expected = model(**batch.inputs, labels=labels).loss
        model.forward = fused
        try:
            found = model(**batch.inputs, labels=labels)[1]
        finally:
            del model.forward
    assert float(found) == pytest.approx(float(expected), abs=1e-5)
    assert labels.shape == batch.valid.shape, "the user's own tensor is not touched"


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@pytest.mark.parametrize("plan", PLANS)
def test_the_report_gathers_labels_for_loops_that_keep_them_back(kind, plan):
    """Label smoothing, metrics: labels that the model never sees, against its short logits."""
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, dtype=FP64)
    labels = labels_of(batch)
    with vtr.reduced(model, plan) as reduction:
        expected = model(**batch.inputs, labels=labels, position_ids=batch.positions).loss
        logits = model(**batch.inputs, position_ids=batch.positions).logits
    short = reduction.report().labels(labels)
    assert short.shape == logits.shape[:2]
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), short[:, 1:].flatten(), ignore_index=-100)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def test_num_items_in_batch_reaches_the_loss():
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", dtype=FP64)
    with vtr.reduced(model, PLANS[0]):
        mean = model(**batch.inputs, labels=labels_of(batch)).loss
        short = int((labels_of(batch)[:, 1:] != -100).sum())
        total = model(**batch.inputs, labels=labels_of(batch), num_items_in_batch=1).loss
    assert float(total) == pytest.approx(float(mean) * short, rel=0.2) and float(total) > 5 * float(mean)


@pytest.mark.parametrize("plan", PLANS)
def test_positions_of_logits_name_tokens_of_the_prompt(plan):
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", ((4, Shot(), 6),), dtype=FP64)
    wanted = torch.tensor([0, 2, 41, 45, -1])
    with vtr.reduced(model, plan) as reduction:
        full = model(**batch.inputs).logits
        found = model(**batch.inputs, logits_to_keep=wanted).logits
    place = [reduction.report().positions[0].index(p) for p in (0, 2, 41, 45, 45)]
    assert torch.equal(found, full[:, place]) or float((found - full[:, place]).abs().max()) < 1e-9
    assert wanted.tolist() == [0, 2, 41, 45, -1]


def test_positions_of_removed_tokens_are_refused():
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", ((4, Shot(), 6),), dtype=FP64)
    with vtr.reduced(model, [EveryNth(stride=3)]), pytest.raises(vtr.VtrError, match="logits_to_keep names tokens that were removed"):
        model(**batch.inputs, logits_to_keep=torch.tensor([5]))


def test_the_model_may_be_run_in_the_middle_of_a_call():
    """A hook of the user's that runs the model again, with another image or text alone: the outer call goes on as it was."""
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", dtype=FP64)
    other = batch_of("llava", ((5, Shot(), 3),), dtype=FP64, seed=9)
    places = [model.model.language_model.layers[1], model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model]
    busy = []

    def again(*_args):
        if not busy:
            busy.append(True)
            model(**other.inputs)
            model(input_ids=torch.tensor([[5, 6, 7]]))
            busy.clear()

    for plan in PLANS:
        with vtr.reduced(model, plan, history=True) as reduction:
            expected = model(**batch.inputs).logits
            retained = [image.retained for image in reduction.reports[-1].images]
            for place in places:
                handle = place.register_forward_hook(again)
                try:
                    assert torch.equal(model(**batch.inputs).logits, expected)
                finally:
                    handle.remove()
                assert retained in [[image.retained for image in report.images] for report in reduction.reports[-2:]]


def test_a_call_goes_on_after_an_exception_in_the_middle_of_another():
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", dtype=FP64)
    layer = model.model.language_model.layers[3]

    def fail(*_args):
        raise KeyError("mine")

    for plan in PLANS:
        with vtr.reduced(model, plan):
            expected = model(**batch.inputs).logits
            for place in (layer, model.model.language_model.norm, model.model.multi_modal_projector):
                handle = place.register_forward_pre_hook(fail)
                with pytest.raises(KeyError, match="mine"):
                    model(**batch.inputs)
                handle.remove()
                text = model.model.language_model(inputs_embeds=torch.zeros(1, 3, 64, dtype=FP64)).last_hidden_state
                assert text.shape[1] == 3
                assert torch.equal(model(**batch.inputs).logits, expected)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@pytest.mark.parametrize("plan", PLANS)
def test_labels_by_place_and_shifted_labels_give_the_same_loss(kind, plan):
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, dtype=FP64)
    labels = labels_of(batch)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    given = {**batch.inputs, "labels": labels}
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    places = [given.get(name) for name in names[: names.index("labels") + 1]]
    assert float(model(**given, shift_labels=shifted).loss) == pytest.approx(float(model(**given).loss), abs=1e-6)
    with vtr.reduced(model, plan):
        expected = float(model(**given).loss)
        assert float(model(*places).loss) == pytest.approx(expected, abs=1e-6)
        assert float(model(**given, shift_labels=shifted).loss) == pytest.approx(expected, abs=1e-6)
    assert shifted.shape == labels.shape == batch.valid.shape


@pytest.mark.parametrize("answered", [False, True])
def test_labels_are_those_of_their_own_call_when_the_model_runs_in_the_middle(answered):
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", dtype=FP64)
    other = batch_of("llava", ((5, Shot(), 3),), dtype=FP64, seed=9)
    inner = {**other.inputs, "labels": labels_of(other)} if answered else other.inputs
    busy = []

    def again(*_args):
        if not busy:
            busy.append(True)
            model(**inner)
            busy.clear()

    with vtr.reduced(model, [Ragged(), EveryNth(stage="prefill", layer=2)]):
        expected = float(model(**batch.inputs, labels=labels_of(batch)).loss)
        for place in (model.model.vision_tower, model.model.language_model.layers[1]):
            handle = place.register_forward_hook(again)
            try:
                assert float(model(**batch.inputs, labels=labels_of(batch)).loss) == pytest.approx(expected, abs=1e-9)
            finally:
                handle.remove()
