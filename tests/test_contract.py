"""What every registered method promises, on every host. A new method is under contract before anybody writes a test for it.

By default every method runs on one host, and one method per mechanism on every host; the full product is marked slow.
"""

import json
from dataclasses import asdict, fields, replace
from functools import cache
from typing import Any

import pytest
import torch
import yaml

import vtr
from tests import tiny_models
from tests.caches import output_cache
from tests.tiny_models import LAYERS, WITH_TEXT_ONLY, Batch, batch_of, generate, model_of, most_tokens
from vtr.registry import method_class

NAMES = vtr.list_methods()
NEEDED = {"shortv": {"layers": (1, 3)}}
"""Settings without which a method refuses a model that it has no published list for."""
TINY = vtr.Geometry(
    host="llava", tower_layers=4, feature_layer=2, prefix_tokens=1, has_cls=True, patch_grid=(6, 6), llm_layers=5, most_tokens=36
)
SEEDED = {"todre": {"pivot": "random"}}
"""Settings with which a method is random, where its default is not."""
FP32, FP64 = torch.float32, torch.float64
KEEPS = (1, 7, 36)
LEAST = {"tome": 5, "resize": 1}
"""Fewest tokens per view that a method can leave with the tiny tower; fewer is refused (tested with the method)."""


def method_of(name: str, keep: int | None = None, kind: str = "llava") -> vtr.Method:
    """The method with its defaults, or with a budget where it has one: `keep`, or the fewest that it can leave on that kind of host."""
    least = LEAST.get(name, 0) * (5 if "next" in kind else 1)
    budget = {} if keep is None or not method_class(name).takes_budget else {"keep": max(keep, least)}
    return vtr.create_method(name, **NEEDED.get(name, {}), **budget)


def mechanism(name: str) -> tuple:
    """What a method does where; methods that share it stress the same code of a host."""
    return tuple(sorted({(step.stage, step.action) for step in method_of(name).steps(TINY)}))


def works_on(name: str, kind: str) -> bool:
    """Whether the card says that the method can run there."""
    card = method_class(name).card
    return not (card.needs_cls and "siglip" in kind) and not (card.needs_anyres and "next" not in kind)


def home(name: str) -> str:
    return next(kind for kind in tiny_models.ALL_KINDS if works_on(name, kind))


REPRESENTATIVES = {mechanism(name): name for name in reversed(NAMES)}.values()
PAIRS = [
    pytest.param(name, kind, id=f"{name}-{kind}", marks=() if kind == home(name) or name in REPRESENTATIVES else pytest.mark.slow)
    for name in NAMES
    for kind in tiny_models.ALL_KINDS
    if works_on(name, kind)
]
everywhere = pytest.mark.parametrize(("name", "kind"), PAIRS)


@torch.no_grad()
def run(name: str, batch: Batch, dtype: torch.dtype = FP32, keep: int | None = 7, method: vtr.Method | None = None, **arguments):
    """Logits and report of one reduced forward."""
    model = model_of(batch.kind, "sdpa", dtype)
    with vtr.reduced(model, method or method_of(name, keep, batch.kind)) as reduction:
        logits = model(**batch.to(dtype).inputs, **arguments).logits
        return logits, reduction.report()


def retained_of(report) -> list[list[int]]:
    return [image["retained"] for image in report.to_dict()["images"]]


@cache
def unreduced(kind: str, alone: bool) -> tuple[Batch, torch.Tensor, Any]:
    """A batch, or its second row alone, with the full model's logits and answer."""
    model, batch = model_of(kind), batch_of(kind)
    batch = batch.row(1) if alone else batch
    return batch, model(**batch.inputs, position_ids=batch.positions).logits, generate(model, batch)


@cache
def reduced_once(name: str, kind: str, keep: int) -> tuple[torch.Tensor, Any]:
    """`run` of a batch, for all tests that look at it or compare with it."""
    return run(name, batch_of(kind), keep=keep)


