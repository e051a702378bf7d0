"""Rotary frequencies that depend on the length of the prompt (dynamic NTK, LongRoPE): a removal leaves them those of the whole prompt.

The unreduced model keeps frequencies of earlier calls, so that both sides of every comparison are models that nobody has called before.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vtr
from tests import reference
from tests.caches import held
from tests.oracles import expected_of
from tests.probes import ByAttention, DropAll, EveryNth, Freeze, Ragged, TowerTop, recorded
from tests.tiny_models import Shot, batch_of, build
from vtr.testing.reference import keys_hidden

pytestmark = pytest.mark.usefixtures("no_gradients")
FP64 = torch.float64
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
MODELS: dict[str, tuple[str, str]] = {
    "InternVL, dynamic": ("internvl", "dynamic"),
    "LLaVA, dynamic": ("llava", "dynamic"),
    "LLaVA, LongRoPE": ("llava", "longrope"),
    "LLaVA with Phi-3": ("llava", "phi3"),
}
M_ROPE = {"Qwen2.5-VL, dynamic": ("qwen2_5_vl", "dynamic")}
ENDS_IN_TEXT = ((4, Shot(90, 40), 6), (3, Shot(96, 96), 2, Shot(70, 31), 3))
ENDS_IN_AN_IMAGE = ((4, Shot(90, 40), 6, Shot(48, 48)), (3, Shot(96, 96)))
PLANS = {
    "boundary": [EveryNth(stride=3)],
    "all": [DropAll()],
    "layers": [EveryNth(stride=2), EveryNth(stage="prefill", layer=2), DropAll(stage="prefill", layer=4)],
    "tower": [TowerTop(), ByAttention(keep=5)],
    "frozen": [EveryNth(stride=2), Freeze()],
}


def fresh(name: str, limit: int) -> Any:
    """A model that nobody has called, whose frequencies are fixed up to `limit` positions."""
    kind, rope = (MODELS | M_ROPE)[name]
    if kind == "qwen2_5_vl":
        scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        return build(kind, dtype=FP64, text={"max_position_embeddings": limit, "rope_parameters": scaling})
    if rope == "dynamic":
        scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        return build(kind, dtype=FP64, text={"max_position_embeddings": limit, "rope_parameters": scaling})
    text = {"rope_parameters": {**LONG, "original_max_position_embeddings": limit}, "max_position_embeddings": 4 * limit}
    if rope == "phi3":
        return build(kind, dtype=FP64, backbone="phi3", text={**text, "original_max_position_embeddings": limit})
    return build(kind, dtype=FP64, text={**text, "rope_parameters": {**text["rope_parameters"], "factor": 4.0}})


@pytest.mark.parametrize("name", MODELS | M_ROPE)
@pytest.mark.parametrize("rows", [ENDS_IN_TEXT, ENDS_IN_AN_IMAGE], ids=["text last", "image last"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_prompt_beyond_the_limit_is_exact(name, rows, plan):
    """The limit is below all that is left, or between that and the whole prompt."""
    batch = batch_of((MODELS | M_ROPE)[name][0], rows, dtype=FP64)
    for limit in (4, 40, 60):
        model = fresh(name, limit)
        with recorded() as choices, vtr.reduced(model, plan):
            logits = model(**batch.inputs, position_ids=batch.positions).logits
        expected = expected_of(batch, choices)
        expected.freeze = (1, 3) if isinstance(plan[-1], Freeze) else ()
        wanted = reference.masked_logits(fresh(name, limit), batch, expected)
        assert reference.difference(batch, expected.drops[-1][1], logits, wanted) < 1e-6


def masked_steps(model: Any, calls: list[dict[str, Tensor]], kept: list[tuple[int, Tensor]]) -> list[Tensor]:
    """Last logits of calls on one cache at full length.

    Args:
        model: unreduced.
        calls: arguments of every call.
        kept: (LLM layer, `(1, S)` bool over all calls, what is left from the input of that layer on).
    """
    layers, cache, before, found = model.model.language_model.layers, DynamicCache(config=model.config.get_text_config()), 0, []
    for call in calls:
        stop = before + call["input_ids"].shape[1]
        causal = torch.arange(before, stop)[:, None] >= torch.arange(stop)
        own = torch.arange(before, stop)[:, None] == torch.arange(stop)
        left, masks = torch.ones(1, stop, dtype=torch.bool), {}
        for number, layer in enumerate(layers):
            for at, keep in kept:
                left = left & keep[:, :stop] if at == number else left
            masks[layer] = ((causal & left[:, None]) | own)[:, None]
        with keys_hidden(masks):
            found.append(model(**call, position_ids=torch.arange(before, stop)[None], **held(cache)).logits[:, -1])
        before = stop
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("behind", [-15, -3, 2, 8], ids=["image", "prompt", "answer", "second turn"])
def test_decoding_and_a_second_turn_are_exact(name, behind):
    """The limit is crossed by each of these."""
    kind = MODELS[name][0]
    first, second = batch_of(kind, ((4, Shot(), 6),), dtype=FP64), batch_of(kind, ((3, Shot(), 2),), dtype=FP64, seed=3)
    words = torch.arange(5, 12)
    new = [{"input_ids": word.view(1, 1)} for word in words]
    calls = [first.inputs, *new[:4], second.inputs, *new[4:]]
    calls = [{key: value for key, value in call.items() if key != "attention_mask"} for call in calls]
    plan = [EveryNth(stride=3), DropAll(stage="prefill", layer=3)]
    limit = first.valid.shape[1] + behind

    model = fresh(name, limit)
    cache, before, logits = DynamicCache(config=model.config.get_text_config()), 0, []
    with recorded() as choices, vtr.reduced(model, plan):
        for call in calls:
            stop = before + call["input_ids"].shape[1]
            logits.append(model(**call, position_ids=torch.arange(before, stop)[None], **held(cache)).logits[:, -1])
            before = stop
    text = torch.ones(1, 4, dtype=torch.bool)
    turns = [expected_of(batch, choices[i : i + 2]).drops for batch, i in ((first, 0), (second, 2))]
    kept = [(a[0], torch.cat([a[1], text, b[1], text], 1)) for a, b in zip(*turns, strict=True)]
    for got, wanted in zip(logits, masked_steps(fresh(name, limit), calls, kept), strict=True):
        assert reference.largest(got, wanted) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_renumbered_in_front_of_the_llm_a_prompt_is_a_shorter_one(name):
    """An unreduced model that is given what is left, and nothing else, computes the same; so do the steps behind."""
    batch = batch_of(MODELS[name][0], ((4, Shot(), 6),), dtype=FP64)
    for limit in (4, 20, 40):
        model, other = fresh(name, limit), fresh(name, limit)
        with recorded() as choices, vtr.reduced(model, [Ragged(position_ids="renumber")]):
            answer = model.generate(**batch.inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
        keep = expected_of(batch, choices).drops[-1][1]
        embeds: list[Tensor] = []
        hook = other.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs, embeds=embeds: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        other(**batch.inputs)
        hook.remove()
        alone = fresh(name, limit)
        cache, logits = DynamicCache(config=alone.config.get_text_config()), []
        steps = [{"inputs_embeds": embeds[0][keep][None]}, *({"input_ids": word.view(1, 1)} for word in answer.sequences[0, -5:-1])]
        for step in steps:
            logits.append(alone(**step, **held(cache)).logits[:, -1])
        assert all(reference.largest(got, wanted) < 1e-6 for got, wanted in zip(answer.logits, logits, strict=True))


def test_frequencies_of_earlier_calls_are_left_as_the_unreduced_model_leaves_them():
    """Dynamic NTK keeps the longest length until a prompt is within the limit; the same calls leave the same."""
    batches = [batch_of("llava", ((4, Shot(), count),), dtype=FP64) for count in (60, 9, 30)]
    batches += [batch_of("llava", ((3, Shot()),), dtype=FP64)]
    model, other, plain = fresh("LLaVA, dynamic", 20), fresh("LLaVA, dynamic", 20), []
    for batch in batches:
        with recorded() as choices, vtr.reduced(model, PLANS["boundary"]):
            logits = model(**batch.inputs).logits
        expected = expected_of(batch, choices)
        wanted = reference.masked_logits(other, batch, expected)
        assert reference.difference(batch, expected.drops[-1][1], logits, wanted) < 1e-6
        plain.append(model.model.language_model.rotary_emb.inv_freq.clone())
    assert all(torch.equal(a, b) for a, b in pairwise(plain)), "all prompts are beyond the limit, the first is the longest"


def test_a_prompt_whose_rest_is_within_the_limit_forgets_earlier_calls():
    """What is left makes the model's module start anew, and the whole prompt counts from there on: as a model that nobody has called."""
    long, batch = batch_of("llava", ((4, Shot(), 60),), dtype=FP64), batch_of("llava", ((3, Shot()),), dtype=FP64)
    model, new = fresh("LLaVA, dynamic", 20), [{"input_ids": torch.tensor([[word]])} for word in (7, 8)]
    images = {key: value for key, value in batch.inputs.items() if key != "attention_mask"}
    cache, before, logits = DynamicCache(config=model.config.get_text_config()), 0, []
    with recorded() as choices, vtr.reduced(model, [DropAll()]):
        model(**long.inputs)
        del choices[:]
        for call in (images, *new):
            stop = before + call["input_ids"].shape[1]
            logits.append(model(**call, position_ids=torch.arange(before, stop)[None], **held(cache)).logits[:, -1])
            before = stop
    keep = torch.cat([expected_of(batch, choices).drops[-1][1], torch.ones(1, 2, dtype=torch.bool)], 1)
    wanted = masked_steps(fresh("LLaVA, dynamic", 20), [images, *new], [(0, keep)])
    for got, own in list(zip(logits, wanted, strict=True))[1:]:  # the last token of the first call is gone
        assert reference.largest(got, own) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_positions_renumbered_inside_the_llm_are_refused_beyond_the_limit(name):
    batch = batch_of(MODELS[name][0], ((4, Shot(), 6),), dtype=FP64)
    length, plan = batch.valid.shape[1], [EveryNth(stage="prefill", layer=2, position_ids="renumber")]
    model = fresh(name, length)
    with vtr.reduced(model, plan):
        model(**batch.inputs)
        with pytest.raises(vtr.VtrError, match=f"depend on the length beyond {length} tokens, got {length + 1}; use position_ids='keep'"):
            model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
    model = fresh(name, length - 1)
    with vtr.reduced(model, plan), pytest.raises(vtr.VtrError, match=f"beyond {length - 1} tokens, got {length}"):
        model(**batch.inputs)
