from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vtr
from scripts.replay import read_vector
from scripts.replay.dart import authors_order, authors_quota
from tests.caches import output_cache
from tests.methods.handmade import IMAGES, LLAVA, ONE, chosen, images_of, make_view, retained, select_without_sync
from tests.tiny_models import batch_of, model_of
from vtr.methods.dart import DART, dart, exact_quota, l1_norm, strongest
from vtr.types import PerToken, Signal

VECTORS = sorted((Path(__file__).parents[1] / "vectors").glob("dart-*"))


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_the_authors_quota_is_that_of_their_vectors(path):
    params = read_vector(path).params
    keep = params["retain_token_num_for_llava_next" if params["variant"] == "llava_next" else "max_num_trunction"]
    pivots = params["pivot_image"] + params["pivot_text"]
    got = authors_quota(params["variant"], params["image_length"], pivots, keep, params["reduction_ratio"])
    assert got == params["tokens_per_pivot"]


def keys_of(view):
    """Keys (2 heads of 3) that depend on the token only."""
    random = torch.Generator().manual_seed(9)
    weight = torch.randn(view.tokens.shape[-1], 6, generator=random)
    return PerToken(*((t @ weight).unflatten(-1, (2, 3)) for t in (view.tokens, view.text.tokens)))


def pruned(view, method):
    (step,) = method.steps(LLAVA)
    view.signals = {need: keys_of(view) for need in step.needs}
    return step.select(view).keep


def slow(view, g, method):
    """The algorithm for one image of a View."""
    real, words = view.real[g], view.text.instruction[g]
    visual, text = view.tokens[g][real], view.text.tokens[g][words]
    if method.stage == "prefill":
        keys = keys_of(view)
        strength, said = keys.visual[g][real].flatten(1).abs().sum(1), keys.text[g][words].flatten(1).abs().sum(1)
        visual, text = view.final_norm(visual), view.final_norm(text)
    else:
        strength, said = visual.abs().sum(1), text.abs().sum(1)
    return definition(visual, text, strength, said, int(view.keep[g]), method)


def definition(visual, text, strength, said, keep, method):
    """The algorithm for one image in float64 and Python lists: visual tokens and instruction behind the norm, and their strengths."""
    first = sorted(strength.argsort(descending=True, stable=True)[: min(method.pivots_image, keep)].tolist())
    second = sorted(said.argsort(descending=True, stable=True)[: method.pivots_text].tolist())
    kept, pivots = list(first), [visual[i] for i in first] + [text[i] for i in second]
    budget = keep - len(first)
    for number, pivot in enumerate(pivots):
        wanted = budget // len(pivots) + (number < budget % len(pivots))
        free = [i for i in range(len(visual)) if i not in kept]
        cosine = {i: F.cosine_similarity(pivot.double(), visual[i].double(), dim=0).item() for i in free}
        kept += sorted(free, key=lambda i: (cosine[i], i))[:wanted]
    assert len(kept) == keep
    return sorted(kept)


@pytest.mark.parametrize("stage", ["prefill", "boundary"])
@pytest.mark.parametrize("keep", [1, 3, 13, [35, 36, 60, 2]])
def test_select_is_the_algorithm_for_every_image_of_a_ragged_batch(stage, keep):
    method = DART(stage=stage)
    view = make_view(IMAGES, keep, filler=3, text=[3, 9, 1, 6])  # fewer than 4 text tokens, and none at all
    kept = pruned(view, method)
    assert torch.equal(kept.sum(1), view.keep)
    for g, got in enumerate(chosen(view, kept)):
        assert got.tolist() == slow(view, g, method)


@pytest.mark.parametrize(("image", "text"), [(1, 1), (10, 5), (0, 4), (4, 0), (40, 40)])
def test_other_pivot_counts(image, text):
    method = DART(pivots_image=image, pivots_text=text)
    view = make_view(IMAGES, 20, text=[6, 7, 8, 9])
    kept = pruned(view, method)
    assert torch.equal(kept.sum(1), view.keep)
    for g, got in enumerate(chosen(view, kept)):
        assert got.tolist() == slow(view, g, method)


def test_without_any_text_there_is_still_an_image_pivot():
    view = make_view([ONE], 5, text=[1])
    assert pruned(view, DART(pivots_image=0)).sum() == 5


def test_batch_and_padding_change_nothing():
    together = make_view(IMAGES, 12, text=[5, 8, 3, 6])
    kept = chosen(together, pruned(together, DART()))
    for image, words, expected in zip(IMAGES, [5, 8, 3, 6], kept):
        alone = make_view([image], 12, filler=5, text=[words])
        assert torch.equal(chosen(alone, pruned(alone, DART()))[0], expected)


