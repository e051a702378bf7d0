import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vtr
import vtr.methods.flowcut as module
from scripts.replay.flowcut import prune_layer
from tests.methods.handmade import (
    IMAGES,
    LLAVA,
    NEXT,
    ONE,
    SIGLIP,
    chosen,
    images_of,
    make_view,
    projections,
    retained,
    run,
    select_without_sync,
    tower_layers,
)
from tests.tiny_models import Shot, batch_of
from vtr.methods.flowcut import FlowCut
from vtr.types import PerToken

HEADS, WIDTH, PATCHES = 3, 4, 500


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


def slow(view, g, image, keep, feature, anyres, cls=True, history=0.5, interval=2):
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
            cumulative[v] = history * cumulative[v] + (1 - history) * score if v in cumulative else score
            n, share = len(p), a / a.sum()
            if n > target[v] and feature - 1 - layer > 0:
                entropy = -(share * share.log()).sum().item()
                amounts.append((n - target[v]) / math.sqrt(feature - 1 - layer) * (1 - (entropy / math.log(n)) ** 2))
        remaining = feature - 1 - layer
        if remaining % interval:
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


@pytest.mark.parametrize(("history", "interval"), [(0.0, 2), (0.75, 2), (0.5, 1), (0.25, 3), (0.5, 99)])
def test_history_and_interval(history, interval):
    images = [ONE, ((0, 0), (30, 48))]
    view, geometry, method = (
        make_view(images, [7, 12], filler=2),
        replace(LLAVA, feature_layer=5),
        FlowCut(history=history, interval=interval),
    )
    last = run(method, geometry, view, signals(images))[-1]
    for g, image in enumerate(images):
        expected, log = slow(view, g, image, int(view.keep[g]), 5, False, history=history, interval=interval)
        assert torch.equal(last.patch[g][last.real[g]], expected)
        assert len(log) == sum(step.action == "remove" for step in method.steps(geometry)) == len(range(0, 5, interval))


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


@pytest.mark.parametrize(("kind", "views"), [("llava", 1), ("llava_next", 5)])
@torch.no_grad()
def test_on_a_model_the_tower_prunes_as_the_authors_encoder(kind, views, monkeypatch):
    """The loop that reproduces the authors' encoder vector, on the layers of a model; the views of an image are whole and share counts."""
    shot = Shot(96, 96)
    batch = batch_of(kind, ((4, shot, 6), (3, shot, 2, shot, 3)), dtype=torch.float64)
    expected = []
    for seen in images_of(batch):
        hidden, layers = tower_layers(batch, seen.pixels)
        patch, cumulative, feature = torch.arange(36).expand(views, -1), None, len(layers) - 2
        for i, layer in enumerate(layers[:feature]):
            q, k, v = projections(layer, hidden)
            hidden = layer(hidden, None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            patch, hidden, cumulative = prune_layer(patch, hidden, cumulative, q, k, v, feature - 1 - i, 10)
        expected.append(sorted((patch + 36 * torch.arange(views)[:, None]).flatten().tolist()))
    in_llm, entering = module._in_llm, []

    def spy(view, *needs):
        entering.extend(sorted(view.patch[g][view.real[g]].tolist()) for g in range(len(view.patch)))
        return in_llm(view, *needs)

    monkeypatch.setattr(module, "_in_llm", spy)
    found = retained(batch, FlowCut(keep=10 if views == 1 else 20))
    assert (found if views == 1 else entering) == expected
    assert views == 1 or all(len(ids) == 20 and set(ids) <= set(tower) for ids, tower in zip(found, expected))


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
    with pytest.raises(ValueError, match=r"history must be in \[0, 1\), got 1"):
        FlowCut(history=1)
    with pytest.raises(TypeError, match="history must be a number, got 'half'"):
        FlowCut(history="half")
    with pytest.raises(ValueError, match="interval must be an integer from 1 on, got 0"):
        FlowCut(interval=0)
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
