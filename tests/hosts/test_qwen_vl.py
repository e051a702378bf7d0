"""Qwen-VL: grids of any shape, positions of three kinds, features beside the LLM, and what goes wrong when one of them is forgotten."""

import pytest
import torch

import vtr
from tests import oracles, tiny_models
from tests.caches import held
from tests.marks import quick_first
from tests.oracles import Setup, against_masks
from tests.probes import ByAttention, EveryNth, Freeze, Ragged, TowerTop
from tests.tiny_models import ONE_EACH, Shot, batch_of, model_of
from vtr.testing.qwen import QwenVL
from vtr.testing.watching import removed_and_cached

ALL = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FP64 = torch.float64


def test_every_image_has_its_own_grid_in_the_report():
    batch = batch_of("qwen2_5_vl", ((4, Shot(96, 64), 3, Shot(32, 80), 2),))
    with vtr.reduced(model_of("qwen2_5_vl"), "random", keep_ratio=0.5) as reduction:
        model_of("qwen2_5_vl")(**batch.inputs)
    images = reduction.report().images
    assert [(image.patch_grid, image.visual_tokens, image.image_size) for image in images] == [
        ((6, 4), 24, (96, 64)),
        ((2, 5), 10, (32, 80)),
    ]
    assert [len(image.retained) for image in images] == [12, 5]


def test_a_plan_knows_that_images_differ():
    host = vtr.host_of(model_of("qwen3_vl"))
    geometry = host.geometry()
    assert (geometry.patch_grid, geometry.most_tokens, geometry.joins, geometry.has_cls) == (None, None, 4, False)


@pytest.mark.parametrize("kind", quick_first(ALL[::-1]))
@pytest.mark.parametrize(
    "name, settings", [("visionzip", {}), ("flowcut", {}), ("tome", {}), ("pyramiddrop", {}), ("dart", {}), ("shortv", {"layers": [1, 3]})]
)
def test_methods_leave_what_the_masked_model_sees(kind, name, settings):
    cls = vtr.registry.method_class(name)
    method = vtr.create_method(name, **settings, **({"keep": 3} if cls.takes_budget else {}))
    removed, cached = removed_and_cached(method, kind)
    assert removed < 1e-6 and cached < 1e-6


@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus", "v2drop"])
def test_published_tables_take_a_count_where_an_image_may_have_any_size(name):
    removed, cached = removed_and_cached(vtr.create_method(name, keep=4), "qwen2_5_vl")
    assert removed < 1e-6 and cached < 1e-6
    with pytest.raises(ValueError, match=f"{name}: counts is measured against the most visual tokens .* give keep_ratio"):
        vtr.plan(model_of("qwen2_5_vl"), name, counts=(5, 4, 3))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_an_own_decoding_loop_needs_no_positions(kind, padded):
    """The model counts them from the length of its cache, which is that of the tokens left."""
    model, batch = model_of(kind, "sdpa", FP64), batch_of(kind, ONE_EACH if padded else (ONE_EACH[0],), dtype=FP64)
    with vtr.reduced(model, [EveryNth(stride=2), Ragged(stage="prefill", layer=2)]):
        cache = vtr.host_of(model).new_cache()
        logits = model(**batch.inputs, **held(cache)).logits[:, -1:]
        made = []
        for _ in range(3):
            made.append(logits[:, :, :90].argmax(-1))
            whole = batch.followed_by(torch.cat(made, 1))
            mask = {"attention_mask": whole.inputs["attention_mask"]} if padded else {}
            logits = model(input_ids=made[-1], **mask, **held(cache)).logits
        full = model(**whole.inputs, position_ids=whole.positions, use_cache=False).logits[:, -1:]
    assert float((logits - full).abs().max()) < 1e-6


@pytest.mark.parametrize(
    "plan, freeze",
    [([TowerTop(layer=1), EveryNth(stage="prefill", layer=1), ByAttention(layer=3, keep_ratio=0.1)], ()), ([Ragged(), Freeze()], (1, 3))],
)
def test_tokens_may_go_where_features_are_added(plan, freeze):
    setup = Setup("qwen3_vl", dtype=FP64)
    assert against_masks(setup, plan, setup.batch(), freeze=freeze) < 1e-6


OTHERS = {
    "2 x 2 patches in windows of 3 x 3 tokens": QwenVL("qwen2_5_vl", window=3, full=(2,)),
    "3 x 3 patches in windows of one token": QwenVL("qwen2_5_vl", side=3, window=1, full=()),
    "windows larger than an image": QwenVL("qwen2_5_vl", window=8, full=(0,)),
    "one patch a token": QwenVL("qwen2_vl", side=1),
    "features of every tower layer": QwenVL("qwen3_vl", deepstack=(0, 1, 2, 3)),
    "features of the last tower layer, 3 x 3 patches": QwenVL("qwen3_vl", side=3, deepstack=(3,)),
}


@pytest.mark.parametrize("name", ["O3b", "O4", "O6", "O9", "O9b", "O10"])
@pytest.mark.parametrize("kind", quick_first(OTHERS))
def test_other_sizes_of_tokens_and_windows_and_other_layers_of_features(kind, name, monkeypatch):
    monkeypatch.setitem(tiny_models.FAMILIES, kind, OTHERS[kind])
    assert oracles.judged(name, Setup(kind, dtype=FP64)) < 1e-6