@everywhere
@pytest.mark.filterwarnings("ignore:.*keep.*")  # AnyRes: some images have fewer tokens than the most that one can have
@torch.no_grad()
def test_identity_equals_the_full_model_bit_for_bit(name, kind):
    model, method = model_of(kind), method_class(name).identity(most_tokens(kind))
    for alone in (False, True):
        batch, full, answer = unreduced(kind, alone)
        with vtr.reduced(model, method) as reduction:
            logits, again = model(**batch.inputs, position_ids=batch.positions).logits, generate(model, batch)
        if not any(retained_of(reduction.report())):  # keeps nothing: the prompt with its images cut out
            batch = without_images(batch)
            full, answer = model(**batch.inputs, position_ids=batch.positions).logits, generate(model, batch)
            again_tokens, answer_tokens = again.sequences[:, -5:], answer.sequences[:, -5:]
            real = batch.valid
            assert torch.equal(logits[real], full[real])
        else:
            again_tokens, answer_tokens = again.sequences, answer.sequences
            assert torch.equal(logits, full)
        assert torch.equal(again_tokens, answer_tokens)
        assert all(torch.equal(a, b) for a, b in zip(again.logits, answer.logits, strict=True))


def without_images(batch: Batch) -> Batch:
    """The same prompts with their images cut out, left padded."""
    rows = [ids[(ids != tiny_models.IMAGE) & real] for ids, real in zip(batch.inputs["input_ids"], batch.valid, strict=True)]
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((width - len(row),), tiny_models.PAD), row]) for row in rows])
    mask = torch.stack([torch.arange(width).ge(width - len(row)).long() for row in rows])
    return Batch(batch.kind, {"input_ids": ids, "attention_mask": mask}, ((),) * len(rows))


@everywhere
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.filterwarnings("ignore:.*keep.*")
def test_retained_is_what_was_asked_for(name, kind, keep):
    card, budgeted = method_class(name).card, method_class(name).takes_budget
    keep = method_of(name, keep, kind).keep
    adaptive = any(not step.counted for step in method_of(name).steps(TINY))  # removes more after the budget, where it sees fit
    batch = batch_of(kind)
    for image, count in zip(reduced_once(name, kind, keep)[1].to_dict()["images"], batch.counts(), strict=True):
        retained = image["retained"]
        assert image["visual_tokens"] == count
        assert retained == sorted(set(retained)), "not distinct or not in order"
        if not budgeted:
            assert len(retained) in (0, count)
        elif card.exact:
            assert min(keep, count) in (len(retained), *(image["per_layer"] if adaptive else ()))
        else:
            assert 0 < len(retained) <= min(keep, count)
        assert image["per_layer"][-1] == len(retained) and len(image["per_layer"]) == LAYERS


@everywhere
@torch.no_grad()
def test_an_exact_card_is_true_of_the_default_settings(name, kind):
    """Without a budget given, a method with `exact` leaves its default budget of every image; without a default each image decides."""
    cls, batch = method_class(name), batch_of(kind)
    method = method_of(name, None, kind)
    assert method.budget == cls.default_budget
    if not cls.takes_budget:
        assert cls.card.exact and method.budget is None, "there is no budget to miss"
    if cls.default_budget is None:
        removals = [step for step in method.steps(TINY) if step.action in ("remove", "merge")]
        assert not any(step.counted for step in removals) or not cls.takes_budget, f"{name} has no default, but its steps count on one"
        return
    adaptive = any(not step.counted for step in method.steps(TINY))
    if cls.card.exact:
        for image, count in zip(run(name, batch, method=method)[1].to_dict()["images"], batch.counts(), strict=True):
            assert cls.default_budget.resolve(count) in (len(image["retained"]), *(image["per_layer"] if adaptive else ()))


@everywhere
@torch.no_grad()
def test_tokens_are_removed_and_not_masked(name, kind):
    """The KV cache of every layer is as long as reported, before and after decoding."""
    model, batch = model_of(kind), batch_of(kind)
    with vtr.reduced(model, method_of(name, 7, kind)) as reduction:
        cache = output_cache(model(**batch.inputs, use_cache=True))
        report = reduction.report().to_dict()
        lengths = [cache.get_seq_length(layer) for layer in range(LAYERS)]
        after = output_cache(generate(model, batch, 4))
    assert lengths == report["sequence_lengths"]
    assert [after.get_seq_length(layer) - 3 for layer in range(LAYERS)] == lengths
    text = max(int((row & ~seen).sum()) for row, seen in zip(batch.valid, batch.visual, strict=True))
    if not report["images"][0]["retained"]:
        assert lengths[-1] == text


