"""Mistral 3 and Pixtral inside LLaVA: images of any grid, rows closed by break tokens that are text, but no question."""

import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers.models.pixtral import modeling_pixtral

import vtr
from tests import probes
from tests.fake_flash import flash_attention
from tests.oracles import Setup, against_masks, expected_of, recompute
from tests.probes import EveryNth, Freeze, Ragged, TowerTop
from tests.reference import difference, masked_logits
from tests.tiny_models import WITH_TEXT_ONLY, batch_of, build, generate, model_of
from vtr.hosts import hf_mistral3
from vtr.testing.pixtral import BREAK, END
from vtr.testing.watching import removed_and_cached
from vtr.viz import views_from_inputs

KINDS = ("mistral3", "llava_pixtral")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_any_grids_any_padding_and_rows_without_an_image(kind, pad):
    setup = Setup(kind, dtype=torch.float64)
    for plan in ([Ragged(), EveryNth(stage="prefill", layer=2)], [Ragged(stage="tower", layer=1), TowerTop(layer=2), EveryNth()]):
        assert against_masks(setup, plan, setup.batch(*WITH_TEXT_ONLY, pad=pad)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_tower_under_flash_attention_equals_sdpa(kind):
    setup, plan = Setup(kind, dtype=torch.float64), [Ragged(stage="tower", layer=1), TowerTop(layer=2)]
    model, batch = setup.model, setup.batch()
    found = []
    if "cu_seq_lens_q" not in inspect.getsource(modeling_pixtral):  # transformers 5.17: the kernel gets patches for borders of images
        with flash_attention(model), pytest.raises(AssertionError):
            model(**batch.inputs, use_cache=False)
        return
    for switch in (nullcontext(), flash_attention(model)):
        with switch, vtr.reduced(model, plan):
            found.append(model(**batch.inputs, use_cache=False).logits[:, -3:])
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lost", ["order", "mask", "positions"])
def test_planted_mistakes_are_found(lost, monkeypatch):
    """Patches in raster order, images that see each other, and rotary positions of patches that are gone."""
    setup, plan = Setup("mistral3", dtype=torch.float64), [EveryNth(stage="tower", layer=1, stride=3), EveryNth(stride=2)]
    tower, right = hf_mistral3.RasterTower, hf_mistral3.RasterTower._followed

    def wrong(self, run, given):
        if lost == "mask" and isinstance(given, torch.Tensor):
            return torch.zeros_like(right(self, run, given))
        if lost == "positions" and isinstance(given, tuple):
            return tuple(table[: len(left)] for table, left in zip(given, right(self, run, given), strict=True))
        return right(self, run, given)

    monkeypatch.setattr(tower, "_followed", wrong)
    if lost == "order":
        monkeypatch.setattr(tower, "_order", lambda self, run: torch.arange(run.tokens.gid_of.shape[1] * self.joins))
    assert not against_masks(setup, plan, setup.batch()) < 0.01


def test_filler_of_pixel_values_changes_no_choice():
    model, batch = model_of("mistral3"), batch_of("mistral3")
    height, width = batch.inputs["image_sizes"][0].tolist()
    alone = batch.row(0)
    alone = alone.changed(pixel_values=alone.inputs["pixel_values"][..., :height, :width])
    chosen = []
    for one in (batch, alone):
        with vtr.reduced(model, "random", keep=3) as reduction, torch.no_grad():
            model(**one.inputs)
        chosen.append(reduction.report().images[0].retained)
    assert chosen[0] == chosen[1]


def test_patches_that_become_no_token_close_the_tower():
    setup = Setup("mistral3", dtype=torch.float64)
    batch = setup.batch()
    odd = batch.changed(image_sizes=batch.inputs["image_sizes"] + torch.tensor([[8, 0], [0, 0], [0, 0]]))
    with (
        vtr.reduced(setup.model, "visionzip", keep=3),
        pytest.raises(vtr.VtrError, match="88 x 32 pixels has patches that become no token"),
    ):
        setup.model(**odd.inputs)
    assert against_masks(setup, [EveryNth(stride=3)], odd) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_break_tokens_stay_and_are_no_question(kind):
    model, batch = model_of(kind), batch_of(kind)
    probes.OBSERVED.clear()
    with torch.no_grad(), vtr.reduced(model, [EveryNth(stride=3), probes.Observe(stage="prefill", layer=2)]) as reduction:
        model(**batch.inputs)
    (view,) = probes.OBSERVED
    ids = batch.inputs["input_ids"]
    breaks = (ids == BREAK) | (ids == END)
    for row, kept in enumerate(reduction.report().positions):
        assert set(breaks[row].nonzero()[:, 0].tolist()) <= set(kept)
    asked = [int(view.text.instruction[group].sum()) for group in range(3)]
    assert asked == [6 + 1, 2 + 3 + 2, 2 + 3 + 2], "text behind the first image, and the end tokens of images"


def test_without_image_sizes_nothing_is_filler():
    model, batch = model_of("llava_pixtral"), batch_of("llava_pixtral")
    inputs = dict(batch.inputs)
    pixels = inputs["pixel_values"][:1, :, :48, :32]
    ids = torch.tensor([[5, *[100] * 24, 6, 7]])
    with vtr.reduced(model, "divprune", keep=5) as reduction, torch.no_grad():
        model(input_ids=ids, pixel_values=pixels)
    (image,) = reduction.report().images
    assert (image.visual_tokens, len(image.retained)) == (24, 5)


@pytest.mark.parametrize("name", ["visionzip", "pool", "sparsevlm", "tome"])
def test_methods_leave_what_the_masked_model_sees(name):
    settings = {"keep_ratio": 0.3} if name == "sparsevlm" else {"keep": 4}
    removed, cached = removed_and_cached(vtr.create_method(name, **settings), "mistral3")
    assert removed < 1e-6 and cached < 1e-6


def test_what_it_cannot_do_is_refused_by_name():
    for name, reason in [("resize", "stage 'input'"), ("fastervlm", "CLS")]:
        with pytest.raises(vtr.VtrError, match=reason):
            vtr.plan(model_of("mistral3"), name, keep=5)


@pytest.mark.parametrize(
    "plan, freeze", [([Ragged(), EveryNth(stage="prefill", layer=2)], ()), ([EveryNth(stride=2), Freeze()], (1, 3))], ids=["llm", "frozen"]
)
def test_attention_that_multiplies_by_positions_gets_those_of_the_tokens_left(plan, freeze):
    """Ministral 3."""
    setup = Setup("ministral3", dtype=torch.float64)
    assert against_masks(setup, plan, setup.batch(), freeze=freeze) < 1e-6
    assert recompute(setup, plan) < 1e-6


def test_queries_of_the_next_layer_are_those_of_attention_that_multiplies_by_positions():
    removed, cached = removed_and_cached(vtr.create_method("pyramiddrop", keep=3), "ministral3")
    assert removed < 1e-6 and cached < 1e-6


def test_keys_that_are_one_latent_vector_cannot_be_frozen():
    """Mistral 4."""
    latent = dict(q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, num_key_value_heads=4)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1)
    model = build("mistral3", backbone="mistral4", text={"head_dim": 16, **latent, **experts})
    with pytest.raises(vtr.VtrError, match="shortv: freezes visual tokens, whose keys .* as one latent vector"):
        vtr.plan(model, "shortv", layers=[1, 3])
    with vtr.reduced(model, "fastv", keep=3) as reduction, torch.no_grad():
        generate(model, batch_of("mistral3"), 3)
    assert [image.per_layer for image in reduction.report().images] == [[n, n, 3, 3, 3] for n in batch_of("mistral3").counts()]


