import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.methods.handmade import IMAGES, LLAVA, NEXT, ONE, SIGLIP, chosen, make_view, run, select_without_sync
from vtr.methods.flowcut import FlowCut, flow_score, flowcut, last_row, prune_amount, semantic_row, value_strength, view_targets
from vtr.replay import replay_file
from vtr.types import PerToken

VECTORS = sorted((Path(__file__).parents[1] / "vectors").glob("flowcut-*"))
HEADS, WIDTH, PATCHES = 3, 4, 500


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_vectors(path):
    result = replay_file(path)
    assert result.passed, result.reason


def table(kind, layer, image):
    """What a made-up tower layer holds for every patch of an image, before any softmax."""
    random = torch.Generator().manual_seed(hash((("logits", "v", "cls_v").index(kind), layer, *image)))
    shape = {"logits": (HEADS, PATCHES), "v": (PATCHES, HEADS, WIDTH), "cls_v": (40, HEADS, WIDTH)}[kind]
    return torch.randn(shape, generator=random) * (1 + image[1][0] % 7 if kind == "logits" else 1)


def signals(images):
    """Signals of the made-up tower: attention over CLS (logit 0) and the patches that are left in the view, as the host computes it."""

    def signal(need, view):
        if need.kind == "cls_v":
            views = max(rows * cols for rows, cols in view.crop_grids) + 1
            return torch.stack([table("cls_v", need.layer, image)[:views] for image in images])
        if need.kind == "v":
            return torch.stack([table("v", need.layer, image)[view.patch[g]] for g, image in enumerate(images)])
        rows = torch.full(view.real.shape, 0.5)  # padding must not count
        for g, image in enumerate(images):
            logits = table("logits", need.layer, image)[:, view.patch[g]]
            for v in view.cells[g, :, 0].unique():
                own = view.real[g] & (view.cells[g, :, 0] == v)
                rows[g, own] = F.pad(logits[:, own], (1, 0)).softmax(-1)[:, 1:].mean(0)
        return rows

    return signal


