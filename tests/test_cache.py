"""KV caches of a reduced model: several turns, interleaved conversations, cropping, static caches, beams."""

import gc
import pickle
import weakref
from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vtr
from tests import oracles, tiny_models
from tests.caches import held
from tests.probes import ByAttention, EveryNth, Freeze, Ragged
from tests.tiny_models import LAYERS, ONE, Batch, Shot, batch_of, generate, model_of
from vtr.types import VtrError

pytestmark = pytest.mark.usefixtures("no_gradients")

PLAN = [EveryNth(stride=3), EveryNth(stage="prefill", layer=2)]
FP64 = torch.float64


def conversation(kind: str, seed: int) -> tuple[Batch, Batch, Batch]:
    """A first turn with an image, a second with another, and both as one prompt."""
    first = batch_of(kind, ONE, dtype=FP64, seed=seed)
    second = batch_of(kind, ((3, Shot(40, 90), 4),), dtype=FP64, seed=seed + 1)
    return first, second, oracles.joined(first, second)


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_a_second_turn_without_position_ids_counts_on_from_the_original_length(kind):
    model = model_of(kind, dtype=FP64)
    first, second, both = conversation(kind, 3)
    with vtr.reduced(model, PLAN) as reduction:
        cache = DynamicCache(config=model.config.get_text_config())
        model(**first.inputs, **held(cache))
        later = second.changed(attention_mask=both.inputs["attention_mask"])
        turn = model(**later.inputs, **held(cache)).logits
        lengths = [cache.get_seq_length(layer) for layer in range(LAYERS)]
        whole = model(**both.inputs, **held(again := DynamicCache(config=model.config.get_text_config()))).logits
        assert lengths == [again.get_seq_length(layer) for layer in range(LAYERS)]
    assert float((turn - whole[:, -turn.shape[1] :]).abs().max()) < 1e-6
    assert len(reduction.report().to_dict()["images"]) == 2


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_a_second_turn_without_an_image_removes_nothing(kind):
    model = model_of(kind, dtype=FP64)
    first = batch_of(kind, ONE, dtype=FP64)
    second = batch_of(kind, ((6,),), seed=9)
    whole = first.followed_by(second.inputs["input_ids"])
    with vtr.reduced(model, PLAN):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**first.inputs, **held(cache))
        before = [cache.get_seq_length(layer) for layer in range(LAYERS)]
        turn = model(input_ids=second.inputs["input_ids"], attention_mask=whole.inputs["attention_mask"], **held(cache)).logits
        assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [length + 6 for length in before]
        expected = model(**whole.inputs).logits[:, -6:]
    assert float((turn - expected).abs().max()) < 1e-6


def test_two_conversations_on_one_model_do_not_mix():
    model = model_of("llava", dtype=FP64)
    talks = [conversation("llava", seed) for seed in (3, 13)]
    with vtr.reduced(model, PLAN):
        expected = [model(**both.inputs).logits[:, -4:] for _, _, both in talks]
        caches = [DynamicCache(config=model.config.get_text_config()) for _ in talks]
        for (first, _, _), cache in zip(talks, caches, strict=True):
            model(**first.inputs, **held(cache))
        for (_, second, both), cache, wanted in zip(talks, caches, expected, strict=True):
            later = second.changed(attention_mask=both.inputs["attention_mask"])
            got = model(**later.inputs, **held(cache)).logits[:, -4:]
            assert float((got - wanted).abs().max()) < 1e-6


def test_what_is_known_of_a_cache_dies_with_it():
    model, batch = model_of("llava"), batch_of("llava")
    with vtr.reduced(model, PLAN):
        model(**batch.inputs)
        gc.collect()
        before = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        for _ in range(5):
            generate(model, batch, 3)
        gc.collect()
        after = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    assert after - before < 60, f"{after - before} tensors are left of five calls"


def shortened(model, batch: Batch, cache=None, plan=tuple(PLAN)):
    """A cache that outlives the reduction it was filled under."""
    cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
    with vtr.reduced(model, list(plan)):
        model(**batch.inputs, **held(cache))
    return cache


