"""Videos: removed = masked, alone and beside images; what a method sees of their frames."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import vtr
from tests import oracles
from tests.marks import quick_only
from tests.oracles import ORACLES, Setup
from vtr import Boundary, Method, Remove, Selection
from vtr.testing import probes
from vtr.testing.compare import against_masks, in_prompt_order, logits_of, run
from vtr.testing.families import SIDE, Clip, Shot
from vtr.testing.probes import EveryNth, MergePairs, Ragged
from vtr.testing.reference import Expected, difference, keep_mask, masked_logits
from vtr.testing.tiny_models import ANSWER, FAMILIES, MIXED, MIXED_KINDS, VIDEO_KINDS, generate
from vtr.types import VIDEO
from vtr.types.signals import cls_row, frame_score, keys, received

FP64 = torch.float64
QUICK = ("llava_onevision_clips", "qwen3_vl_clips")
"""One with frames pooled behind the projector and a newline, one with times between the frames."""


def check(name, kind):
    setup = Setup(kind, dtype=FP64)
    found = oracles.judged(name, setup)
    assert found <= oracles.tolerance(name, FP64, kind), f"{name} on {kind}: {found:.3g}"


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("kind", quick_only(QUICK[1:], VIDEO_KINDS))
def test_every_oracle_holds_where_images_are_videos(name, kind):
    check(name, kind)


@pytest.mark.parametrize("name", ["O3b", "O4", "O6", "O9b"])
@pytest.mark.parametrize("kind", [kind for kind in VIDEO_KINDS if kind not in QUICK])
def test_the_main_oracles_hold_where_images_are_videos(name, kind):
    check(name, kind)


@pytest.mark.parametrize("kind", MIXED_KINDS)
def test_images_and_videos_of_one_prompt_equal_the_masked_model(kind):  # O11
    setup = Setup(kind, dtype=FP64)
    for plan in ([EveryNth(stride=3), Ragged(stage="prefill", layer=2)], [MergePairs(), EveryNth(stage="prefill", layer=3)]):
        assert against_masks(setup, plan, setup.batch(*MIXED)) < 1e-6


@pytest.mark.parametrize("kind", ["qwen2_5_vl_mixed", "qwen3_vl_mixed"])
def test_images_and_videos_are_removed_in_the_tower_too(kind):
    setup = Setup(kind, dtype=FP64)
    plan = [probes.TowerTop(), EveryNth(stride=2)]
    assert against_masks(setup, plan, setup.batch(*MIXED)) < 1e-6


@pytest.mark.parametrize("kind", MIXED_KINDS)
def test_a_batch_of_images_and_videos_equals_its_rows(kind):
    setup = Setup(kind, dtype=FP64)
    batch = setup.batch(*MIXED)
    with torch.no_grad(), vtr.reduced(setup.model, [Ragged(), EveryNth(stage="prefill", layer=2)]):
        together = generate(setup.model, batch)
        for row in range(2):
            alone = generate(setup.model, batch.row(row))
            assert torch.equal(alone.sequences[0, -ANSWER:], together.sequences[row, -ANSWER:])
            assert (logits_of(alone)[:, 0] - logits_of(together)[:, row]).abs().max() < 1e-6


@dataclass(frozen=True, kw_only=True)
class OnlyVideos(EveryNth):
    """Removes tokens of videos; images pass by."""

    def steps(self, geometry):
        return tuple(replace(step, on=VIDEO) for step in super().steps(geometry))


@pytest.mark.parametrize("kind", ["llava_onevision_mixed", "qwen2_5_vl_mixed"])
def test_a_step_on_videos_leaves_images_as_they_are(kind):
    setup = Setup(kind, dtype=FP64)
    result = run(setup, [OnlyVideos(stride=3)], setup.batch(*MIXED))
    assert {choice.kind for choice in result.choices} == {"video"}
    for image in result.report.images:
        left = image.visual_tokens if image.kind == "image" else -(-image.visual_tokens // 3)
        assert len(image.retained) == left, image


@dataclass(frozen=True, kw_only=True)
class Seen(Method):
    """Keeps the last tokens of every row, and the View."""

    default_budget: ClassVar = vtr.Budget(keep_ratio=1 / 2)
    views: ClassVar[list] = []

    def steps(self, geometry):
        return (Remove(Boundary(), self.select),)

    def select(self, view):
        self.views.append(view)
        rank = view.real.flip(1).cumsum(1).flip(1)
        return Selection(keep=view.real & (rank <= view.keep[:, None]))


def seen(kind, frames, *rows, keep):
    Seen.views.clear()
    setup = Setup(kind, dtype=FP64)
    with torch.no_grad(), vtr.reduced(setup.model, Seen(keep=keep, frames=frames)) as reduction:
        setup.model(**setup.batch(*rows).inputs)
        return Seen.views, reduction.report()


def test_each_shows_every_frame_as_an_image_with_its_share():
    views, report = seen("qwen2_5_vl_mixed", "each", (3, Clip(32, 48, 3), 4), (2, Clip(48, 48, 2), 1), keep=7)
    (view,) = views
    assert view.real.shape == (5, 9) and view.counts == [6, 6, 6, 9, 9]
    assert view.keeps == [3, 2, 2, 4, 3]
    assert view.grids == [[(2, 3)]] * 3 + [[(3, 3)]] * 2 and view.kinds == ["image"] * 5 and view.frames == [None] * 5
    assert view.row.tolist() == [0, 0, 0, 1, 1] and not view.cells[..., 0].any()
    assert view.patch[0, :6].tolist() == view.patch[2, :6].tolist() == list(range(6))
    assert [video.per_frame for video in report.images] == [[3, 2, 2], [4, 3]]
    assert [(video.kind, video.frames) for video in report.images] == [("video", 3), ("video", 2)]


def test_all_shows_a_video_as_one_image():
    views, report = seen("qwen2_5_vl_mixed", "all", (3, Clip(32, 48, 3), 4), (2, Clip(48, 48, 2), 1), keep=7)
    (view,) = views
    assert view.counts == [18, 18] and view.keeps == [7, 7] and view.kinds == ["video"] * 2 and view.frames == [3, 2]
    assert view.grids == [[(2, 3)] * 3, [(3, 3)] * 2]
    assert view.cells[0, [0, 6, 17]].tolist() == [[0, 0, 0], [1, 0, 0], [2, 1, 2]]
    assert [video.per_frame for video in report.images] == [[0, 1, 6], [0, 7]]


def test_images_and_videos_come_in_views_of_their_own():
    views, report = seen("qwen3_vl_mixed", "each", (3, Clip(32, 32, 2), 2, Shot(48, 48), 4), keep=5)
    assert [view.kinds for view in views] == [["image"], ["image"] * 2] and [view.counts for view in views] == [[9], [4, 4]]
    assert [(image.kind, len(image.retained)) for image in report.images] == [("image", 5), ("video", 5)]


def test_the_instruction_has_no_times_of_frames():
    views, _ = seen("qwen3_vl_clips", "all", (3, Clip(32, 32, 3), 4), keep=6)
    text = views[0].text
    assert int(text.real.sum()) == 3 + 2 + 2 * 4 + 4 and int(text.instruction.sum()) == 1 + 4  # the end of the vision, then the question


def tower_maps(kind, batch):
    """Attention maps of the layer that gives features `(frames, heads, S, S)`, and its keys, by hooks of our own on eager attention."""
    model = Setup(kind, "eager", FP64).model
    found = {}
    layer = model.model.vision_tower.encoder.layers[FEATURES]
    heads = lambda x: x.unflatten(-1, (4, -1)).transpose(1, 2)  # noqa: E731
    hooks = [layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: found.update(q=heads(out)))]
    hooks += [layer.self_attn.k_proj.register_forward_hook(lambda m, a, out: found.update(k=heads(out)))]
    with torch.no_grad():
        model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    weights = (found["q"] @ found["k"].mT * found["q"].shape[-1] ** -0.5).softmax(-1)
    return weights, found["k"]


FEATURES = 2


def pooled(kind, values):
    """Values of patches `(frames, 36, C)` as the family pools features: windows of 2 x 2, or bilinear interpolation to half."""
    maps = values.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)
    if kind.startswith("llava_next"):
        return F.avg_pool2d(maps, 2).flatten(2).mT
    return F.interpolate(maps, size=(SIDE // 2, SIDE // 2), mode="bilinear").flatten(2).mT


@pytest.mark.parametrize("kind", ["llava_next_video_clips", "llava_onevision_clips"])
@pytest.mark.parametrize("frames", ["each", "all"])
def test_signals_of_the_tower_come_on_the_grid_of_the_llm(kind, frames):
    setup, prefix = Setup(kind, dtype=FP64), int(FAMILIES[kind].has_cls)
    batch = setup.batch((3, Clip(), 4, Clip(), 2))
    asked = (received(FEATURES), received(FEATURES, heads=True), keys(FEATURES, tower=True), *([cls_row(FEATURES)] if prefix else []))
    probes.OBSERVED.clear()
    with torch.no_grad(), vtr.reduced(setup.model, probes.Observe(signals=asked, frames=frames)):
        setup.model(**batch.inputs)
    (view,) = probes.OBSERVED
    weights, key = tower_maps(kind, batch)
    shape = (6, 9) if frames == "each" else (2, 27)
    by_head = weights.mean(2)[..., prefix:].mT  # (frames, patches, heads)
    torch.testing.assert_close(view.signals[asked[0]], pooled(kind, by_head.mean(-1, keepdim=True)).reshape(shape))
    assert view.signals[asked[1]].shape == (shape[0], 4, shape[1])
    torch.testing.assert_close(view.signals[asked[1]].transpose(1, 2), pooled(kind, by_head).reshape(*shape, 4))
    flat = key.transpose(1, 2)[:, prefix:].flatten(2)
    torch.testing.assert_close(view.signals[asked[2]].flatten(2), pooled(kind, flat).reshape(*shape, -1))
    if prefix:
        row = weights[:, :, 0, prefix:].mean(1)[..., None]
        torch.testing.assert_close(view.signals[asked[3]], pooled(kind, row).reshape(shape))


def test_received_attention_of_a_packed_tower_is_that_of_every_frame():
    setup = Setup("qwen2_vl_clips", dtype=FP64)
    batch = setup.batch((3, Clip(32, 48, 3), 4, Clip(48, 48, 2), 2))
    probes.OBSERVED.clear()
    signal = received(3)
    model, found = setup.model, {}
    block = model.model.visual.blocks[3].attn
    with torch.no_grad(), vtr.reduced(model, probes.Observe(signals=(signal,), frames="all")):
        model(**batch.inputs)

    def note(_module, args, kwargs):
        found.update(x=args[0] if args else kwargs["hidden_states"], rope=kwargs["position_embeddings"])

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**batch.inputs)
        hook.remove()
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision as rotated

        q, k, _ = block.qkv(found["x"]).unflatten(-1, (3, 4, -1)).unbind(1)
        q, k = rotated(q, k, *found["rope"])
    start, frames = 0, []
    for patches in (24, 24, 24, 36, 36):
        own = slice(start, start + patches)
        start += patches
        weights = (q[own].transpose(0, 1) @ k[own].transpose(0, 1).mT * q.shape[-1] ** -0.5).softmax(-1)
        frames.append(weights.mean((0, 1)).unflatten(0, (-1, 4)).sum(-1))
    (view,) = probes.OBSERVED
    torch.testing.assert_close(view.signals[signal][0], torch.cat(frames[:3]))
    torch.testing.assert_close(view.signals[signal][1], torch.cat(frames[3:]))


@pytest.mark.parametrize("kind", ["llava_next_video_clips", "llava_onevision_clips"])
def test_a_tower_whose_frames_are_pooled_is_not_cut(kind):
    setup = Setup(kind, dtype=FP64)
    with (
        vtr.reduced(setup.model, probes.TowerTop()),
        pytest.raises(vtr.VtrError, match="shortens the vision tower, but .* several patches"),
    ):
        setup.model(**setup.batch().inputs)


@pytest.mark.parametrize("kind", ["llava_next_video_clips", "llava_onevision_clips"])
def test_what_acts_in_front_of_the_projector_acts_on_pooled_frames(kind):
    setup = Setup(kind, dtype=FP64)

    @dataclass(frozen=True, kw_only=True)
    class Edge(EveryNth):
        def steps(self, geometry):
            return (Remove(Boundary(before_projector=True), self.select, counted=False, per="view"),)

    result = run(setup, [Edge(stride=2)], setup.batch())
    assert [len(video.retained) for video in result.report.images] == [14] * 3
    batch, (choice,) = setup.batch(), in_prompt_order(setup.batch(), result.choices)
    keep = keep_mask(batch, choice.retained)
    expected = Expected(drops=[(0, keep)])
    assert difference(batch, keep, result.logits, masked_logits(setup.model, batch, expected)) < 1e-6


def test_a_model_without_videos_refuses_a_method_for_them_and_says_so():
    setup = Setup("llava", dtype=FP64)
    with pytest.raises(vtr.VtrError, match="acts on the frames of videos, but 'llava' takes images only"):
        vtr.plan(setup.model, OnlyVideos(stride=2))


PROMPTS = ((4, Shot(48, 48), 2, Shot(48, 48), 3), (3, Shot(48, 48), 5), (7,))


@pytest.mark.parametrize("kind", ["llava", "internvl", "llava_siglip", "gemma3", "smolvlm", "glm4v"])
@pytest.mark.parametrize("frames", ["each", "all"])
def test_the_images_of_a_prompt_are_the_frames_of_one_video(kind, frames):
    Seen.views.clear()
    setup = Setup(kind, dtype=FP64)
    batch = setup.batch(*PROMPTS)
    with torch.no_grad(), vtr.reduced(setup.model, Seen(keep=7, frames=frames), visuals="prompt") as reduction:
        logits = setup.model(**batch.inputs, position_ids=batch.positions).logits
    (view,), images = Seen.views, reduction.report().images
    one = images[1].visual_tokens
    assert [(image.kind, image.frames, image.visual_tokens) for image in images] == [("video", 2, 2 * one), ("video", 1, one)]
    assert view.counts == ([2 * one, one] if frames == "all" else [one] * 3)
    assert [image.per_frame for image in images] == ([[0, 7], [7]] if frames == "all" else [[4, 3], [7]])
    keep = batch.valid & ~batch.visual
    for row, first in ((0, images[0]), (1, images[1])):
        placeholders = batch.visual[row].nonzero()[:, 0]
        keep[row, placeholders[first.retained]] = True
    assert difference(batch, keep, logits, masked_logits(setup.model, batch, Expected(drops=[(0, keep)]))) < 1e-6


def test_generate_encodes_the_frames_of_its_prompts_together():
    setup = Setup("internvl", dtype=FP64)
    batch = setup.batch(*PROMPTS[:2])
    with torch.no_grad(), vtr.reduced(setup.model, [probes.Observe(), OnlyVideos(stride=2)], visuals="prompt") as reduction:
        together = generate(setup.model, batch)
        assert [image.frames for image in reduction.report().images] == [2, 1]
        alone = generate(setup.model, batch.row(1))
    assert torch.equal(alone.sequences[0, -ANSWER:], together.sequences[1, -ANSWER:])


@pytest.mark.parametrize("name", ["fastvid", "visionzip", "tome"])
@pytest.mark.parametrize("kind", ["llava", "internvl"])
def test_generate_knows_what_the_tower_saw_of_frames(kind, name):
    """It encodes them before the first call of the model: signals, tokens cut inside the tower and the answer are those of a plain forward."""
    setup = Setup(kind, dtype=FP64)
    batch = setup.batch(*PROMPTS[:2])
    with torch.no_grad(), vtr.reduced(setup.model, name, keep=7, visuals="prompt") as reduction:
        logits = setup.model(**batch.inputs, position_ids=batch.positions).logits[:, -1]
        retained = [image.retained for image in reduction.report().images]
        answer = generate(setup.model, batch)
    assert [image.retained for image in reduction.report().images] == retained
    assert (logits_of(answer)[0] - logits).abs().max() < 1e-6


def test_what_are_no_frames_is_refused():
    with pytest.raises(vtr.VtrError, match="visuals='prompt' takes every image as a frame, but an image has 3 views"):
        setup = Setup("llava_next", dtype=FP64)
        with vtr.reduced(setup.model, OnlyVideos(stride=2), visuals="prompt"):
            setup.model(**setup.batch().inputs)
    with pytest.raises(vtr.VtrError, match="'qwen2_vl' takes videos, got visuals='prompt'"):
        vtr.plan(Setup("qwen2_vl").model, OnlyVideos(stride=2), visuals="prompt")
    with pytest.raises(ValueError, match="visuals must be 'each' or 'prompt', got 'all'"):
        vtr.plan(Setup("llava").model, OnlyVideos(stride=2), visuals="all")


@dataclass(frozen=True, kw_only=True)
class Scored(Seen):
    """Reads the scores of frames."""

    def steps(self, geometry):
        return (Remove(Boundary(), self.select, (frame_score(),), on=VIDEO),)


@pytest.mark.parametrize("given", ["list", "tensor", "function"])
def test_scores_of_frames_reach_their_videos(given):
    Seen.views.clear()
    setup = Setup("qwen2_5_vl_mixed", dtype=FP64)
    batch = setup.batch((3, Clip(32, 32, 2), 2, Shot(48, 48), 4), (2, Clip(32, 48, 2 if given == "tensor" else 3), 5))
    scores = [[0.1, 0.9], [0.2, 0.3, 0.4]] if given != "tensor" else torch.tensor([[0.1, 0.9], [0.2, 0.3]])
    asked = []
    frame_scores = (lambda frames: (asked.append(frames), scores)[1]) if given == "function" else scores
    with torch.no_grad(), vtr.reduced(setup.model, Scored(keep=4), frame_scores=frame_scores):
        setup.model(**batch.inputs)
    (view,) = Seen.views
    wanted = [[0.1, 0.9], [0.2, 0.3]] if given == "tensor" else [[0.1, 0.9, 0.0], [0.2, 0.3, 0.4]]
    torch.testing.assert_close(view.signals[frame_score()], torch.tensor(wanted))
    assert asked == ([[2, 3]] if given == "function" else [])


def test_scores_of_other_frames_are_refused():
    setup = Setup("qwen2_5_vl_mixed")
    batch = setup.batch((3, Clip(32, 32, 2), 4))
    with pytest.raises(ValueError, match="needs the relevance of every frame, got none; give frame_scores="):
        vtr.plan(setup.model, Scored(keep=4))
    with pytest.raises(ValueError, match="no method of .* reads frame_scores; leave them out"):
        vtr.plan(setup.model, Seen(keep=4), frame_scores=[[1.0]])
    with vtr.reduced(setup.model, Scored(keep=4), frame_scores=[[1.0, 2.0, 3.0]]):
        with pytest.raises(vtr.VtrError, match=r"here \[2\] frames, got \[3\]"):
            setup.model(**batch.inputs)
