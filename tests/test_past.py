"""What a KV cache holds in front of a call: the caller's mask decides which of its keys are real, whatever is known of them."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vtr
from tests import oracles, reference, tiny_models
from tests.caches import held, output_cache
from tests.marks import quick_first
from tests.oracles import expected_of
from tests.probes import ByAttention, EveryNth, Freeze, KeepAll, MergePairs, TowerTop, recorded
from tests.tiny_models import Batch, Shot, batch_of, generate, model_of

pytestmark = pytest.mark.usefixtures("no_gradients")
FP64 = torch.float64
PLANS = {
    "boundary": [EveryNth(stride=3)],
    "attention": [ByAttention(keep=7)],
    "both": [EveryNth(stride=2), ByAttention(keep=5)],
    "tower": [TowerTop()],
    "merge": [MergePairs(), MergePairs(stage="prefill", layer=3)],
    "frozen": [EveryNth(stride=2), Freeze()],
}


def fresh(model) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())


def system(kind: str, batch: Batch, texts: tuple[int, ...]) -> tuple[Batch, Batch]:
    """Text-only rows of these lengths, left padded, and the same followed by `batch`."""
    first = batch_of(kind, tuple((n,) for n in texts), seed=77)
    inputs = {
        **batch.inputs,
        **{name: torch.cat([first.inputs[name], batch.inputs[name]], 1) for name in ("input_ids", "attention_mask")},
    }
    return first, Batch(kind, inputs, batch.shots)


def masked(model, whole: Batch, choices, plan, hide: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the full model at full length with what was removed, and what the caller hides, masked."""
    expected = expected_of(whole, choices)
    expected.freeze = (1, 3) if isinstance(plan[-1], Freeze) else ()
    if hide is not None:
        expected.drops.insert(0, (0, ~hide))
    return reference.masked_logits(model, whole, expected)


@pytest.mark.parametrize(("kind", "texts"), [("llava", (7, 7)), *((kind, (7, 3)) for kind in tiny_models.KINDS)])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_text_in_the_cache_is_seen(kind, plan, texts):
    """A cached system prompt, few-shot text, a first turn without an image."""
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, ((4, Shot(90, 40), 6), (3, Shot(96, 96), 2, Shot(70, 31), 5)), dtype=FP64)
    first, whole = system(kind, batch, texts)
    cache = fresh(model)
    model(**first.inputs, position_ids=first.positions, **held(cache))
    later = batch.changed(attention_mask=whole.inputs["attention_mask"])
    positions = whole.positions[:, -batch.valid.shape[1] :]
    with recorded() as choices, vtr.reduced(model, plan):
        logits = model(**later.inputs, position_ids=positions, **held(cache)).logits
    wanted = masked(model, whole, choices, plan)
    assert float((logits[:, -5:] - wanted[:, -5:]).abs().max()) < 1e-6


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_an_earlier_image_that_kept_everything_is_seen(plan):
    model = model_of("llava", dtype=FP64)
    first, second = (batch_of("llava", ((3, Shot(), 4),), dtype=FP64, seed=seed) for seed in (1, 2))
    whole = oracles.joined(first, second)
    with vtr.reduced(model, [KeepAll()]):
        cache = output_cache(model(**first.inputs))
    with recorded() as choices, vtr.reduced(model, plan):
        logits = model(**{**second.inputs, "attention_mask": whole.inputs["attention_mask"]}, **held(cache)).logits
    everything = list(range(36))
    for choice in choices:
        choice.retained.insert(0, everything)
        if any(choice.merged):
            choice.merged.insert(0, {})
    wanted = masked(model, whole, choices, plan)
    if not isinstance(plan[0], TowerTop) and plan[-1] != Freeze():  # those act on the first image of the joined prompt, too
        assert float((logits[:, -4:] - wanted[:, -4:]).abs().max()) < 1e-6


