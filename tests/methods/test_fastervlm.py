"""FasterVLM: the ranking, and on real towers."""

import pytest
import torch

import vtr
from tests.methods.handmade import LLAVA, SIGLIP, chosen, select_without_sync
from tests.methods.towers import layers_of, random_layer, tower_view
from tests.tiny_models import Shot, batch_of, model_of
from vtr.methods.fastervlm import FasterVLM, fastervlm_score
from vtr.ops.topk import topk_mask
from vtr.types import Budget, Signal

SIZES = [36, 20, 1, 7]


def test_the_best_attended_stay_in_every_row():
    (step,) = FasterVLM().steps(LLAVA)
    for keep in range(1, 37):
        view = tower_view(step, [random_layer(n) for n in SIZES], keep, pad=3)
        kept = step.select(view).keep
        assert kept.sum(1).tolist() == [min(keep, n) for n in SIZES]
        for g, got in enumerate(chosen(view, kept)):
            row = random_layer(SIZES[g]).signal(step.needs[0])
            assert got.tolist() == sorted(row.topk(min(keep, SIZES[g])).indices.tolist())


def test_scores_are_the_mean_over_heads_in_float32_and_ties_go_to_the_first():
    rows = torch.tensor([[[0.1, 0.5, 0.3, 0.3], [0.5, 0.1, 0.3, 0.3]]], dtype=torch.float16)
    assert fastervlm_score(rows).dtype == torch.float32
    assert topk_mask(torch.full((1, 5), 0.2), torch.ones(1, 5, dtype=torch.bool), torch.tensor([2])).tolist() == [
        [True, True, False, False, False]
    ]


def test_a_view_can_keep_nothing():
    (step,) = FasterVLM().steps(LLAVA)
    view = tower_view(step, [random_layer(n) for n in SIZES], [3, 0, 1, 0])
    assert step.select(view).keep.sum(1).tolist() == [3, 0, 1, 0]
    select_without_sync(step, view)


def test_it_reads_the_feature_layer_before_the_projector():
    (step,) = FasterVLM().steps(LLAVA)
    assert step.needs == (Signal("cls_row", layer=LLAVA.feature_layer, tower=True),)
    assert (step.side, step.per) == ("before_projector", "view")
    assert FasterVLM().budget == Budget(keep_ratio=0.25) and FasterVLM.published_positions == "renumber"
    assert FasterVLM().steps(SIGLIP)[0].needs[0].kind == "cls_row", "refused by the plan, since there is no CLS"


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_on_a_model_every_view_keeps_its_best(kind):
    model, batch = model_of(kind), batch_of(kind, ((4, Shot(96, 96), 6),))  # no padding: all views get the same share
    with torch.no_grad(), vtr.reduced(model, "fastervlm", keep_ratio=0.25) as reduction:
        model(**batch.inputs)
        (image,) = reduction.report().to_dict()["images"]
    layer = reduction.host.feature_layers[0]
    expected = []
    for number, view in enumerate(layers_of(model, batch)[layer]):
        best = view.signal(Signal("cls_row")).topk(9).indices
        expected += sorted((number * 36 + best).tolist())
    assert image["retained"] == expected
