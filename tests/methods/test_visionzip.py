"""VisionZip against a brute force of the card, and on real towers."""

import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.methods.handmade import LLAVA, SIGLIP, chosen, select_without_sync
from tests.methods.towers import layers_of, projected, random_layer, tower_view
from tests.tiny_models import IMAGE, Shot, batch_of, model_of
from vtr.engine.selections import chosen_mask
from vtr.methods.visionzip import VisionZip, contextual_count, visionzip
from vtr.types import Budget, Signal

SIZES = [36, 20, 1, 7]


def slow(tokens, metric, score, keep, contextual, merge="add"):
    """The card for one view in plain Python: kept patches, their tokens, and the pivot of every patch."""
    order = sorted(range(len(tokens)), key=lambda i: (-float(score[i]), i))
    dominant = sorted(order[: keep - contextual])
    rest = [i for i in range(len(tokens)) if i not in dominant]
    step = max(1, len(rest) // contextual) if contextual else 1
    pivots = rest[::step][:contextual]
    unit = F.normalize(metric, dim=-1)
    into = {i: i for i in [*dominant, *pivots]}
    for i in rest:
        if i not in into and pivots:
            into[i] = max(pivots, key=lambda p: (float(unit[i] @ unit[p]), -p))
    values = {i: tokens[i] for i in dominant}
    for p in pivots:
        sources = [tokens[i] for i in rest if i not in pivots and into[i] == p]
        if merge == "mean":
            values[p] = torch.stack([tokens[p], *sources]).mean(0)
        else:
            values[p] = tokens[p] + (torch.stack(sources).mean(0) if sources else 0)
    kept = sorted(values)
    return kept, torch.stack([values[i] for i in kept]) if kept else tokens[:0], [into.get(i, -1) for i in range(len(tokens))]


@pytest.mark.parametrize("merge", ["add", "mean"])
@pytest.mark.parametrize("share", [10 / 64, 0.5, 0.0, 1.0])
def test_select_is_the_card_for_every_budget_of_a_ragged_batch(merge, share):
    (step,) = VisionZip(contextual=share, merge=merge).steps(LLAVA)
    keys, row = step.needs
    for keep in range(1, 37):
        layers = [random_layer(n) for n in SIZES]
        view = tower_view(step, layers, keep, pad=2)
        answer = step.select(view)
        kept = chosen_mask(answer, view)
        assert kept.sum(1).tolist() == [min(keep, n) for n in SIZES]
        for g, (got, layer) in enumerate(zip(chosen(view, kept), layers)):
            count = int(view.keep[g])
            metric = layer.signal(keys).mean(1)
            expected = slow(layer.output[1:], metric, layer.signal(row), count, round(count * share), merge)
            assert got.tolist() == expected[0]
            if answer.tokens is None:
                assert not any(round(k * share) for k in view.keeps), "no pivot, nothing merges"
                continue
            torch.testing.assert_close(answer.tokens[g, :count], expected[1], atol=1e-5, rtol=1e-5)
            assert answer.assign[g, view.real[g]].tolist() == expected[2]
            assert (answer.assign[g, ~view.real[g]] == -1).all()


def test_all_tokens_stay_as_they_are_at_the_largest_budget():
    (step,) = VisionZip().steps(LLAVA)
    view = tower_view(step, [random_layer(n) for n in SIZES], 36)
    answer = step.select(view)
    assert torch.equal(chosen_mask(answer, view), view.real)
    assert torch.equal(answer.tokens[answer.real], view.tokens[view.real])


def test_splits_are_those_of_the_paper():
    totals = torch.tensor([192, 128, 64, 128, 64, 32])  # LLaVA-1.5, then per crop of LLaVA-NeXT
    assert contextual_count(totals, 10 / 64).tolist() == [30, 20, 10, 20, 10, 5]
    assert contextual_count(torch.tensor([0, 1, 3, 4]), 10 / 64).tolist() == [0, 0, 0, 1]
    assert VisionZip().budget == Budget(keep_ratio=1 / 3) and VisionZip.published_positions == "renumber"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_made_in_float32_at_least(dtype):
    (step,) = VisionZip(contextual=0.5).steps(LLAVA)
    layer = random_layer(20)
    layer.output = layer.output.to(dtype).float()
    view = tower_view(step, [layer], 6)
    expected = step.select(view)
    view.tokens = view.tokens.to(dtype)
    answer = step.select(view)
    assert answer.tokens.dtype == dtype and torch.equal(answer.index, expected.index)
    torch.testing.assert_close(answer.tokens, expected.tokens.to(dtype))


def test_equal_keys_go_to_the_first_pivot():
    tokens, score, real = torch.eye(6)[None], torch.tensor([[9.0, 0, 0, 0, 0, 0]]), torch.ones(1, 6, dtype=torch.bool)
    index, tokens, assign = visionzip(tokens, torch.ones(1, 6, 2), score, real, torch.tensor([3]), torch.tensor([2]), 2)
    assert index[0, :3].tolist() == [0, 1, 3] and assign[0].tolist() == [0, 1, 1, 3, 1, 1]
    torch.testing.assert_close(tokens[0, 1], torch.tensor([0, 1, 1 / 3, 0, 1 / 3, 1 / 3]))


def test_without_cls_the_score_is_the_attention_received():
    (step,) = VisionZip(contextual=0.0).steps(SIGLIP)
    layers = [random_layer(n, cls=0) for n in SIZES]
    view = tower_view(step, layers, 5, pad=1)
    for got, layer, n in zip(chosen(view, chosen_mask(step.select(view), view)), layers, SIZES):
        assert got.tolist() == sorted(layer.received().topk(min(5, n)).indices.tolist())


@pytest.mark.parametrize("geometry", [LLAVA, SIGLIP])
def test_selections_never_wait_for_the_device(geometry):
    for method in (VisionZip(), VisionZip(merge="mean"), VisionZip(contextual=0)):
        (step,) = method.steps(geometry)
        view = tower_view(step, [random_layer(n, cls=int(geometry.has_cls)) for n in SIZES], [9, 0, 1, 3])
        select_without_sync(step, view)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_siglip"])
def test_on_a_model_the_projector_gets_the_tokens_of_the_card(kind):
    model, batch = model_of(kind), batch_of(kind, ((4, Shot(96, 96), 6),))  # no padding: all views get the same share
    reduction = vtr.apply(model, "visionzip", keep_ratio=0.5)
    layer = reduction.host.feature_layers[0]
    got = projected(model, reduction, batch)
    retained = []
    for number, view in enumerate(layers_of(model, batch)[layer]):
        score = view.signal(Signal("cls_row")) if view.cls else view.received()
        kept, values, _ = slow(view.output[view.cls :], view.signal(Signal("k")).mean(1), score, 18, 3)
        torch.testing.assert_close(got[number], values, atol=1e-4, rtol=1e-4)
        retained += [number * 36 + i for i in kept]
    assert reduction.report().to_dict()["images"][0]["retained"] == retained


def test_the_answer_is_that_of_a_prompt_made_of_the_kept_tokens():
    model, batch = model_of("llava"), batch_of("llava", ((4, Shot(), 6),))
    embed, project = model.get_input_embeddings(), model.model.multi_modal_projector
    view = layers_of(model, batch)[2][0]
    _, values, _ = slow(view.output[1:], view.signal(Signal("k")).mean(1), view.signal(Signal("cls_row")), 9, 1)
    ids = batch.inputs["input_ids"][0]
    text = ids != IMAGE
    start = int((~text).long().argmax())
    with torch.no_grad():
        whole = torch.cat([embed(ids[:start]), project(values), embed(ids[start:][text[start:]])])[None]
        expected = model(inputs_embeds=whole).logits
        with vtr.reduced(model, "visionzip", keep=9):
            logits = model(**batch.inputs).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="contextual must be from 0 to 1, got 10"):
        VisionZip(contextual=10)
    with pytest.raises(ValueError, match="merge must be 'add' or 'mean', got 'sum'"):
        VisionZip(merge="sum")
    with pytest.raises(ValueError, match="compat must be None or 'authors', got 'yes'"):
        VisionZip(compat="yes")
    with pytest.raises(vtr.VtrError, match="leave compat out to reduce a model"):
        VisionZip(compat="authors").steps(LLAVA)
