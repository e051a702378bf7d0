"""What a mask or positions say beyond padding is done exactly or refused, never read as plain causal."""

from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vtr
from tests import tiny_models
from tests.caches import held
from tests.fake_flash import flash_attention
from tests.marks import quick_first
from tests.probes import ByAttention, EveryNth, KeepAll, TowerTop
from tests.tiny_models import PER_TOKEN, Shot, batch_of, model_of

pytestmark = pytest.mark.usefixtures("no_gradients")
FP64 = torch.float64
PLANS = ([EveryNth(stride=3)], [ByAttention(keep=7)], [TowerTop()])


def packed(kind: str = "llava") -> dict:
    """Two prompts in one row."""
    rows = [batch_of(kind, ((4, Shot(), 6),), dtype=FP64, seed=1), batch_of(kind, ((3, Shot(), 5),), dtype=FP64, seed=2)]
    made = {
        name: torch.cat([row.inputs[name] for row in rows], int(name in PER_TOKEN)) for name in rows[0].inputs if name != "attention_mask"
    }
    return {**made, "position_ids": torch.cat([row.positions for row in rows], -1)}


@pytest.mark.parametrize("plan", PLANS)
def test_packed_rows_are_refused_where_the_model_would_separate_them(plan):
    with vtr.reduced(model_of("llava", dtype=FP64), plan), pytest.raises(vtr.VtrError, match=r"position_ids that start again pack several"):
        model_of("llava", dtype=FP64)(**packed(), use_cache=False)


@pytest.mark.parametrize("plan", PLANS)
def test_packed_rows_are_refused_under_flash_attention(plan):
    model = model_of("llava", dtype=FP64)
    with flash_attention(model), vtr.reduced(model, plan), pytest.raises(vtr.VtrError, match=r"position_ids that start again pack several"):
        model(**packed())


@pytest.mark.parametrize("kind", quick_first(["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "glm4v"]))
@pytest.mark.parametrize("flash", [False, True])
def test_positions_of_the_text_in_front_of_rotary_ones_are_refused_as_the_model_separates_by_them(kind, flash):
    model, row = model_of(kind, dtype=FP64), packed(kind)
    alone = batch_of(kind, ((3, Shot(), 5),), dtype=FP64, seed=2)
    assert row["position_ids"].shape[0] == 4
    with flash_attention(model) if flash else nullcontext():
        separate = model(**row, use_cache=False).logits[:, -5:]
        assert float((separate - model(**alone.inputs, position_ids=alone.positions).logits[:, -5:]).abs().max()) < 1e-6
        with vtr.reduced(model, [EveryNth()]), pytest.raises(vtr.VtrError, match=r"position_ids that start again pack several"):
            model(**row, use_cache=False)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_arguments_that_pack_are_refused(name):
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", dtype=FP64)
    with vtr.reduced(model, [EveryNth()]), pytest.raises(vtr.VtrError, match=f"{name} packs several prompts into one row"):
        model(**batch.inputs, **{name: torch.tensor([0, 46])})


def test_positions_that_start_again_under_a_mask_or_a_cache_are_one_prompt_as_for_the_model():
    model, row = model_of("llava", dtype=FP64), packed()
    full = model(**row).logits  # makes a cache of its own: the model does not separate them either
    with vtr.reduced(model, [KeepAll()]):
        assert torch.equal(model(**row).logits, full)
    masked = {**row, "attention_mask": torch.ones_like(row["input_ids"])}
    with vtr.reduced(model, [EveryNth(stride=3)]):
        assert float((model(**row).logits - model(**masked, use_cache=False).logits).abs().max()) < 1e-6


def four_d(valid: torch.Tensor, block: int | None = None, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """A causal mask `(B, 1, S, S)` with padding, or one of two blocks."""
    length = valid.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None]
    if block is not None:
        mask[:, :, block:, :block] = False
    mask |= torch.eye(length, dtype=torch.bool)
    return mask if dtype == torch.bool else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.bool, FP64])
@pytest.mark.parametrize("plan", PLANS)
def test_a_4d_mask_of_padding_is_the_2d_mask(plan, dtype):
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", dtype=FP64)
    with vtr.reduced(model, plan):
        wanted = model(**batch.inputs, position_ids=batch.positions).logits
        got = model(**batch.changed(attention_mask=four_d(batch.valid, dtype=dtype)).inputs, position_ids=batch.positions).logits
    assert float((got - wanted)[:, -2:].abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bool, FP64])
@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_a_4d_mask_that_hides_more_is_refused(kind, dtype):
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, ((4, Shot(90, 40), 6),), dtype=FP64)
    mask = four_d(batch.valid, batch.valid.shape[1] - 3, dtype)
    with vtr.reduced(model, [EveryNth()]), pytest.raises(vtr.VtrError, match=r"4-D attention mask that hides more than padding"):
        model(**batch.changed(attention_mask=mask).inputs)


def test_a_4d_mask_behind_a_reduced_prompt_is_refused():
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", ((4, Shot(), 6),), dtype=FP64)
    with vtr.reduced(model, [EveryNth()]):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**batch.inputs, **held(cache))
        with pytest.raises(vtr.VtrError, match=r"4-D attention mask cannot be re-indexed behind a prompt that lost tokens"):
            model(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 1, 1, 47, dtype=torch.bool), **held(cache))


def test_a_custom_mask_over_a_static_cache_is_refused():
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", ((4, Shot(), 6),), dtype=FP64)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    mask = torch.nn.functional.pad(four_d(batch.valid, 43), (0, 64 - 46))
    with vtr.reduced(model, [EveryNth()]), pytest.raises(vtr.VtrError, match=r"4-D attention mask that hides more than padding"):
        model(**batch.changed(attention_mask=mask).inputs, **held(cache))