@pytest.mark.parametrize("width", ["whole", "keys"])
@pytest.mark.parametrize("plan", [PLANS["boundary"], PLANS["both"]])
def test_a_mask_that_hides_an_earlier_token_hides_it_later(plan, width):
    """The caller may hide text, or visual tokens, of an earlier turn: in a later turn and in every step of decoding."""
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", ((6, Shot(), 6),), dtype=FP64)
    second = torch.tensor([[11, 12, 13, 14]])
    whole = batch.followed_by(second)
    hidden = torch.zeros_like(whole.valid)
    hidden[:, 2:4] = True
    with recorded() as choices, vtr.reduced(model, plan):
        cache = fresh(model)
        model(**batch.inputs, **held(cache))
        found = []
        for i in range(4):
            mask = (~hidden)[:, : batch.valid.shape[1] + i + 1].long()
            if width == "keys":  # an own loop that counts what the cache holds
                mask = mask[:, -(cache.get_seq_length() + 1) :]
                mask[:, :6] = (~hidden)[:, :6].long()
            found.append(model(input_ids=second[:, i : i + 1], attention_mask=mask, **held(cache)).logits)
        turn_cache = fresh(model)
        model(**batch.inputs, **held(turn_cache))
        turn = model(input_ids=second, attention_mask=(~hidden).long(), **held(turn_cache)).logits
    expected = expected_of(whole, choices[: len(choices) // 2])
    plain = reference.masked_logits(model, whole, expected)
    assert float((plain[:, -4:] - turn).abs().max()) > 1e-3, "the reference without the hidden tokens differs"
    wanted = _hidden_for_the_new(model, whole, expected, hidden, 4)
    assert float((torch.cat(found, 1) - wanted).abs().max()) < 1e-6
    assert float((turn - wanted).abs().max()) < 1e-6


def _hidden_for_the_new(model, whole: Batch, expected, hidden: torch.Tensor, new: int) -> torch.Tensor:
    """The masked model in which only the last `new` tokens do not see the hidden ones: those in front were computed before."""
    late = torch.arange(whole.valid.shape[1]) >= whole.valid.shape[1] - new
    unseen = late[None, :, None] & hidden[:, None, :]
    return reference.masked_logits(model, whole, replace(expected, unseen=unseen))[:, -new:]


def test_a_mask_of_another_width_is_refused():
    model, batch = model_of("llava"), batch_of("llava", ((6, Shot(), 6),))
    with vtr.reduced(model, PLANS["boundary"]):
        cache = fresh(model)
        model(**batch.inputs, **held(cache))
        with pytest.raises(vtr.VtrError, match=r"attention_mask must have 49 columns .*got 30; pass the mask of the whole text"):
            model(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 30, dtype=torch.long), **held(cache))


def test_generate_goes_on_from_a_cached_system_prompt():
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", ((4, Shot(), 6),), dtype=FP64)
    first, whole = system("llava", batch, (7,))
    cache = fresh(model)
    model(**first.inputs, **held(cache))
    with vtr.reduced(model, [EveryNth(stride=3)]):  # what it chooses does not depend on text
        together = generate(model, whole, 5)
        cached = model.generate(**whole.inputs, **held(copy.deepcopy(cache)), max_new_tokens=5, do_sample=False)
    assert torch.equal(together.sequences, cached)


def test_text_in_a_static_cache_is_seen():
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", ((4, Shot(), 6),), dtype=FP64)
    first, whole = system("llava", batch, (7,))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
    model(**first.inputs, **held(cache))
    with recorded() as choices, vtr.reduced(model, PLANS["both"]):
        logits = model(**{**batch.inputs, "attention_mask": whole.inputs["attention_mask"]}, **held(cache)).logits
    wanted = masked(model, whole, choices, PLANS["both"])
    assert float((logits[:, -6:] - wanted[:, -6:]).abs().max()) < 1e-6


# ---- rows of a cache that are repeated, selected, reordered or copied


def after_image(model, batch: Batch) -> DynamicCache:
    cache = fresh(model)
    model(**batch.inputs, position_ids=batch.positions, **held(cache))
    return cache


def asked(model, batch: Batch, cache, rows: list[int], questions: torch.Tensor) -> torch.Tensor:
    mask = torch.cat([batch.inputs["attention_mask"][rows], torch.ones_like(questions)], 1)
    positions = (mask.cumsum(1) - 1)[:, -questions.shape[1] :]
    return model(input_ids=questions, attention_mask=mask, position_ids=positions, **held(cache)).logits


CHANGES = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "swap": (lambda cache: cache.batch_select_indices(torch.tensor([1, 0])), [1, 0]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "twice": (lambda cache: (cache.batch_repeat_interleave(2), cache.reorder_cache(torch.tensor([3, 0, 2, 1]))), [1, 0, 1, 0]),
}


@pytest.mark.parametrize(
    ("kind", "plan"),
    quick_first(
        [
            ("llava_next", PLANS["both"]),
            ("llava", [EveryNth(position_ids="renumber"), ByAttention(keep=5)]),
            ("llava", PLANS["boundary"]),
            ("llava_next", PLANS["merge"]),
        ],
        2,
    ),
)
@pytest.mark.parametrize(("change", "copied"), [*((change, False) for change in CHANGES), ("repeat", True), ("reorder", True)])
def test_the_state_follows_the_rows_of_its_cache(kind, plan, change, copied):
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, dtype=FP64)
    act, rows = CHANGES[change]
    questions = torch.tensor([[11, 12, 13], [21, 22, 23], [31, 32, 33], [41, 42, 43]])[: len(rows)]
    with vtr.reduced(model, plan):
        cache = after_image(model, batch)
        cache = copy.deepcopy(cache) if copied else cache
        act(cache)
        together = asked(model, batch, cache, rows, questions)
        alone = torch.cat(
            [asked(model, batch.row(row), after_image(model, batch.row(row)), [0], questions[i : i + 1]) for i, row in enumerate(rows)]
        )
    assert float((together - alone).abs().max()) < 1e-6