def slow(view, g, image, keep, feature, anyres, cls=True):
    """The tower part for one image in float64, view by view. Returns the patches left and their numbers behind every pruning layer."""
    patch, cell = view.patch[g][view.real[g]], view.cells[g, :, 0][view.real[g]]
    views = {int(v): patch[cell == v] for v in cell.unique()}
    many = anyres and len(views) > 1
    target = {v: min(len(p), max(keep // 2, 1) if many else keep) for v, p in views.items()}
    cumulative, log = {}, []
    for layer in range(feature):
        logits, values, cls_values = (table(k, layer, image).double() for k in ("logits", "v", "cls_v"))
        amounts = []
        for v, p in views.items():
            a = F.pad(logits[:, p], (1, 0)).softmax(-1)[:, 1:].mean(0)
            own = torch.cat([cls_values[v][None], values[p]])  # (1 + n, H, d)
            s = torch.einsum("hd,nhd->hn", cls_values[v], own).softmax(-1)[:, 1:].mean(0)
            strength = values[p].mean(1).abs().sum(-1)
            score = (a / a.sum() + s / s.sum()) * strength if cls else a * strength
            cumulative[v] = 0.5 * cumulative[v] + 0.5 * score if v in cumulative else score
            n, share = len(p), a / a.sum()
            if n > target[v] and feature - 1 - layer > 0:
                entropy = -(share * share.log()).sum().item()
                amounts.append((n - target[v]) / math.sqrt(feature - 1 - layer) * (1 - (entropy / math.log(n)) ** 2))
        remaining = feature - 1 - layer
        if remaining % 2:
            continue
        for v, p in views.items():
            n = target[v] if remaining == 0 else max(len(p) - round(max(amounts, default=0)), target[v])
            kept = cumulative[v].argsort(descending=True, stable=True)[: min(n, len(p))].sort().values
            views[v], cumulative[v] = p[kept], cumulative[v][kept]
        log.append(sum(map(len, views.values())))
    return torch.cat(list(views.values())).sort().values, log


@pytest.mark.parametrize(("geometry", "images"), [(LLAVA, [ONE, ((0, 0), (30, 48)), ((0, 0), (48, 20))]), (NEXT, IMAGES)])
@pytest.mark.parametrize("keep", [1, 10, 30, [20, 1, 36]])
@pytest.mark.parametrize("feature", [4, 5])
def test_the_tower_is_the_algorithm_for_every_image_of_a_ragged_batch(geometry, images, keep, feature):
    keep = keep if isinstance(keep, int) else [*keep, 8][: len(images)]
    view = make_view(images, keep, filler=3)
    geometry = replace(geometry, feature_layer=feature)
    method = FlowCut()
    behind = run(method, geometry, view, signals(images))
    for g, image in enumerate(images):
        expected, log = slow(view, g, image, int(view.keep[g]), feature, geometry is not LLAVA and geometry.most_tokens > 36)
        assert torch.equal(behind[-1].patch[g][behind[-1].real[g]].sort().values, expected)
        pruning = [after for step, after in zip(method.steps(geometry), behind) if step.action == "remove"]
        assert [int(after.real[g].sum()) for after in pruning] == log


def test_the_schedule_prunes_before_the_last_layer():
    view = make_view([ONE], 4)
    behind = run(FlowCut(), replace(LLAVA, feature_layer=5), view, signals([ONE]))
    counts = [int(after.real.sum()) for after in behind]
    assert counts[0] == 36 > counts[1] > 4 == counts[-1] and counts == sorted(counts, reverse=True)


def test_without_cls_it_reads_the_pooled_row_and_no_semantic_row():
    images = [ONE, ((0, 0), (30, 48))]
    view = make_view(images, [7, 30], filler=2)
    steps = FlowCut().steps(SIGLIP)
    assert {need.kind for step in steps for need in step.needs} == {"pooled_row", "v"}
    last = run(FlowCut(), SIGLIP, view, signals(images))[-1]
    for g, image in enumerate(images):
        expected, _ = slow(view, g, image, int(view.keep[g]), SIGLIP.feature_layer, False, cls=False)
        assert torch.equal(last.patch[g][last.real[g]], expected)


def test_batch_and_padding_change_nothing():
    together = run(FlowCut(), NEXT, make_view(IMAGES, 12), signals(IMAGES))[-1]
    for g, image in enumerate(IMAGES):
        alone = run(FlowCut(), NEXT, make_view([image], 12, filler=5), signals([image]))[-1]
        assert torch.equal(alone.patch[0][alone.real[0]], together.patch[g][together.real[g]])


def test_the_authors_share_prune_counts_over_the_batch():
    images = [ONE, ((0, 0), (30, 48)), ((0, 0), (48, 20))]
    geometry = replace(LLAVA, feature_layer=5)
    ours, theirs = (
        run(FlowCut(compat=compat), geometry, make_view(images, 4), signals(images))[1].real.sum(1).tolist() for compat in (None, "authors")
    )
    assert theirs == [min(ours)] * 3 and len(set(ours)) > 1


def test_keep_all_is_a_no_op_and_the_tower_can_finish_alone():
    view = make_view(IMAGES, 10**6)
    assert torch.equal(run(FlowCut(), NEXT, view, signals(IMAGES))[-1].real.sum(1), view.real.sum(1))
    for keep in (3, 50):
        view = make_view(IMAGES, keep)
        assert torch.equal(run(FlowCut(llm_layer=None), NEXT, view, signals(IMAGES))[-1].real.sum(1), view.keep)


def test_targets_of_views():
    available = torch.tensor([[36, 36, 36], [36, 2, 2], [36, 0, 0], [36, 36, 0]])
    assert view_targets(torch.tensor([20, 20, 20, 1]), available, False).tolist() == [[10, 10, 10], [16, 2, 2], [20, 0, 0], [1, 1, 0]]
    assert view_targets(torch.tensor([27, 20, 20, 1]), available, True).sum(1).tolist() == [27, 20, 20, 1]
    assert view_targets(torch.tensor([9]), torch.tensor([[4]]), False).tolist() == [[4]]


def test_prune_amount_by_hand_and_with_zero_attention():
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.0, 0.9], [0.2, 0.2, 0.2, 0.2, 0.0]])
    real = torch.tensor([[True, True, True, True, False], [True, True, True, True, True]])
    part, target = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[2], [1]])
    got = prune_amount(attention, part, real, target, 4)[:, 0]
    p = torch.tensor([1 / 6, 2 / 6, 3 / 6], dtype=torch.float64)
    first = 2 / 2 * (1 - ((-(p * p.log()).sum()) / math.log(4)) ** 2)
    second = 4 / 2 * (1 - (math.log(4) / math.log(5)) ** 2)
    torch.testing.assert_close(got.double(), torch.tensor([float(first), second], dtype=torch.float64), atol=1e-6, rtol=0)
    assert prune_amount(attention, part, real, torch.tensor([[4], [9]]), 4).tolist() == [[0], [0]]
    assert prune_amount(attention, part, real, target, 0).isinf().all()