def test_permuted_tokens_are_taken_alike():
    random = torch.Generator().manual_seed(1)
    tokens, pivots = torch.randn(2, 25, 6, generator=random), torch.randn(2, 5, 6, generator=random)
    free = torch.rand(2, 25, generator=random) < 0.8
    quota = torch.tensor([[3, 2, 2, 2, 2], [1, 0, 4, 0, 1]])
    order = torch.randperm(25, generator=random)
    taken = dart(tokens, free, pivots, quota)
    assert torch.equal(dart(tokens[:, order], free[:, order], pivots, quota), taken[:, order])
    assert taken.sum(1).tolist() == [11, 6] and not (taken & ~free).any()


def test_more_than_there_is_takes_everything():
    free = torch.tensor([[True, False, True, True]])
    assert torch.equal(dart(torch.randn(1, 4, 3), free, torch.randn(1, 2, 3), torch.tensor([[2, 5]])), free)


def test_identical_and_zero_tokens_tie_to_the_lowest_index():
    for tokens in (torch.ones(1, 6, 4), torch.zeros(1, 6, 4)):
        taken = dart(tokens, torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 2, 4), torch.tensor([[2, 1]]))
        assert taken.tolist() == [[True, True, True, False, False, False]]


def test_quota_is_exact_and_favours_the_first_pivots():
    real = torch.tensor([[True, True, False, True], [True, True, True, True], [False, False, False, True]])
    got = exact_quota(torch.tensor([8, 2, 5]), real)
    assert got.tolist() == [[3, 3, 0, 2], [1, 1, 0, 0], [0, 0, 0, 5]]


def test_authors_order_is_that_of_a_python_set():
    positions = torch.tensor([[482, 174, 468, 557, 632, 621, 618, 615]])
    assert positions[0][authors_order(positions)[0]].tolist() == [482, 615, 618, 557, 174, 621, 468, 632]


@pytest.mark.parametrize(
    ("variant", "length", "keep", "ratio", "quota"),
    [
        ("llava", 576, 192, 0.667, 24),
        ("llava", 576, 64, 0.889, 8),
        ("llava", 576, None, 0.778, 15),
        ("llava_next", 2000, 640, None, 80),
        ("llava_next", 300, 640, None, 37),
        ("qwen", 391, None, 0.778, 10),
    ],
)
def test_authors_quota(variant, length, keep, ratio, quota):
    assert authors_quota(variant, length, 8, keep, ratio) == quota


def test_strongest_is_by_l1_norm_in_ascending_position():
    states = torch.tensor([[[1.0, -1.0], [0.5, 0.5], [-3.0, 0.0], [1.0, 1.0], [9.0, 9.0]]])
    index, real = strongest(l1_norm(states), torch.tensor([[True, True, True, True, False]]), torch.tensor([2]), 4)
    assert index[real].tolist() == [0, 2]


@pytest.mark.parametrize("kind", ["llava", "llava_siglip", "llava_next"])
@torch.no_grad()
def test_on_a_model_it_is_the_algorithm_on_its_cache_and_hidden_states(kind):
    model, batch = model_of(kind, dtype=torch.float64), batch_of(kind, dtype=torch.float64)
    full = model(**batch.inputs, use_cache=True, output_hidden_states=True, position_ids=batch.positions)
    hidden, keys = model.model.language_model.norm(full.hidden_states[2]), output_cache(full).layers[1].keys
    strength = keys.transpose(1, 2).flatten(2).abs().sum(-1)
    expected = []
    for seen in images_of(batch):
        text = (batch.valid & ~batch.visual)[seen.row].nonzero()[:, 0]
        text = text[text > int(batch.visual[seen.row].long().argmax())]
        row, own = seen.row, seen.positions
        kept = definition(hidden[row, own], hidden[row, text], strength[row, own], strength[row, text], 9, DART())
        expected.append(sorted(seen.patch[kept].tolist()))
    assert retained(batch, DART(keep=9)) == expected


def test_it_reads_the_keys_of_the_layer_before():
    (step,) = DART(layer=3).steps(LLAVA)
    assert (step.stage, step.layer, step.needs) == ("prefill", 3, (Signal("k", layer=2),))
    (step,) = DART(stage="boundary").steps(LLAVA)
    assert (step.stage, step.needs) == ("boundary", ())


@pytest.mark.parametrize("stage", ["prefill", "boundary"])
def test_selections_never_wait_for_the_device(stage):
    view = make_view(IMAGES, 9)
    (step,) = DART(stage=stage).steps(LLAVA)
    view.signals = {need: keys_of(view) for need in step.needs}
    select_without_sync(step, view)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="stage must be 'prefill' or 'boundary', got 'tower'"):
        DART(stage="tower")
    with pytest.raises(ValueError, match="use stage='boundary'"):
        DART(layer=0)
    with pytest.raises(ValueError, match="at least one pivot"):
        DART(pivots_image=0, pivots_text=0)
    with pytest.raises(ValueError, match="layer=8 is not one of the LLM's layers 1 to 7"):
        DART(layer=8).steps(LLAVA)
    with pytest.raises(ValueError, match="compat must be None or 'authors'"):
        DART(compat="paper")
    with pytest.raises(vtr.VtrError, match="leave compat out"):
        DART(compat="authors").steps(LLAVA)
