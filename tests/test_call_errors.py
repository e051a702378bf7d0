"""Calls that cannot be served under a reduction are refused with what to do instead; what is allowed comes out in the right shape."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

import vtr
from tests import tiny_models
from tests.caches import held
from tests.fake_flash import flash_attention
from tests.probes import ByAttention, EveryNth, Freeze, KeepAll, MergePairs, Observe, Ragged, TowerTop
from tests.tiny_models import ONE, Shot, batch_of, build, generate, model_of
from vtr import Budget, Signal, VtrError

pytestmark = pytest.mark.usefixtures("no_gradients")

HALF = EveryNth(stride=2)
CHUNKED = (
    r"got rows with \[4\] placeholders for images of \[36\] tokens; pass every image .*, and no prefill_chunk_size \(a chunk would see part"
)


@pytest.fixture
def model():
    return model_of("llava")


# -- attention backends


@dataclass(frozen=True, kw_only=True)
class ProportionalMerge(MergePairs):
    default_budget: ClassVar[Budget | None] = None


def test_flash_attention_cannot_weigh_keys_by_size(model):
    with flash_attention(model), pytest.raises(VtrError, match=r"proportional.*attn_implementation='sdpa'"):
        vtr.apply(model, ProportionalMerge(stage="tower", layer=1)).remove()


def test_flash_attention_cannot_freeze_a_batch(model):
    batch = batch_of("llava")
    with flash_attention(model), pytest.raises(VtrError, match=r"attn_implementation='sdpa'"), vtr.reduced(model, [HALF, Freeze()]):
        model(**batch.inputs)


def test_a_sliding_window_shorter_than_the_prompt_is_refused():
    batch = batch_of("llava_qwen")  # 80 positions
    slides = {"use_sliding_window": True, "max_window_layers": 2, "layer_types": None}
    short, long = (build("llava_qwen", text={**slides, "sliding_window": window}) for window in (60, 400))
    with vtr.reduced(short, HALF), pytest.raises(VtrError, match=r"sliding.window.*60"):
        short(**batch.inputs)
    with vtr.reduced(long, HALF):
        long(**batch.inputs)


# -- calls


def test_full_history_on_a_reduced_cache_is_refused(model):
    first = batch_of("llava", ONE)
    second = batch_of("llava", ((3, Shot(), 4),), seed=5)
    both = {name: torch.cat([first.inputs[name], second.inputs[name]], 1) for name in ("input_ids", "attention_mask")}
    cache = DynamicCache(config=model.config.get_text_config())
    with vtr.reduced(model, HALF):
        model(**first.inputs, **held(cache))
        with pytest.raises(ValueError, match="pass only the new tokens"):
            model.generate(**both, pixel_values=second.inputs["pixel_values"], **held(cache), max_new_tokens=2, do_sample=False)


def test_chunked_prefill_is_refused(model):
    with vtr.reduced(model, HALF), pytest.raises(VtrError, match=CHUNKED):
        model.generate(**batch_of("llava", ONE).inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=8)


def test_a_clustering_that_finds_holes_in_its_grid_names_both_counts(model):
    plan = [TowerTop(layer=1), vtr.create_method("expedit", alpha=2)]
    message = r"expedit: needs the whole token grid of 6 x 6, got 12 tokens; it must come before methods that remove tokens in the tower"
    with vtr.reduced(model, plan), pytest.raises(VtrError, match=message):
        model(**batch_of("llava").inputs)


def test_a_second_prefill_on_a_static_cache_is_refused(model):
    first, second = batch_of("llava", ONE), batch_of("llava", ONE, seed=5)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    mask = torch.ones(1, 2 * first.valid.shape[1], dtype=torch.long)
    with vtr.reduced(model, HALF):
        model(**first.inputs, **held(cache))
        with pytest.raises(VtrError, match=r"static cache.*DynamicCache|static.*dynamic"):
            model(**{**second.inputs, "attention_mask": mask}, **held(cache))


def merged_outside(model, batch):
    """The call with features merged into the embeddings before the reduction, and where they are."""
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**batch.inputs)
    handle.remove()
    visual = batch.inputs["input_ids"] == tiny_models.IMAGE
    return {"inputs_embeds": seen[0], "attention_mask": batch.inputs["attention_mask"]}, visual


def test_embeddings_with_features_already_merged_are_refused(model):
    given, _ = merged_outside(model, batch_of("llava"))
    with (
        vtr.reduced(model, HALF),
        pytest.raises(VtrError, match=r"found none; if the features are merged already.*visual_positions=, a bool"),
    ):
        model(**given)


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        *(
            ("llava", plan, r"a tower method needs images encoded inside the reduction; pass pixel_values, not features made before")
            for plan in (TowerTop(), [TowerTop(), HALF])
        ),
        (
            "llava",
            Observe(signals=(Signal("cls_row", layer=1, tower=True),)),
            r"probe: needs cls_row of the tower, but these features were encoded outside; pass pixel_values",
        ),
        ("llava_next", HALF, r"llava_next: the image sizes of these features are unknown; pass pixel_values, or encode the images inside"),
    ],
    ids=["a tower step", "a tower step before another", "a tower signal", "AnyRes"],
)
def test_features_from_outside_are_refused_where_the_tower_or_the_sizes_are_needed(kind, method, message):
    model = model_of(kind)
    given, visual = merged_outside(model, batch_of(kind))
    with vtr.reduced(model, method), pytest.raises(VtrError, match=message):
        model(**given, visual_positions=visual)


def test_features_from_outside_of_another_length_name_both_counts(model):
    given, visual = merged_outside(model, batch_of("llava", ONE))
    visual[0, visual[0].nonzero()[-1]] = False
    with vtr.reduced(model, HALF), pytest.raises(VtrError, match=r"got rows with \[35\] placeholders for images of \[36\] tokens"):
        model(**given, visual_positions=visual)


def test_crops_without_image_sizes_are_refused():
    model, batch = model_of("llava_next"), batch_of("llava_next")
    inputs = {name: value for name, value in batch.inputs.items() if name != "image_sizes"}
    with (
        vtr.reduced(model, HALF),
        pytest.raises(
            VtrError, match=r"llava_next: image_sizes is needed to lay out the crops, got None; pass all outputs of the processor"
        ),
    ):
        model(**inputs)


def test_a_block_mask_is_refused(model):
    inputs = batch_of("llava", ONE).inputs
    length = inputs["input_ids"].shape[1]
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, length, length, device="cpu")
    with (
        vtr.reduced(model, HALF),
        pytest.raises(VtrError, match=r"cannot re-index an attention mask of type BlockMask; pass the 2-D mask of the processor"),
    ):
        model(**{**inputs, "attention_mask": mask})


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_wrong_number_of_images_is_an_error_and_the_next_call_is_clean(kind, count):
    model, batch = model_of(kind), batch_of(kind)
    broken = {name: value[:count] if name in ("pixel_values", "image_sizes") else value for name, value in batch.inputs.items()}
    with vtr.reduced(model, [TowerTop(), Ragged()]):
        expected = model(**batch.inputs).logits
        tokens = int((batch.inputs["input_ids"] == tiny_models.IMAGE).sum())
        with pytest.raises(ValueError, match=rf"Image features and image tokens do not match.*\b{tokens}\b"):  # transformers sees it first
            model(**broken)
        assert torch.equal(model(**batch.inputs).logits, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("plan", [[HALF], [TowerTop(), HALF]], ids=["boundary", "tower"])
def test_features_that_are_not_finite_are_neither_taken_for_removed_tokens_nor_hidden(model, value, plan):
    batch = batch_of("llava")
    broken = batch.inputs["pixel_values"].clone()
    broken[0] = value  # the only image of the first row
    with vtr.reduced(model, plan) as reduction:
        counts = []
        for pixels in (batch.inputs["pixel_values"], broken):
            logits = model(**{**batch.inputs, "pixel_values": pixels}).logits
            counts.append([len(image["retained"]) for image in reduction.report().to_dict()["images"]])
    assert counts[0] == counts[1]
    assert bool(logits[0, -1].isnan().all()), "the unreduced model answers NaN here"
    assert bool(logits[1, -1].isfinite().all())


def test_a_report_before_any_call_is_refused(model):
    with (
        vtr.reduced(model, HALF) as reduction,
        pytest.raises(VtrError, match=r"no prompt with an image has been run.*call generate or forward first"),
    ):
        reduction.report()


# -- allowed, and what comes out


def test_attentions_are_allowed_and_differ_in_length_by_layer():
    model, batch = model_of("llava", "eager"), batch_of("llava")
    with vtr.reduced(model, [HALF, EveryNth(stage="prefill", layer=2)]) as reduction:
        output = model(**batch.inputs, output_attentions=True, output_hidden_states=True)
    lengths = reduction.report().to_dict()["sequence_lengths"]
    assert [weights.shape[-1] for weights in output.attentions] == lengths and lengths[0] > lengths[2]
    assert output.hidden_states[-1].shape[1] == lengths[-1]


def test_logits_have_the_shortened_length(model):
    batch = batch_of("llava")
    with vtr.reduced(model, [KeepAll(), ByAttention(keep=3)]) as reduction:
        assert model(**batch.inputs).logits.shape[1] == reduction.report().to_dict()["sequence_lengths"][-1]
        assert model(**batch.inputs, logits_to_keep=1).logits.shape[1] == 1
        assert generate(model, batch, 2).sequences.shape[1] == batch.valid.shape[1] + 2