@everywhere
@torch.no_grad()
def test_text_tokens_are_untouched(name, kind):
    model, batch = model_of(kind), batch_of(kind)
    seen: list[torch.Tensor] = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(**batch.inputs)
        _, report = run(name, batch)
    finally:
        handle.remove()
    full, reduced = seen
    for row in range(2):
        text = (batch.valid & ~batch.visual)[row].nonzero()[:, 0]
        assert set(text.tolist()) <= set(report.positions[row]), "a text token is gone"
        column = 0  # in order and bit for bit
        for token in full[row, text]:
            found = (reduced[row, column:] == token).all(-1).nonzero()
            assert len(found), "a text token has changed or moved"
            column += int(found[0]) + 1


@cache
@torch.no_grad()
def by_itself(name: str, kind: str, row: int) -> tuple[torch.Tensor, Any]:
    """Logits and report of one prompt by itself; nothing is reported of one without an image."""
    batch = batch_of(kind, WITH_TEXT_ONLY, dtype=FP64).row(row)
    if batch.shots[0]:
        return run(name, batch, FP64)
    model = model_of(kind, "sdpa", FP64)
    with vtr.reduced(model, method_of(name, 7, kind)):
        return model(**batch.inputs).logits, None


@everywhere
@pytest.mark.parametrize("pad", ["left", "right"])
def test_neighbours_and_padding_change_nothing(name, kind, pad):
    batch = batch_of(kind, WITH_TEXT_ONLY, pad, FP64)
    logits, report = run(name, batch, FP64, position_ids=batch.positions)
    together = retained_of(report)
    for row in range(3):
        single, said = by_itself(name, kind, row)
        start = sum(len(shots) for shots in batch.shots[:row])
        if batch.shots[row]:
            assert retained_of(said) == together[start : start + len(batch.shots[row])]
            assert list(said.positions[0]) == [p - int(batch.valid[row].long().argmax()) for p in report.positions[row]]
        behind = int((~batch.valid[row].flip(0)).long().cumprod(0).sum())
        mine = logits[row, logits.shape[1] - behind - single.shape[1] : logits.shape[1] - behind]
        torch.testing.assert_close(mine, single[0], atol=1e-6, rtol=0)


@everywhere
def test_same_settings_same_result(name, kind):
    (first, said), (second, again) = reduced_once(name, kind, 7), run(name, batch_of(kind))
    assert torch.equal(first, second) and retained_of(said) == retained_of(again)


@pytest.mark.parametrize("name", [n for n in NAMES if "seed" in {f.name for f in fields(method_class(n))}])
def test_another_seed_gives_another_result(name):
    changed = False
    for kind in (k for k in tiny_models.KINDS if works_on(name, k)):  # some use chance only where there is no CLS token
        methods = [replace(method_of(name, 7, kind), seed=seed, **SEEDED.get(name, {})) for seed in (0, 1, 0)]
        found = [retained_of(run(name, batch_of(kind), method=method)[1]) for method in methods]
        assert found[0] == found[2]
        changed |= found[0] != found[1]
    assert changed


@everywhere
def test_inputs_are_not_modified(name, kind):
    batch = batch_of(kind)
    before = {key: value.clone() for key, value in batch.inputs.items()}
    run(name, batch)
    assert all(torch.equal(before[key], value) for key, value in batch.inputs.items())


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_runs(name, kind, dtype):
    model, batch = model_of(kind, "sdpa", dtype), batch_of(kind, dtype=dtype)
    logits, report = run(name, batch, dtype)
    assert logits.dtype == dtype and bool(logits[:, -1].isfinite().all())
    counts = [len(ids) for ids in retained_of(report)]
    assert counts == [len(ids) for ids in retained_of(reduced_once(name, kind, 7)[1])]
    with vtr.reduced(model, method_of(name, 7, kind)):
        generate(model, batch, 2)


