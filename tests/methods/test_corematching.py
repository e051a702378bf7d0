from dataclasses import replace

import numpy as np
import pytest
import torch

import vtr
import vtr.methods.corematching as module
from scripts.replay.corematching import released_counts, zeroed
from tests.methods.handmade import IMAGES, LLAVA, chosen, make_view, select_without_sync
from tests.tiny_models import batch_of, model_of
from vtr.methods.corematching import CoreMatching, core_bound, core_neurons, core_votes, shared_neurons
from vtr.ops.elbow import elbow
from vtr.types import PerToken


@pytest.mark.parametrize("chunk", [1 << 22, 50])
def test_cores_are_those_of_the_definition(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    activation = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    activation[0, 3] = -1.0  # no active neuron
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :4] = False
    votes = core_votes(activation, real)
    core = core_neurons(votes)
    for g in range(2):
        expected = np.zeros(16)
        for token in activation[g, real[g]].double().numpy():
            if (token > 0).any():
                expected += (token > 0) & (token >= np.quantile(token[token > 0], 0.8))
        assert votes[g].tolist() == expected.tolist()
        assert core[g].tolist() == (expected >= np.quantile(expected, 0.6)).tolist()
        shared = shared_neurons(activation, core)[g]
        assert shared.tolist() == [int(((a > 0) & core[g]).sum()) for a in activation[g]]


@pytest.mark.parametrize("rho", [0.05, 0.2, 0.5, 1.0])
def test_the_bound_is_the_quantile_of_the_positive_values(rho):
    random = torch.Generator().manual_seed(1)
    for width in (1, 2, 3, 11, 40):
        rows = torch.randn(60, width, generator=random)
        rows[:10], rows[10:20] = rows[:10].abs(), -rows[10:20].abs()  # all positive, none positive
        for row, bound in zip(rows.double().numpy(), core_bound(rows, rho).tolist(), strict=True):
            expected = np.quantile(row[row > 0], 1 - rho) if (row > 0).any() else np.inf
            assert bound == pytest.approx(expected, rel=1e-12)


def activation_of(view):
    weight = torch.randn(view.tokens.shape[-1], 24, generator=torch.Generator().manual_seed(3))
    return PerToken(*(t @ weight for t in (view.tokens, view.text.tokens)))


def pruned(view, method):
    (step,) = method.steps(LLAVA)
    view.signals = {need: activation_of(view) for need in step.needs}
    return step.select(view).keep


@pytest.mark.parametrize("method", [CoreMatching(), CoreMatching(keep=12)], ids=["adaptive", "budget"])
def test_batch_and_padding_change_nothing(method):
    together = make_view(IMAGES, 12)
    kept = chosen(together, pruned(together, method))
    for image, expected in zip(IMAGES, kept, strict=True):
        alone = make_view([image], 12, filler=5)
        assert torch.equal(chosen(alone, pruned(alone, method))[0], expected)
        assert len(expected) == 12 if method.keep else len(expected) > 0


def test_images_of_one_prompt_vote_together():
    view = make_view([IMAGES[1], IMAGES[0]], 9, rows=[2, 2])
    view.text.tokens[1] = view.text.tokens[0]
    kept = pruned(view, CoreMatching())
    activation = activation_of(view)
    everything = torch.cat([activation.text[0, view.text.real[0]], *(activation.visual[g, view.real[g]] for g in range(2))])
    core = core_neurons(core_votes(everything[None], torch.ones(1, len(everything), dtype=torch.bool)))
    for g in range(2):
        shared = shared_neurons(activation.visual[g : g + 1], core)
        bound = elbow(shared, view.real[g : g + 1]).value
        assert torch.equal(kept[g], view.real[g] & (shared[0] >= bound))


@pytest.mark.parametrize("method", [CoreMatching(), CoreMatching(keep=9)], ids=["adaptive", "budget"])
def test_selections_never_wait_for_the_device(method):
    view = make_view(IMAGES, 9)
    (step,) = method.steps(LLAVA)
    view.signals = {need: activation_of(view) for need in step.needs}
    select_without_sync(step, view)


def test_released_functions():
    active = torch.rand(1, 12, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    assert released_counts(active)[0].tolist() == (active[0].double() @ active[0, -5].double()).tolist()
    states, gone = torch.ones(1, 2, 3, 4), torch.tensor([[False, True, False]])
    assert zeroed(states, gone)[0, :, :, 0].tolist() == [[1, 0, 1]] * 2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_in_a_model_every_image_keeps_at_least_one_token(kind):
    model, batch = model_of(kind), batch_of(kind)
    with vtr.reduced(model, "corematching") as reduction:
        model(**batch.inputs)
    for image in reduction.report().to_dict()["images"]:
        n = image["visual_tokens"]
        assert 1 <= len(image["retained"]) <= n and image["per_layer"][:2] == [n, n]
        assert image["per_layer"][2] == len(image["retained"])


def test_settings_are_checked():
    for layer, error in ((0, ValueError), ("2", TypeError)):
        with pytest.raises(error, match="corematching: layer must be"):
            CoreMatching(layer=layer)
    for name in ("rho", "beta"):
        with pytest.raises(ValueError, match=rf"{name} must be in \(0, 1\], got 0"):
            CoreMatching(**{name: 0})
    with pytest.raises(ValueError, match="compat must be None or 'authors'"):
        CoreMatching(compat="paper")
    with pytest.raises(vtr.VtrError, match="zeroes cached keys and values instead of removing tokens"):
        CoreMatching(compat="authors").steps(LLAVA)
    with pytest.raises(ValueError, match="layer 2 is out of range: this LLM has 2 layers; use 1 to 1"):
        CoreMatching().steps(replace(LLAVA, llm_layers=2))
