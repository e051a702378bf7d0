import pytest
import torch

import vtr
from tests.methods.handmade import IMAGES, LLAVA, chosen, make_view, select_without_sync
from tests.tiny_models import ROWS, batch_of, model_of
from vtr.methods.pyramiddrop import PyramidDrop
from vtr.types import Budget, PerToken

DEEP = LLAVA.__class__(**{**vars(LLAVA), "llm_layers": 32, "most_tokens": 576})


def projected(view, heads):
    """Queries or keys that depend on the token only."""
    weight = torch.randn(view.tokens.shape[-1], heads * 3, generator=torch.Generator().manual_seed(heads))
    return PerToken(*((t @ weight / 6).unflatten(-1, (heads, 3)) for t in (view.tokens, view.text.tokens)))


def with_signals(view, step):
    view.signals = dict(zip(step.needs, (projected(view, 4), projected(view, 2))))
    return view


def slow(view, g):
    """Softmax of the last token over its own prompt, head by head, in float64."""
    query, key = (projected(view, heads) for heads in (4, 2))
    last = query.text[g][view.text.real[g]][-1].double()
    mates = [i for i in range(len(view.row)) if view.row[i] == view.row[g]]
    keys = torch.cat([key.text[g][view.text.real[g]], *(key.visual[i][view.real[i]] for i in mates)]).double()
    logits = torch.stack([keys[:, h // 2] @ last[h] * 3**-0.5 for h in range(4)])
    own = key.text[g][view.text.real[g]].shape[0] + sum(int(view.real[i].sum()) for i in mates[: mates.index(g)])
    score = logits.softmax(-1).mean(0)[own : own + int(view.real[g].sum())]
    return sorted(score.argsort(descending=True, stable=True)[: int(view.keep[g])].tolist())


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 1, 1, 0]])
@pytest.mark.parametrize("keep", [1, 9, [35, 36, 60, 2]])
def test_the_best_attended_stay_for_every_image_of_a_ragged_batch(keep, rows):
    view = make_view(IMAGES, keep, filler=3, rows=rows, text=[4 + r for r in rows])
    for g, r in enumerate(rows):  # images of one prompt see the same text
        first = rows.index(r)
        view.text.tokens[g] = view.text.tokens[first]
    step = PyramidDrop().steps(LLAVA)[0]
    kept = chosen(view, step.select(with_signals(view, step)).keep)
    assert [k.tolist() for k in kept] == [slow(view, g) for g in range(4)]


def test_a_prompt_without_text_asks_with_its_last_visual_token():
    view = make_view(IMAGES, 9)
    step = PyramidDrop().steps(LLAVA)[0]
    with_signals(view, step)
    view.text.real[1] = False
    found = step.select(view).keep
    query, key = (s.visual[1, view.real[1]].double() for s in view.signals.values())
    logits = torch.stack([key[:, h // 2] @ query[-1, h] * 3**-0.5 for h in range(4)])
    best = logits.softmax(-1).mean(0).topk(9).indices
    assert chosen(view, found)[1].tolist() == sorted(best.tolist())


def test_selections_never_wait_for_the_device():
    view = make_view(IMAGES, 9)
    for step in PyramidDrop().steps(LLAVA):
        select_without_sync(step, with_signals(view, step))


def test_the_published_schedule_is_the_default():
    steps = PyramidDrop().steps(DEEP)
    assert PyramidDrop().budget == Budget(keep_ratio=0.125)
    assert [(s.layer, 72 + round(s.share * (576 - 72))) for s in steps] == [(8, 288), (16, 144), (24, 72)]
    assert {n.kind for n in steps[0].needs} == {"next_q", "next_k"}


def test_counts_are_a_budget_of_their_own():
    method = PyramidDrop(counts=[300, 200, 110], layers=[3, 7, 16])
    assert method.budget == Budget(keep=110)
    assert [(s.layer, 110 + round(s.share * (576 - 110))) for s in method.steps(DEEP)] == [(3, 300), (7, 200), (16, 110)]
    with pytest.raises(ValueError, match="is a budget already; leave keep, keep_ratio and average_keep out"):
        PyramidDrop(counts=[3, 2, 1], keep=1)
    with pytest.raises(ValueError, match="3 keep counts in descending order"):
        PyramidDrop(counts=[3, 2])
    with pytest.raises(ValueError, match="layers must name 3 layers"):
        PyramidDrop(layers=[3, 8])


@pytest.mark.parametrize(
    ("average", "layers"), [(270, (8, 16, 24)), (576, (8, 16, 24)), (192, (4, 8, 16)), (128, (3, 6, 9)), (64, (2, 3, 4)), (5, (2, 3, 4))]
)
def test_averages_below_reach_get_earlier_layers_of_ours(average, layers):
    assert tuple(step.layer for step in PyramidDrop(average_keep=average).steps(DEEP)) == layers


def test_a_shallow_llm_is_refused():
    shallow = LLAVA.__class__(**{**vars(LLAVA), "llm_layers": 3})
    with pytest.raises(ValueError, match="pyramiddrop: a schedule of 3 removals needs an LLM of at least 4 layers, this one has 3"):
        PyramidDrop().steps(shallow)


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
def test_in_a_model_the_score_is_that_layers_own_attention(row):
    """The attention of the first dropping layer in the full model, as an eager forward returns it."""
    model = model_of("llava", "eager", torch.float64)
    batch = batch_of("llava", ROWS, dtype=torch.float64).row(row)
    attention = model(**batch.inputs, output_attentions=True).attentions
    with vtr.reduced(model, PyramidDrop(counts=(9, 9, 9), layers=(2, 3, 4))) as reduction:  # everything goes at the first drop
        model(**batch.inputs)
    seen = attention[2][0, :, -1].mean(0)
    columns = batch.visual[0].nonzero()[:, 0].split(36)
    for own, image in zip(columns, reduction.report().to_dict()["images"], strict=True):
        assert image["per_layer"] == [36, 36, 9, 9, 9]
        assert image["retained"] == sorted(seen[own].topk(9).indices.tolist())
