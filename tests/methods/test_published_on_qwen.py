"""What was published for Qwen2-VL and Qwen2.5-VL is what methods do there by default: places, counts, and what scores are made of.

On a Qwen2.5-VL-7B without weights: 32 tower blocks, 28 LLM layers, 2 x 2 patches to a token. The cards say where each number comes from.
"""

import sys

import pytest
import torch

import vtr
from tests.tiny_models import Shot, batch_of, model_of
from vtr.eval.run.forecast import sketch
from vtr.eval.run.workers import Setup
from vtr.hosts.hf_qwen_vl import _window_order
from vtr.types.signals import LAST, attention, cls_row, keys, next_keys, next_queries, queries, received, values

N = 1296
"""Tokens of an image of 36 x 36, as in published tables."""


@pytest.fixture(scope="module")
def model():
    return sketch(Setup("qwen2.5-vl-7b"))


def places(plan):
    return [item.place for item in plan.steps if item.removes]


def reads(plan):
    return [need for item in plan.steps for need in item.step.needs]


@pytest.mark.parametrize("ratio, left", [(1 / 3, 432), (2 / 9, 288), (1 / 9, 144)])
def test_flowcut_leaves_twice_the_budget_in_the_tower_and_the_budget_in_llm_layer_2(model, ratio, left):
    plan = vtr.plan(model, "flowcut", keep_ratio=ratio)
    assert plan.counts(N) == [2 * left] * 2 + [left] * 26
    removals = [(item.step.stage, item.step.layer) for item in plan.steps if item.removes]
    assert removals[-2:] == [("tower", 31), ("prefill", 2)]
    assert [layer for stage, layer in removals if stage == "tower"] == list(range(1, 32, 2)), "every second layer"
    assert reads(plan)[-2:] == [attention(1, queries=LAST, heads=True), values(1)]
    assert not {need.kind for need in reads(plan)} & {"cls_row", "cls_v"}, "no semantic row in the tower"
    (method,) = plan.methods
    assert method.position_ids == "keep" and (method.history, method.interval) == (0.5, 2)


def test_flowcut_can_finish_in_the_tower_and_meet_a_mean(model):
    assert vtr.plan(model, "flowcut", keep=144, llm_layer=None).counts(N) == [144] * 28
    counts = vtr.plan(model, "flowcut", average_keep=144.0).counts(N)
    assert sum(counts) / 28 == pytest.approx(144, abs=1) and counts[0] == 2 * counts[2]
    assert vtr.plan(model, "flowcut", keep=1000).counts(N)[1:3] == [N, 1000], "no more than there are"


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_5_vl_clips", "qwen3_vl_mixed", "mistral3"])
@pytest.mark.parametrize("keep", [1, 5, 7])
def test_flowcut_keeps_its_counts_on_images_and_videos(kind, keep):
    model, batch = model_of(kind), batch_of(kind)
    with torch.no_grad(), vtr.reduced(model, "flowcut", keep=keep) as reduction:
        model(**batch.inputs)
    for image in reduction.report().images:
        n = image.visual_tokens
        assert image.per_layer == [min(n, 2 * keep)] * 2 + [min(n, keep)] * 3


@pytest.mark.parametrize("ratio, left", [(1 / 3, 432), (2 / 9, 288), (1 / 9, 144)])
def test_fastv_and_dart_cut_at_layer_2(model, ratio, left):
    fastv, dart = vtr.plan(model, "fastv", keep_ratio=ratio), vtr.plan(model, "dart", keep_ratio=ratio)
    assert fastv.counts(N) == dart.counts(N) == [N] * 2 + [left] * 26
    assert reads(fastv) == [attention(1, queries=LAST)] and reads(dart) == [keys(1)] and dart.steps[0].step.final_norm
    assert (dart.methods[0].pivots_image, dart.methods[0].pivots_text, dart.methods[0].position_ids) == (4, 4, "keep")


@pytest.mark.parametrize("ratio, left", [(0.2, 259), (0.1, 130), (0.05, 65)])
def test_visionzip_and_vispruner_and_divprune_prune_merged_tokens(model, ratio, left):
    """20, 10 and 5 % as in MMTok's runs; scores are attention received in the last block, added up over the patches of a token."""
    visionzip, vispruner, divprune = (vtr.plan(model, name, keep_ratio=ratio) for name in ("visionzip", "vispruner", "divprune"))
    assert reads(visionzip) == [keys(31, tower=True), received(31)] and reads(vispruner) == [received(31)] and reads(divprune) == []
    for plan in (visionzip, vispruner, divprune):
        assert places(plan) == ["boundary"] and plan.counts(N) == [left] * 28 and plan.methods[0].position_ids == "keep"
    assert visionzip.methods[0].contextual == 10 / 64


def test_pyramiddrop_has_no_schedule_of_its_own_and_keeps_its_relative_depth(model):
    plan = vtr.plan(model, "pyramiddrop")
    assert [item.step.layer for item in plan.steps] == [7, 14, 21]
    assert plan.counts(N) == [N] * 7 + [N // 2] * 7 + [N // 4] * 7 + [N // 8] * 7
    assert reads(plan) == [next_queries(), next_keys()] * 3
    asked = vtr.plan(model, "pyramiddrop", layers=[8, 16, 24])
    assert asked.counts(N)[7:9] == [N, N // 2]


def test_towers_with_a_token_to_a_patch_are_read_as_before():
    clip, siglip = vtr.plan(model_of("llava"), "visionzip", keep=9), vtr.plan(model_of("llava_siglip"), "visionzip", keep=9)
    assert places(clip) == places(siglip) == ["boundary before the projector"]
    layer = vtr.host_of(model_of("llava")).feature_layers[0]
    assert reads(clip) == [keys(layer, tower=True), cls_row(layer)]
    assert reads(vtr.plan(model_of("llava_siglip"), "vispruner", keep=9)) == [queries(3, tower=True), keys(3, tower=True)]
    assert {need.kind for need in reads(siglip)} == {"q", "k"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_scores_are_the_attention_that_the_patches_of_a_token_receive(kind, monkeypatch):
    """From the attention maps of the eager tower's last block, which sees whole images; 2 x 2 patches of a token are neighbours there."""
    batch = batch_of(kind, ((4, Shot(64, 96), 6),))
    eager = model_of(kind, "eager")
    block, maps = eager.model.visual.blocks[-1].attn, []
    module = sys.modules[type(block).__module__]
    original = module.eager_attention_forward

    def spy(owner, *args, **kwargs):
        output, weights = original(owner, *args, **kwargs)
        maps.extend([weights] * (owner is block))
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    eager(**batch.inputs)
    monkeypatch.undo()
    (weights,) = maps  # one image
    paid = weights[0].mean(0).mean(0).unflatten(0, (-1, 4)).sum(-1)
    if kind == "qwen2_5_vl":
        order = _window_order(eager.model.visual, 2)("image", batch.inputs, torch.arange(len(paid)))
        paid = torch.zeros_like(paid).scatter(0, order, paid)
    with vtr.reduced(model_of(kind), "vispruner", keep=5, important_ratio=1.0) as reduction:
        model_of(kind)(**batch.inputs)
    (image,) = reduction.report().images
    assert image.retained == sorted(paid.topk(5).indices.tolist())