@everywhere
@torch.no_grad()
def test_nothing_is_left_behind(name, kind):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    batch, full, _ = unreduced(kind, False)  # generate leaves attributes of its own
    model = model_of(kind)
    before = tiny_models.snapshot(model)

    def same() -> bool:
        clean = type(ALL_ATTENTION_FUNCTIONS) is AttentionInterface and not ALL_ATTENTION_FUNCTIONS._local_mapping
        return (
            clean
            and tiny_models.snapshot(model) == before
            and torch.equal(model(**batch.inputs, position_ids=batch.positions).logits, full)
        )

    with vtr.reduced(model, method_of(name, 7, kind)):
        generate(model, batch, 2)
    assert same(), "after the block"
    with pytest.raises(ZeroDivisionError), vtr.reduced(model, method_of(name, 7, kind)):
        model(**batch.inputs)
        _ = 1 / 0
    assert same(), "after an exception in the block"
    with pytest.raises(ValueError), vtr.reduced(model, method_of(name, 7, kind)):
        model(**{**batch.inputs, "pixel_values": batch.inputs["pixel_values"][:1]})
    assert same(), "after an exception in the model"


@everywhere
@torch.no_grad()
def test_a_failed_call_does_not_disturb_the_next(name, kind):
    model, batch = model_of(kind), batch_of(kind)
    expected, _ = reduced_once(name, kind, 7)
    with vtr.reduced(model, method_of(name, 7, kind)):
        with pytest.raises(ValueError):
            model(**{**batch.inputs, "pixel_values": batch.inputs["pixel_values"][:1]})
        assert torch.equal(model(**batch.inputs).logits, expected)


@everywhere
@torch.no_grad()
def test_a_call_without_images_is_bit_identical(name, kind):
    model, batch = model_of(kind), batch_of(kind, ((9,), (4,)))
    full = model(**batch.inputs).logits
    with vtr.reduced(model, method_of(name, 7, kind)):
        assert torch.equal(model(**batch.inputs).logits, full)


@everywhere
def test_the_report_is_json_and_outlives_the_reduction(name, kind):
    _, report = reduced_once(name, kind, 7)
    told = report.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert [(image["row"], image["image"]) for image in told["images"]] == [(0, 0), (1, 0), (1, 1)]
    assert [image["patch_grid"] for image in told["images"]] == [[6, 6]] * 3
    assert len(told["sequence_lengths"]) == LAYERS and told["choosing_ms"] >= 0
    mean = sum(sum(image["per_layer"]) for image in told["images"]) / LAYERS / 3
    assert told["average_keep"] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_host_that_lacks_what_the_card_needs_is_refused(name):
    for kind in tiny_models.ALL_KINDS:
        if not works_on(name, kind):
            with pytest.raises(vtr.VtrError, match=name):
                vtr.apply(model_of(kind), method_of(name, 7, kind)).remove()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [None, 7])
def test_settings_survive_yaml_and_json(name, keep):
    for method in (method_of(name, keep), method_class(name).identity(36)):
        settings = asdict(method)
        for text in (yaml.safe_load(yaml.safe_dump(settings)), json.loads(json.dumps(settings))):
            assert vtr.create_method(name, **text) == method
        hash(method)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_there_is(name):
    cls = method_class(name)
    assert cls.card.title and cls.card.paper and cls.stages and cls.__doc__
    own = {f.name for f in fields(cls)} - {f.name for f in fields(vtr.Method)}
    assert own <= set(cls.card.settings), f"settings without a meaning on the card: {own - set(cls.card.settings)}"
    assert cls.card.arxiv or cls.card.ours or cls.card.code, "no citation"


@pytest.mark.parametrize("name", NAMES)
def test_its_stages_are_where_its_steps_are(name):
    assert {step.stage for step in method_of(name).steps(TINY)} <= set(method_class(name).stages)