@pytest.mark.parametrize("copy", [lambda cache: cache, deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("plan", [PLAN, PLAN[:1], PLAN[1:]])
def test_a_cache_does_not_go_on_without_its_reduction(plan, copy):
    model, batch = model_of("llava"), batch_of("llava", ONE)
    original = shortened(model, batch, plan=plan)
    cache = copy(original)
    lengths = [original.get_seq_length(layer) for layer in range(LAYERS)]
    text = {"input_ids": torch.tensor([[5, 6]]), **held(cache)}
    with pytest.raises(VtrError, match="shortened by a reduction that is removed since.*start with a new cache"):
        model(**text)
    with vtr.reduced(model, PLAN), pytest.raises(VtrError, match="shortened by a reduction that is removed"):
        model(**text)
    assert [known.get_seq_length(layer) for known in (cache, original) for layer in range(LAYERS)] == 2 * lengths, "still to be read"


def test_a_copy_of_a_cache_goes_on_like_the_original():
    model = model_of("llava", dtype=FP64)
    first, second, both = conversation("llava", 3)
    later = second.changed(attention_mask=both.inputs["attention_mask"])
    with vtr.reduced(model, PLAN):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**first.inputs, **held(cache))
        caches = [cache, deepcopy(cache), deepcopy(deepcopy(cache))]
        unused, stored = deepcopy(cache), pickle.loads(pickle.dumps(cache))
        expected, *logits = [model(**later.inputs, **held(known)).logits for known in caches]
        with pytest.raises(VtrError, match="or comes from a file"):
            model(**later.inputs, **held(stored))
    assert all(torch.equal(expected, own) for own in logits)
    for known in (*caches, unused):
        with pytest.raises(VtrError, match="shortened by a reduction"):
            model(**second.inputs, **held(known))


@pytest.mark.parametrize("static", [False, True])
def test_an_emptied_cache_is_like_any_other(static):
    model, batch = model_of("llava"), batch_of("llava", ONE)
    config = model.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=1024) if static else DynamicCache(config=config)
    shortened(model, batch, cache, PLAN[:1])
    if static:
        cache.reset()
    else:
        cache.crop(-cache.get_seq_length())
    fresh = StaticCache(config=config, max_cache_len=1024) if static else DynamicCache(config=config)
    expected = model(**batch.inputs, **held(fresh)).logits
    assert torch.equal(model(**batch.inputs, **held(cache)).logits, expected)
    assert vars(cache).keys() == vars(fresh).keys()


def test_only_a_shortened_cache_refuses_and_memory_is_freed_at_once():
    model, batch = model_of("llava"), batch_of("llava", ONE)
    frozen = shortened(model, batch, plan=[Freeze()])
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]), **held(frozen))
    gone = weakref.ref(shortened(model, batch))
    assert gone() is None, "nothing else holds the cache, no cycle either"


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_a_cropped_cache_goes_on_as_if_the_rest_had_not_been(kind):
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, dtype=FP64)
    one, two = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[11], [12]])
    with vtr.reduced(model, oracles.BOTH):
        expected = DynamicCache(config=model.config.get_text_config())
        cache = DynamicCache(config=model.config.get_text_config())
        for known in (expected, cache):
            model(**batch.inputs, position_ids=batch.positions, **held(known))
        longer = batch.followed_by(one)
        model(input_ids=one, attention_mask=longer.inputs["attention_mask"], position_ids=longer.positions[:, -3:], **held(cache))
        cache.crop(-3)
        after = batch.followed_by(two)
        arguments = {"attention_mask": after.inputs["attention_mask"], "position_ids": after.positions[:, -1:], "input_ids": two}
        a, b = (model(**arguments, **held(known)).logits for known in (expected, cache))
    assert float((a - b).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["llava", "llava_qwen"])
def test_prompt_lookup_equals_greedy_when_guesses_are_accepted(kind):
    """A prompt that repeats itself makes lookup propose, and reject, several tokens at once."""
    model = model_of(kind)
    batch = batch_of(kind, ONE)
    repeated = batch.followed_by(batch.inputs["input_ids"][:, -6:].repeat(1, 3))
    with vtr.reduced(model, [*oracles.BOTH, Freeze()]):
        greedy = generate(model, repeated, 12).sequences
        assert torch.equal(greedy, model.generate(**repeated.inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("kind", tiny_models.ALL_KINDS)
@pytest.mark.parametrize("plan", [oracles.BOTH, [Ragged(), Freeze()], [EveryNth(position_ids="renumber"), ByAttention(keep=5)]])
def test_a_static_cache_equals_a_dynamic_one(kind, plan):
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, dtype=FP64)
    with vtr.reduced(model, list(plan)):
        dynamic = generate(model, batch, 5)
        static = generate(model, batch, 5, cache_implementation="static", disable_compile=True)
    assert oracles.generations(dynamic, static, exact=True) < 1e-6


@pytest.mark.parametrize("kind", tiny_models.KINDS)
@pytest.mark.parametrize("settings", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "early_stopping": True}])
def test_beam_search_of_a_batch_equals_that_of_its_rows(kind, settings):
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, tiny_models.beam_rows(), dtype=FP64)
    with vtr.reduced(model, [Ragged(), ByAttention(keep=9)]) as reduction:
        together = generate(model, batch, 4, **settings).sequences[:, -4:]
        images = reduction.report().to_dict()["images"]
        alone = torch.cat([generate(model, batch.row(row), 4, **settings).sequences[:, -4:] for row in range(2)])
    assert torch.equal(together, alone)
    assert [(image["row"], image["image"]) for image in images] == [
        (row, image) for row, shots in enumerate(batch.shots) for image in range(len(shots))
    ], "beams are one row in the report"


def test_several_samples_of_a_prompt_are_reduced_alike():
    model, batch = model_of("llava"), batch_of("llava", tiny_models.beam_rows())
    with vtr.reduced(model, [Ragged(), ByAttention(keep=9)]) as reduction:
        torch.manual_seed(0)
        model.generate(**batch.inputs, max_new_tokens=3, do_sample=True, num_return_sequences=3)
        many = reduction.report()
        generate(model, batch, 3)
        assert many.to_dict()["images"] == reduction.report().to_dict()["images"]
        assert many.positions == reduction.report().positions