def test_a_tower_that_loses_its_first_patch_is_refused():
    with pytest.raises(vtr.VtrError, match="cuts off the first patch"):
        vtr.host_of(build("llava_pixtral", vision_feature_select_strategy="default"))


def test_a_picture_has_no_filler():
    inputs = {"pixel_values": torch.zeros(2, 3, 96, 96), "image_sizes": torch.tensor([[48, 32], [96, 96]])}
    settings = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert [own.shape for own in views_from_inputs(inputs, settings, [1, 1], [])] == [(1, 48, 32, 3), (1, 96, 96, 3)]


@pytest.fixture(scope="module")
def by_position():
    """An LLM of Ministral 3, whose attention scales queries by their positions."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 8}
    pytest.importorskip("transformers.models.ministral3")
    return build("llava", dtype=torch.float64, backbone="ministral3", text={"rope_parameters": rope, "sliding_window": None})


@pytest.mark.parametrize("plan", [[Ragged(), EveryNth(stage="prefill", layer=2)], [EveryNth(), probes.Freeze()]])
@torch.no_grad()
def test_attention_that_computes_with_positions_gets_those_of_the_tokens_left(by_position, plan):
    batch = batch_of("llava", dtype=torch.float64)
    with probes.recorded() as choices, vtr.reduced(by_position, plan):
        logits = by_position(**batch.inputs, position_ids=batch.positions).logits
        answer = generate(by_position, batch, 4)
        whole = batch.followed_by(answer.sequences[:, -4:-1])
        recomputed = by_position(**whole.inputs, position_ids=whole.positions, use_cache=False).logits[:, -4:]
    expected = expected_of(batch, choices[: len(choices) // 3])
    expected.freeze = (1, 3) if plan[-1] == probes.Freeze() else ()
    assert difference(batch, expected.drops[-1][1], logits, masked_logits(by_position, batch, expected)) < 1e-6
    assert float((torch.stack(answer.logits, 1) - recomputed).abs().max()) < 1e-6


@torch.no_grad()
def test_attention_that_computes_with_positions_can_be_projected_ahead_and_refuses_flash_attention(by_position):
    batch = batch_of("llava", dtype=torch.float64)
    with vtr.reduced(by_position, "pyramiddrop", keep=9) as reduction:
        by_position(**batch.inputs)
    assert {len(image.retained) for image in reduction.report().images} == {9}
    with flash_attention(by_position), pytest.raises(vtr.VtrError, match="takes position ids, whose gaps flash"):
        vtr.reduced(by_position, "pyramiddrop", keep=9)