def test_flowcut_rounds_half_to_even_and_stops_at_the_target():
    score, part, real = torch.arange(8.0)[None], torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.bool)
    for amount, left in ((2.5, 6), (3.5, 4), (7.0, 3), (torch.inf, 3), (0.2, 8)):
        kept = flowcut(score, torch.tensor([[amount]]), part, real, torch.tensor([[3]]))
        assert kept[0].nonzero().flatten().tolist() == list(range(8 - left, 8))


def test_views_of_an_image_share_the_largest_amount():
    part, real = torch.tensor([[0] * 6 + [1] * 6]), torch.ones(1, 12, dtype=torch.bool)
    kept = flowcut(torch.rand(1, 12), torch.tensor([[1.2, 3.0]]), part, real, torch.tensor([[2, 4]]))
    assert [int(kept[0, part[0] == v].sum()) for v in (0, 1)] == [3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_strength_against_float64(dtype):
    random = torch.Generator().manual_seed(0)
    values = torch.randn(2, 9, HEADS, WIDTH, generator=random).to(dtype)
    cls_values = torch.randn(2, 2, HEADS, WIDTH, generator=random).to(dtype)
    part = torch.tensor([[0] * 5 + [1] * 4, [0] * 9])
    real = torch.rand(2, 9, generator=random) < 0.8
    got, strength = semantic_row(values, cls_values, part, real), value_strength(values)
    assert got.dtype == strength.dtype == torch.float32
    for g in range(2):
        torch.testing.assert_close(strength[g].double(), values[g].double().mean(1).abs().sum(1), atol=1e-5, rtol=0)
        for v in (0, 1):
            own = real[g] & (part[g] == v)
            every = torch.cat([cls_values[g, v][None], values[g, own]]).double()
            expected = torch.einsum("hd,nhd->hn", cls_values[g, v].double(), every).softmax(-1)[:, 1:].mean(0)
            torch.testing.assert_close(got[g, own].double(), expected, atol=1e-5, rtol=0)
    assert (got[~real] == 0).all()


def test_last_row_with_grouped_queries():
    random = torch.Generator().manual_seed(0)
    last, keys = torch.randn(2, 6, 4, generator=random), torch.randn(2, 7, 3, 4, generator=random)
    real = torch.tensor([[True] * 7, [False, True] * 3 + [True]])
    every = keys.repeat_interleave(2, 2).double()
    logits = torch.einsum("ghd,gnhd->ghn", last.double(), every) / 2
    expected = logits.masked_fill(~real[:, None], -torch.inf).softmax(-1).mean(1)
    torch.testing.assert_close(last_row(last, keys, real).double(), expected, atol=1e-6, rtol=0)


def test_permuted_patches_score_alike():
    random = torch.Generator().manual_seed(0)
    attention, semantic, strength = (torch.rand(1, 12, generator=random) for _ in range(3))
    part, real = torch.randint(0, 2, (1, 12), generator=random), torch.ones(1, 12, dtype=torch.bool)
    order = torch.randperm(12, generator=random)
    moved = flow_score(*(x[:, order] for x in (attention, semantic, strength, part, real)), 2)
    torch.testing.assert_close(moved, flow_score(attention, semantic, strength, part, real, 2)[:, order])


@pytest.mark.parametrize("keep", [1, 9, 35])
def test_the_llm_layer_keeps_exactly_the_best_by_the_last_prompt_token(keep):
    step = FlowCut().steps(NEXT)[-1]
    assert (step.stage, step.layer, [need.layer for need in step.needs]) == ("prefill", 2, [1, 1])
    view = make_view(IMAGES, keep, text=[4, 7, 1, 5], filler=2)
    random = torch.Generator().manual_seed(0)
    n, m = view.real.shape[1], view.text.real.shape[1]
    rows = torch.rand(4, 2 * HEADS, n, generator=random)  # attention to all keys: does not sum to 1 over one image
    values = PerToken(torch.randn(4, n, HEADS, WIDTH, generator=random), torch.randn(4, m, HEADS, WIDTH, generator=random))
    view.signals = dict(zip(step.needs, (rows, values)))
    kept = step.select(view).keep
    for g, got in enumerate(chosen(view, kept)):
        own, last = values.visual[g, view.real[g]].double(), values.text[g, view.text.real[g]][-1].double()
        relation = rows[g][:, view.real[g]].double()
        relation = (relation / relation.sum(1, keepdim=True)).mean(0)
        semantic = (torch.einsum("hd,nhd->hn", last, own) / 2).softmax(-1).mean(0)
        score = (relation / relation.sum() + semantic / semantic.sum()) * own.mean(1).abs().sum(1)
        assert got.tolist() == sorted(score.topk(keep).indices.tolist())


def test_a_prompt_that_ends_with_its_image():
    step = FlowCut().steps(NEXT)[-1]
    view = make_view([ONE], 5)
    view.text = view.text._replace(**{name: getattr(view.text, name)[:, :0] for name in ("tokens", "real", "instruction")})
    view.signals = dict(zip(step.needs, (torch.rand(1, 4, 36), PerToken(torch.randn(1, 36, 2, 4), torch.randn(1, 0, 2, 4)))))
    assert step.select(view).keep.sum() == 5


@pytest.mark.parametrize(("geometry", "compat"), [(LLAVA, None), (LLAVA, "authors"), (NEXT, None), (SIGLIP, None)])
def test_selections_never_wait_for_the_device(geometry, compat):
    images = IMAGES if geometry is NEXT else [ONE, ONE]
    view = make_view(images, 9)
    for step in FlowCut(compat=compat).steps(geometry):
        if step.stage == "tower":
            view.signals = {need: signals(images)(need, view) for need in step.needs}
        else:
            n, m = view.real.shape[1], view.text.real.shape[1]
            view.signals = dict(zip(step.needs, (torch.rand(4, 6, n), PerToken(torch.rand(4, n, 3, 4), torch.rand(4, m, 3, 4)))))
        view.memory["keep"] = view.keep
        select_without_sync(step, view)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="llm_layer must be at least 1 or None, got 0"):
        FlowCut(llm_layer=0)
    with pytest.raises(ValueError, match="llm_layer=9 is not one of the LLM's layers 1 to 7"):
        FlowCut(llm_layer=9).steps(NEXT)
    with pytest.raises(ValueError, match="compat must be None or 'authors'"):
        FlowCut(compat="code")
    with pytest.raises(vtr.VtrError, match="leave compat out"):
        FlowCut(compat="authors").steps(NEXT)
    with pytest.raises(vtr.VtrError, match="use a boundary method"):
        FlowCut().steps(replace(LLAVA, feature_layer=0))
    with pytest.raises(vtr.VtrError, match="average_keep=9 cannot be solved"):
        FlowCut(average_keep=9).steps(NEXT)
    assert len(FlowCut(average_keep=9, llm_layer=None).steps(NEXT)) == len(FlowCut(average_keep=9).steps(LLAVA))
    assert FlowCut(llm_layer=9).steps(LLAVA)[-1].stage == "tower"