class Planted:
    """Mistakes, each in the one place that prevents it."""

    @staticmethod
    def features_one_row_on(monkeypatch):
        from vtr.engine.llm.beside import Beside

        right = Beside.of.__func__
        monkeypatch.setattr(Beside, "of", classmethod(lambda cls, visual, features: right(cls, visual, [f.roll(1, 0) for f in features])))
        return "qwen3_vl", [EveryNth(stride=3)]

    @staticmethod
    def positions_of_other_tokens(monkeypatch):
        from vtr.engine.llm.positions import Positions

        def compact(self, index, *_rest):
            self.ids = self.ids[..., : index.shape[1]]

        monkeypatch.setattr(Positions, "compact", compact)
        return "qwen2_5_vl", [EveryNth(stride=3)]

    @staticmethod
    def rotary_rows_of_other_patches(monkeypatch):
        from vtr.hosts._towers import PackedTower

        right = PackedTower._followed

        def first_rows(self, run, given):
            made = right(self, run, given)
            return made if isinstance(given, torch.Tensor) else tuple(table[: len(short)] for table, short in zip(given, made, strict=True))

        monkeypatch.setattr(PackedTower, "_followed", first_rows)
        return "qwen2_5_vl", [TowerTop(layer=1), EveryNth(stride=2)]

    @staticmethod
    def one_segment_for_all(monkeypatch):
        from vtr.hosts._towers import PackedTower

        right = PackedTower._followed

        def ends(self, run, given):
            made = right(self, run, given)
            return made[[0, -1]] if isinstance(given, torch.Tensor) else made

        monkeypatch.setattr(PackedTower, "_followed", ends)
        return "qwen2_5_vl", [TowerTop(layer=1), EveryNth(stride=2)]


@pytest.mark.parametrize("mistake", [name for name in vars(Planted) if not name.startswith("__")])
def test_a_planted_mistake_is_far_above_rounding(mistake, monkeypatch):
    kind, plan = getattr(Planted, mistake)(monkeypatch)
    setup = Setup(kind, dtype=FP64)
    assert against_masks(setup, plan, setup.batch()) > 0.01


def test_what_it_cannot_do_is_refused_by_name():
    model = model_of("glm4v")
    with pytest.raises(vtr.VtrError, match="glm4v is reduced on images only, got a video"), vtr.reduced(model, "divprune", keep=3):
        video = {"pixel_values_videos": torch.zeros(8, 384), "video_grid_thw": torch.tensor([[1, 2, 4]])}
        model(input_ids=torch.tensor([[5, 91, 101, 101, 92, 6]]), **video)
    model = model_of("qwen2_vl")
    for name, reason in [
        ("fastervlm", "CLS token"),
        ("resize", "stage 'input'"),
    ]:
        with pytest.raises(vtr.VtrError, match=reason):
            vtr.plan(model, name, keep=5)
    with pytest.raises(vtr.VtrError, match="renumber"):
        vtr.plan(model, "fastv", position_ids="renumber")
    with pytest.raises(vtr.VtrError, match="needs 'down_proj' of the MLP"):
        vtr.plan(model_of("qwen3_vl_moe"), "corematching")


def test_pixels_of_other_images_are_refused():
    model, batch = model_of("qwen2_vl"), batch_of("qwen2_vl")
    with pytest.raises(ValueError, match="must hold the 200 patches of the images, got 196"), vtr.reduced(model, "random", keep=3):
        model(**batch.changed(pixel_values=batch.inputs["pixel_values"][:-4]).inputs)


def test_layers_of_linear_attention_have_nothing_to_read():
    model = model_of("qwen3_5")
    for name, settings in [("fastv", {"layer": 3}), ("dart", {"layer": 3}), ("pyramiddrop", {"layers": [2, 3, 4]})]:
        with pytest.raises(
            ValueError, match="attention is linear and has none on 'qwen3_5'; read a layer of full attention, nearest are 1 and 3"
        ):
            vtr.plan(model, name, **settings)
    removed, cached = removed_and_cached(vtr.create_method("fastv", keep=3, layer=2), "qwen3_5")
    assert removed < 2e-4 and cached < 2e-4


@torch.no_grad()
def test_removed_is_not_masked_for_a_recurrence():
    """With a mask of the tokens left, a recurrence still goes on over the others: the cut prompt is what counts."""
    model, batch = model_of("qwen3_5", "sdpa", FP64), batch_of("qwen3_5", (ONE_EACH[0],), dtype=FP64)
    with vtr.reduced(model, [EveryNth(stride=3)]) as reduction:
        short = model(**batch.inputs, position_ids=batch.positions).logits
    kept = torch.tensor(reduction.report().positions[0])
    mask = torch.zeros_like(batch.inputs["attention_mask"]).index_fill(1, kept, 1)
    masked = model(**{**batch.inputs, "attention_mask": mask}, position_ids=batch.positions).logits
    assert float((short[0] - masked[0, kept]).abs().max()) > 0.1