def test_rows_changed_by_hand_are_refused():
    model, batch = model_of("llava"), batch_of("llava", tiny_models.ONE_EACH)
    with vtr.reduced(model, PLANS["both"]):
        cache = after_image(model, batch)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:1], layer.values[:1]
        with pytest.raises(vtr.VtrError, match="reduced for 2 prompt rows, got 1; change its rows with the cache's own"):
            model(input_ids=torch.tensor([[5]]), **held(cache))


def test_a_shallow_copy_shares_the_state_of_its_original():
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", dtype=FP64)
    questions = torch.tensor([[11, 12], [21, 22]])
    with vtr.reduced(model, PLANS["both"]):
        cache = after_image(model, batch)
        expected = asked(model, batch, copy.deepcopy(cache), [0, 1], questions)
        assert torch.equal(asked(model, batch, copy.copy(cache), [0, 1], questions), expected)
        left = copy.copy(after_image(model, batch))
    with vtr.reduced(model, PLANS["both"]), pytest.raises(vtr.VtrError, match="shortened by a reduction that is removed"):
        asked(model, batch, left, [0, 1], questions)


@pytest.mark.parametrize(("plan", "columns"), [("both", 0), ("boundary", 46)])
@pytest.mark.parametrize("image", [False, True])
def test_a_cache_rebuilt_from_a_reduced_one_is_refused(plan, columns, image):
    """Its layers differ in length, or the mask is that of the whole text."""
    model, batch = model_of("llava"), batch_of("llava", ((4, Shot(), 6),))
    later = batch_of("llava", ((3, Shot(), 4) if image else (3,),), seed=3)
    with vtr.reduced(model, PLANS[plan]):
        cache, rebuilt = after_image(model, batch), fresh(model)
        for i, layer in enumerate(cache.layers):
            rebuilt.update(layer.keys, layer.values, i)
        mask = torch.ones(1, (columns or rebuilt.get_seq_length()) + later.valid.shape[1], dtype=torch.long)
        with pytest.raises(vtr.VtrError, match=r"a reduction shortened this KV cache \(.*but what was removed is not known"):
            model(**{**later.inputs, "attention_mask": mask}, **held(rebuilt))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("by_place", [False, True])
def test_the_language_model_itself_goes_on_from_a_reduced_cache(plan, by_place):
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", ((4, Shot(), 6),), dtype=FP64)
    ids, language = torch.tensor([[11, 12]]), model.model.language_model
    mask = batch.followed_by(ids).inputs["attention_mask"]
    with vtr.reduced(model, plan):
        cache = after_image(model, batch)
        wanted = model.model(input_ids=ids, attention_mask=mask, **held(copy.deepcopy(cache))).last_hidden_state
        by_ids = copy.deepcopy(cache)
        given = (ids, mask, None, by_ids) if by_place else ()
        found = language(*given, **({} if by_place else {"input_ids": ids, "attention_mask": mask, **held(by_ids)})).last_hidden_state
        embeds = model.get_input_embeddings()(ids)
        again = language(
            *((None, mask, None, cache, embeds) if by_place else ()),
            **({} if by_place else {"inputs_embeds": embeds, "attention_mask": mask, **held(cache)}),
        ).last_hidden_state
    assert float((found - wanted).abs().max()) < 1e-6 and float((again - wanted).abs().max()) < 1e-6
