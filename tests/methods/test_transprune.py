from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.methods.handmade import IMAGES, LLAVA, chosen, make_view, select_without_sync
from tests.tiny_models import ROWS, batch_of, model_of
from vtr.methods.transprune import TTV, TransPrune, transition_weight, transprune_score
from vtr.types import PerToken

DEEP = replace(LLAVA, llm_layers=32, most_tokens=576)


@pytest.mark.parametrize("absolute", [False, True])
def test_weights_are_those_of_the_definition_over_the_own_prompt(absolute):
    random = torch.Generator().manual_seed(0)
    visual, text = torch.randn(2, 3, 5, 4, generator=random), torch.randn(2, 3, 3, 4, generator=random)
    text[:, 1] = text[:, 0]  # groups 0 and 1 are images of one prompt
    real, text_real = torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)
    real[1, :2], text_real[2, 2] = False, False
    weight, said = transition_weight(
        PerToken(visual[0], text[0]), PerToken(visual[1], text[1]), real, text_real, torch.tensor([3, 3, 8]), absolute
    )
    for mates in ([0, 1], [2]):
        inside = torch.cat([text[0, mates[0], text_real[mates[0]]], *(visual[0, g, real[g]] for g in mates)]).double()
        outside = torch.cat([text[1, mates[0], text_real[mates[0]]], *(visual[1, g, real[g]] for g in mates)]).double()
        cosine = F.cosine_similarity(inside, outside)
        expected = outside.norm(dim=1) / inside.norm(dim=1) * (1 - (cosine.abs() if absolute else cosine)).softmax(0)
        got = torch.cat([said[mates[0], text_real[mates[0]]], *(weight[g, real[g]] for g in mates)])
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


def test_scores_add_shares_of_the_image():
    random = torch.Generator().manual_seed(1)
    ttv, rows = torch.rand(1, 6, generator=random), torch.rand(1, 4, 6, generator=random)
    by, real = torch.tensor([[False, True, True, False]]), torch.tensor([[True] * 5 + [False]])
    score = transprune_score(ttv, rows, by, real)
    first, second = ttv[0, :5] / ttv[0, :5].sum(), rows[0, 1:3, :5].mean(0) / rows[0, 1:3, :5].mean(0).sum()
    torch.testing.assert_close(score.total[0, :5], first + second)
    torch.testing.assert_close(score.iga[0, :5], second)


def signals(view, step):
    def states(width, seed):
        weight = torch.randn(view.tokens.shape[-1], width, generator=torch.Generator().manual_seed(seed)) / 6
        return PerToken(*(t @ weight for t in (view.tokens, view.text.tokens)))

    found = {}
    for need in step.needs:
        if need.kind in ("attention_io", "mlp_io"):
            found[need] = (states(8, need.layer), states(8, 9 + need.layer))
        elif need.kind == "rows":
            found[need] = torch.zeros(*view.text.real.shape, view.real.shape[1])
            found[need][:, 0] = -torch.inf  # system text
        else:
            found[need] = PerToken(*(s.unflatten(-1, (-1, 3)) for s in states(*((12, 1) if need.kind == "next_q" else (6, 2)))))
    view.signals = found
    return view


def run_to_first_drop(view, method):
    for step in method.steps(LLAVA):
        answer = step.select(signals(view, step))
        if answer is not None:
            return chosen(view, answer.keep)
    raise AssertionError


def test_batch_and_padding_change_nothing():
    together = run_to_first_drop(make_view(IMAGES, 12), TransPrune())
    assert [len(k) for k in together] == [12] * 4
    for image, expected in zip(IMAGES, together, strict=True):
        assert torch.equal(run_to_first_drop(make_view([image], 12, filler=4), TransPrune())[0], expected)


def test_selections_never_wait_for_the_device():
    view = make_view(IMAGES, 9)
    observe, drop, *_ = TransPrune().steps(LLAVA)
    select_without_sync(observe, signals(view, observe))
    signals(view, drop)
    select_without_sync(replace(drop, select=lambda v: drop.select(replace(v, per_token={TTV: v.sizes}))), view)


def test_the_published_schedule_and_its_six_layers_of_transitions():
    steps = TransPrune().steps(DEEP)
    drops = [s for s in steps if s.action == "remove"]
    assert [(s.layer, 72 + round(s.share * 504)) for s in drops] == [(7, 504), (9, 360), (12, 72)]
    seen = [need.layer for s in steps if s.action == "observe" for need in s.needs]
    assert seen == [layer for layer in range(6, 12) for _ in range(2)], "the paper's layers 7 to 12"
    counted = TransPrune(counts=(300, 200, 100), layers=(3, 4, 5))
    assert [100 + round(s.share * 476) for s in counted.steps(DEEP) if s.action == "remove"] == [300, 200, 100]
    assert counted.budget == vtr.Budget(keep=100)
    with pytest.raises(ValueError, match="is a budget already"):
        TransPrune(counts=(3, 2, 1), keep=1)
    with pytest.raises(ValueError, match="transprune: a schedule of 3 removals needs an LLM of at least 4 layers"):
        TransPrune().steps(replace(LLAVA, llm_layers=2))


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
def test_in_a_model_the_first_drop_is_the_definition(row):
    """Transitions from hooks of our own, attention of the dropping layer as an eager forward of the full model returns it."""
    model = model_of("llava", "eager", torch.float64)
    batch = batch_of("llava", ROWS, dtype=torch.float64).row(row)
    seen, layer = {}, model.model.language_model.layers[1]

    def keep(name):
        def hook(_module, args, kwargs, output):
            seen[name] = (
                (args[0] if args else kwargs["hidden_states"])[0],
                (output[0] if isinstance(output, tuple) else output).view(-1, 64),
            )

        return hook

    handles = [getattr(layer, name).register_forward_hook(keep(name), with_kwargs=True) for name in ("self_attn", "mlp")]
    attention = model(**batch.inputs, output_attentions=True).attentions[2][0].mean(0)
    for handle in handles:
        handle.remove()
    ttv = 0
    for entered, left in seen.values():
        turn = 1 - F.cosine_similarity(entered, left)
        ttv = ttv + left.norm(dim=1) / entered.norm(dim=1) * turn.softmax(0)
    with vtr.reduced(model, TransPrune(counts=(9, 9, 9), layers=(2, 3, 4))) as reduction:
        model(**batch.inputs)
    visual = batch.visual[0]
    place = torch.arange(len(visual))
    for own, image in zip(visual.nonzero()[:, 0].split(36), reduction.report().to_dict()["images"], strict=True):
        behind = ~visual & (place > own[-1])
        iga = attention[behind][:, own].mean(0)
        score = ttv[own] / ttv[own].sum() + iga / iga.sum()
        assert image["per_layer"] == [36, 36, 9, 9, 9]
        assert image["retained"] == sorted(score.topk(9).indices.tolist())
