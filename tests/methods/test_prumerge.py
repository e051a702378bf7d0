"""PruMerge against a brute force of the card and of the released code's loops, and on real towers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vtr
from scripts.replay.prumerge import authors_index, authors_tokens
from tests.methods.handmade import LLAVA, NEXT, chosen, select_without_sync
from tests.methods.towers import layers_of, projected, random_layer, tower_view
from tests.tiny_models import Shot, batch_of, model_of
from vtr.methods.prumerge import PruMerge
from vtr.methods.prumerge_plus import PruMergePlus
from vtr.types import Budget

SIZES = [36, 20, 1, 7]
BOTH = pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])


def fence_of(attention):
    first, third = np.percentile(attention.double().numpy(), [25, 75])
    return third + 1.5 * (third - first)


def slow_merge(tokens, keys, attention, kept, neighbours=32):
    """Steps 3 and 4 for one view: the tokens of `kept`, the place of the extra token, its value."""
    unit = F.normalize(keys, dim=-1)
    grown = []
    for i in kept:
        others = sorted((j for j in range(len(tokens)) if j != i), key=lambda j: (-float(unit[i] @ unit[j]), j))[:neighbours]
        grown.append(tokens[i] + sum(attention[j] * tokens[j] for j in others))
    rest = [j for j in range(len(tokens)) if j not in kept]
    place = max(rest, key=lambda j: (float(attention[j]), -j)) if rest else None
    return grown, place, sum((attention[j] * tokens[j] for j in rest), torch.zeros(tokens.shape[1]))


def check_row(layer, last, chosen_patches, answer, view, g, neighbours=32):
    """A row of a Selection against the loops: patches, values and assignment."""
    real = view.real[g]
    got = answer.keep[g, real].nonzero().flatten().tolist()
    grown, place, extra = slow_merge(layer.output[1:], last.key[1:], last.one_head(), chosen_patches, neighbours)
    values = dict(zip(chosen_patches, grown)) | ({place: extra} if place is not None else {})
    assert got == sorted(values)
    expected = torch.stack([values[i] for i in got])
    torch.testing.assert_close(answer.tokens[g, real][got], expected, atol=1e-4, rtol=1e-4)
    assigned = [i if i in chosen_patches else place for i in range(int(real.sum()))]
    assert answer.assign[g, real].tolist() == assigned and (answer.assign[g, ~real] == -1).all()


@pytest.mark.parametrize("neighbours", [0, 4, 32])
def test_every_budget_of_a_ragged_batch_is_the_card(neighbours):
    layers = [random_layer(n) for n in SIZES]
    for keep in range(1, 37):
        (step,) = PruMerge(keep=keep, neighbours=neighbours).steps(LLAVA)
        view = tower_view(step, layers, keep, pad=2)
        answer = step.select(view)
        assert answer.keep.sum(1).tolist() == [min(keep, n) for n in SIZES]
        for g, layer in enumerate(layers):
            if keep >= SIZES[g]:
                assert torch.equal(answer.tokens[g, view.real[g]], layer.output[1:]), "nothing to merge: as it is"
                continue
            best = layer.one_head().topk(keep - 1).indices.tolist()
            check_row(layer, layer, best, answer, view, g, neighbours)


@BOTH
def test_a_view_can_keep_nothing_one_or_all(cls):
    (step,) = cls(keep=1).steps(LLAVA)
    view = tower_view(step, [random_layer(n) for n in (9, 9, 9, 9)], [0, 1, 9, 8])
    answer = step.select(view)
    assert answer.keep.sum(1).tolist() == [0, 1, 9, 8] and (answer.assign[0] == -1).all()
    layer = random_layer(9)
    place = int(layer.one_head().argmax())
    assert answer.assign[1].tolist() == [place] * 9
    torch.testing.assert_close(answer.tokens[1, place], (layer.one_head()[:, None] * layer.output[1:]).sum(0), atol=1e-5, rtol=1e-4)
    assert torch.equal(answer.tokens[2], layer.output[1:])
    select_without_sync(step, view)


def test_adaptive_keeps_the_outliers_of_each_view():
    (step,) = PruMerge().steps(LLAVA)
    assert not step.counted and PruMerge().budget is None
    layers = [random_layer(n, seed) for seed in range(6) for n in SIZES]
    view = tower_view(step, layers, 36, pad=1)
    answer = step.select(view)
    counts = []
    for g, layer in enumerate(layers):
        attention = layer.one_head()
        best = [i for i in attention.argsort(descending=True).tolist() if attention[i] > fence_of(attention)]
        counts.append(len(best))
        check_row(layer, layer, best, answer, view, g)
    assert len(set(counts)) > 2 and 0 in counts
    select_without_sync(step, view)


def test_the_views_of_a_batch_do_not_touch_each_other():
    (step,) = PruMerge().steps(LLAVA)
    layers = [random_layer(n) for n in SIZES]
    together = tower_view(step, layers, 36, pad=3)
    kept = chosen(together, step.select(together).keep)
    for layer, expected in zip(layers, kept):
        alone = tower_view(step, [layer], 36)
        assert torch.equal(chosen(alone, step.select(alone).keep)[0], expected)


def authors_loops(tokens, keys, attention, index, neighbours):
    """What the released code computes for one image and an index in which entries may repeat."""
    n = len(tokens)
    masked = torch.arange(n).scatter(0, index, 0).sort().values
    rest = masked[len(index) :]
    out = []
    for i in range(len(index)):
        others = torch.cat([index[:i], index[i + 1 :], rest])
        near = (F.normalize(keys[others], dim=-1) @ F.normalize(keys[index[i]], dim=0)).topk(neighbours).indices
        out.append(tokens[index[i]] + (attention[others[near], None] * tokens[others[near]]).sum(0))
    return torch.stack([*out, (attention[rest, None] * tokens[rest]).sum(0)])


@pytest.mark.parametrize("grid", ["none", "adaptive", "fixed"])
def test_the_authors_tokens_are_those_of_their_loops(grid):
    random = torch.Generator().manual_seed(3)
    tokens, keys = torch.randn(2, 1, 576, 12, generator=random).unbind(0)
    attention = torch.rand(1, 576, generator=random).softmax(1)
    index = authors_index(attention, 1 / 8, grid)
    assert index.shape[1] == {"none": 72, "adaptive": len(set(index[0].tolist())), "fixed": 144}[grid]
    if grid == "fixed":
        assert len(set(index[0].tolist())) < 144, "no repetition to test"
    got = authors_tokens(tokens, keys, attention, index)
    torch.testing.assert_close(got[0], authors_loops(tokens[0], keys[0], attention[0], index[0], 32), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_on_a_model_the_projector_gets_the_tokens_of_the_card(kind):
    model, batch = model_of(kind), batch_of(kind, ((4, Shot(96, 96), 6),))  # no padding: all views get the same share
    reduction = vtr.apply(model, "prumerge", keep_ratio=0.25)
    feature = reduction.host.feature_layers[0]
    got, layers = projected(model, reduction, batch), layers_of(model, batch)
    retained = []
    for number, (view, last) in enumerate(zip(layers[feature], layers[-1])):
        best = last.one_head().topk(8).indices.tolist()
        grown, place, extra = slow_merge(view.output[1:], last.key[1:], last.one_head(), best)
        values = dict(zip(best, grown)) | {place: extra}
        torch.testing.assert_close(got[number], torch.stack([values[i] for i in sorted(values)]), atol=1e-4, rtol=1e-4)
        retained += [number * 36 + i for i in sorted(values)]
    image = reduction.report().to_dict()["images"][0]
    assert image["retained"] == retained and set(image["assignment"]) == set(retained)


@BOTH
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_adaptive_counts_follow_the_image_and_not_the_batch(cls, kind):
    model, batch = model_of(kind), batch_of(kind)
    with torch.no_grad(), vtr.reduced(model, cls()) as reduction:
        model(**batch.inputs)
        together = [image["retained"] for image in reduction.report().to_dict()["images"]]
        alone = []
        for row in range(2):
            model(**batch.row(row).inputs)
            alone += [image["retained"] for image in reduction.report().to_dict()["images"]]
    assert together == alone and len({len(ids) for ids in together}) > 1


@BOTH
@pytest.mark.parametrize("keep", [None, 9])
def test_compat_hands_tokens_over_by_falling_attention_with_the_extra_one_last(cls, keep):
    model, batch = model_of("llava"), batch_of("llava")
    default, authors = cls(keep=keep), cls(keep=keep, compat="authors")
    sequences = []
    for method in (default, authors):
        seen = []
        handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad(), vtr.reduced(model, method) as reduction:
            model(**batch.inputs)
            report = reduction.report()
        handle.remove()
        sequences.append((seen[-1], report))
    (ours, first), (theirs, second) = sequences
    assert [i["retained"] for i in first.to_dict()["images"]] == [i["retained"] for i in second.to_dict()["images"]]
    assert first.positions != second.positions, "another order"
    start = int(batch.visual[0].long().argmax())  # row 0 has one image
    attention = layers_of(model, batch)[-1][0].one_head()
    patches = [p - start for p in second.positions[0] if start <= p < start + 36]
    assert sorted(patches) == first.to_dict()["images"][0]["retained"]
    top = patches[:-1] if cls is PruMerge else patches[: round((len(patches) - 1) / 4)] if keep else patches[:1]
    assert top == sorted(top, key=lambda i: -float(attention[i])) == attention.topk(len(top)).indices.tolist()
    width = len(second.positions[0])
    by_patch = dict(zip(first.positions[0], ours[0, -width:]))
    moved = torch.stack([by_patch[p] for p in second.positions[0]])
    torch.testing.assert_close(theirs[0, -width:], moved, atol=1e-5, rtol=1e-5)


@BOTH
def test_settings_are_checked(cls):
    name = cls.name
    with pytest.raises(ValueError, match=f"{name}: neighbours must be an integer, 0 or more, got -1"):
        cls(neighbours=-1)
    with pytest.raises(ValueError, match=f"{name}: compat must be None or 'authors', got 'yes'"):
        cls(compat="yes")
    with pytest.raises(vtr.VtrError, match=f"{name}: compat='authors' knows images of one view only, 'llava_next' has crops"):
        cls(compat="authors").steps(NEXT)
    assert cls(keep_ratio=0.5).budget == Budget(keep_ratio=0.5) and cls.identity(36).budget == Budget(keep=36)
    assert {need.layer for need in cls().steps(LLAVA)[0].needs} == {LLAVA.tower_layers - 1}
