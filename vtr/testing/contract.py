"""What every method promises, as functions: `CONTRACT` is name -> check of a method on one kind of model, `FACTS` needs no model.

A check raises `Broken`, an AssertionError whose message is `method: rule, got value; what to do`. `vtr.testing.check_method` runs all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import torch
import yaml

from vtr.hosts._versions import output_cache
from vtr.registry import create_method
from vtr.testing.families import LAYERS
from vtr.testing.given import apply, reduced
from vtr.testing.subject import TINY, Broken, Subject, require, retained_of, without_images
from vtr.testing.tiny_models import (
    ALL_KINDS,
    ANSWER,
    FAMILIES,
    KINDS,
    PIXELS_OF,
    WITH_TEXT_ONLY,
    Batch,
    batch_of,
    generate,
    model_of,
    most_tokens,
    snapshot,
)
from vtr.types import Method, VtrError

FP64 = torch.float64
KEEPS = (1, 7, 36)

Check = Callable[[Subject, str], None]


@torch.no_grad()
def identity_equals_the_full_model(subject: Subject, kind: str) -> None:
    """The settings of `identity(n)` equal the full model bit for bit, a batch and a single prompt, forward and generate."""
    model, method = model_of(kind), subject.cls.identity(most_tokens(kind))
    rule = f"identity({most_tokens(kind)}) must equal the full model bit for bit"
    way_out = "return from `identity` settings that change nothing, and leave out steps with nothing to remove"
    for alone in (False, True):
        batch, full, answer = subject.unreduced(kind, alone)
        with reduced(model, method) as reduction:
            logits, again = model(**batch.inputs, position_ids=batch.positions).logits, generate(model, batch)
        if not any(retained_of(reduction.report())):  # keeps nothing: the prompt with its images cut out
            batch = without_images(batch)
            full, answer = model(**batch.inputs, position_ids=batch.positions).logits, generate(model, batch)
            again_tokens, answer_tokens = again.sequences[:, -ANSWER:], answer.sequences[:, -ANSWER:]
            same = torch.equal(logits[batch.valid], full[batch.valid])
        else:
            again_tokens, answer_tokens = again.sequences, answer.sequences
            same = torch.equal(logits, full)
        require(same, subject, f"{rule}, got other logits", way_out)
        require(torch.equal(again_tokens, answer_tokens), subject, f"{rule}, got another answer", way_out)
        same = all(torch.equal(a, b) for a, b in zip(again.logits, answer.logits, strict=True))
        require(same, subject, f"{rule}, got other logits while generating", way_out)


def retained_is_what_was_asked_for(subject: Subject, kind: str, keep: int) -> None:
    """With a budget, every image keeps exactly so many tokens, fewer only where it has fewer; the report says the same."""
    card, budgeted, wanted = subject.cls.card, subject.cls.takes_budget, subject.method(keep, kind).keep
    for image, count in zip(subject.reduced_once(kind, wanted)[1].to_dict()["images"], batch_of(kind).counts(), strict=True):
        retained, layers = image["retained"], image["per_layer"]
        require(image["visual_tokens"] == count, subject, f"the report must name {count} visual tokens, got {image['visual_tokens']}")
        require(
            retained == sorted(set(retained)),
            subject,
            f"retained patches must be distinct and ascending, got {retained}",
            "keep each token once",
        )
        got = f"of {count} tokens, got {len(retained)}"
        if not budgeted:
            require(len(retained) in (0, count), subject, f"a method without a budget must keep all tokens or none {got}")
        elif card.exact:
            fits = min(wanted or 0, count) in (len(retained), *(layers if subject.adaptive else ()))
            require(
                fits, subject, f"keep={wanted} must leave {min(wanted or 0, count)} {got}", "keep `view.keep` of each row, see topk_mask"
            )
        else:
            require(0 < len(retained) <= min(wanted or 0, count), subject, f"keep={wanted} must leave 1 to {wanted} {got}")
        told = layers[-1] == len(retained) and len(layers) == LAYERS
        require(told, subject, f"per_layer must end at {len(retained)} and have {LAYERS} entries, got {layers}")


@torch.no_grad()
def an_exact_card_is_true_of_the_default_settings(subject: Subject, kind: str) -> None:
    """Without a budget given, a method with `exact` leaves its default budget of every image; without a default each image decides."""
    cls, method = subject.cls, subject.method(None, kind)
    require(method.budget == cls.default_budget, subject, f"without a setting the budget must be {cls.default_budget}, got {method.budget}")
    if not cls.takes_budget:
        fits = cls.card.exact and method.budget is None
        require(fits, subject, f"a card may say exact=False only with a budget to miss, got {cls.card.exact=}", "leave it out")
    if cls.default_budget is None:
        counted = any(step.counted for step in method.steps(TINY) if step.action in ("remove", "merge"))
        rule = "a method without a default budget must decide itself how much stays, got steps that count on one"
        require(not counted or not cls.takes_budget, subject, rule, "write counted=False, or give the class a default_budget")
    elif cls.card.exact:
        _, report = subject.run(batch_of(kind), method=method)
        for image, count in zip(report.to_dict()["images"], batch_of(kind).counts(), strict=True):
            wanted = cls.default_budget.resolve(count)
            left = (len(image["retained"]), *(image["per_layer"] if subject.adaptive else ()))
            require(
                wanted in left,
                subject,
                f"the default must leave {wanted} of {count} tokens, got {left[0]}",
                "or say exact=False on the card",
            )


@torch.no_grad()
def tokens_are_removed_and_not_masked(subject: Subject, kind: str) -> None:
    """The KV cache of every layer is as long as reported, before and after decoding."""
    model, batch = model_of(kind), batch_of(kind)
    with reduced(model, subject.method(7, kind)) as reduction:
        cache = output_cache(model(**batch.inputs, use_cache=True))
        report, wanted = reduction.report().to_dict(), reduction.report().cache_lengths
        lengths = [cache.get_seq_length(layer) for layer in range(LAYERS)]
        after = output_cache(generate(model, batch, 4))
    require(lengths == wanted, subject, f"the KV cache must be as long as reported, {wanted}, got {lengths}")
    grown = [after.get_seq_length(layer) - 3 for layer in range(LAYERS)]
    require(grown == lengths, subject, f"decoding must add one entry per token to {lengths}, got {grown} without them")
    text = max(int((row & ~seen).sum()) for row, seen in zip(batch.valid, batch.visual, strict=True))
    empty = not report["images"][0]["retained"]
    require(not empty or lengths[-1] == text, subject, f"with nothing visual left {text} tokens must be, got {lengths[-1]}")


@torch.no_grad()
def text_tokens_are_untouched(subject: Subject, kind: str) -> None:
    """All text tokens enter the LLM in order and bit for bit, and are at every layer."""
    model, batch, seen = model_of(kind), batch_of(kind), list[torch.Tensor]()
    handle = FAMILIES[kind].language(model).layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(**batch.inputs)
        _, report = subject.run(batch)
    finally:
        handle.remove()
    full, shorter = seen
    for row in range(2):
        text = (batch.valid & ~batch.visual)[row].nonzero()[:, 0]
        gone = set(text.tolist()) - set(report.positions[row])
        require(not gone, subject, f"all text tokens must stay, got none at {sorted(gone)}", "choose among `view.real` only")
        column = 0
        for token in full[row, text]:
            found = (shorter[row, column:] == token).all(-1).nonzero()
            require(bool(len(found)), subject, "text tokens must stay as they are and in order, got a changed or moved one")
            column += int(found[0]) + 1


@torch.no_grad()
def neighbours_and_padding_change_nothing(subject: Subject, kind: str, pad: str) -> None:
    """A prompt gives the same alone and in a padded batch, beside a prompt without an image and one with two; in float64."""
    batch = batch_of(kind, WITH_TEXT_ONLY, pad, FP64)
    logits, report = subject.run(batch, position_ids=batch.positions)
    together = retained_of(report)
    way_out = "let nothing in `select` depend on other rows, on what is not `view.real`, or on the global random state"
    for row in range(3):
        single, said = subject.by_itself(kind, row)
        start = sum(len(shots) for shots in batch.shots[:row])
        if batch.shots[row]:
            mine = together[start : start + len(batch.shots[row])]
            alone = retained_of(said)
            require(
                alone == mine, subject, f"a prompt must keep in a batch ({pad} padding) what it keeps alone, {alone}, got {mine}", way_out
            )
            places = [p - int(batch.valid[row].long().argmax()) for p in report.positions[row]]
            require(list(said.positions[0]) == places, subject, f"survivors must be those of the prompt alone, got {places}", way_out)
        behind = int((~batch.valid[row].flip(0)).long().cumprod(0).sum())
        own = logits[row, logits.shape[1] - behind - single.shape[1] : logits.shape[1] - behind]
        apart = float((own - single[0]).abs().max())
        require(apart <= 1e-6, subject, f"logits must be those of the prompt alone ({pad} padding), got {apart:.1e} of difference", way_out)


def same_settings_same_result(subject: Subject, kind: str) -> None:
    """Two runs give the same logits and retained tokens, bit for bit."""
    (first, said), (second, again) = subject.reduced_once(kind, 7), subject.run(batch_of(kind))
    same = torch.equal(first, second) and retained_of(said) == retained_of(again)
    require(same, subject, "two runs must give the same, got another result", "take chance from `view.checksum` and a `seed` setting")


def inputs_are_not_modified(subject: Subject, kind: str) -> None:
    """The caller's tensors are as before."""
    batch = batch_of(kind)
    before = {key: value.clone() for key, value in batch.inputs.items()}
    subject.run(batch)
    changed = [key for key, value in batch.inputs.items() if not torch.equal(before[key], value)]
    require(
        not changed, subject, f"inputs must stay as they are, got a changed {', '.join(changed)}", "write to no tensor of the view in place"
    )


@torch.no_grad()
def half_precision_runs(subject: Subject, kind: str, dtype: torch.dtype) -> None:
    """float16 and bfloat16 models run, with finite logits of that dtype and as many tokens left."""
    model, batch = model_of(kind, "sdpa", dtype), batch_of(kind, dtype=dtype)
    logits, report = subject.run(batch)
    fine = logits.dtype == dtype and bool(logits[:, -1].isfinite().all())
    require(
        fine, subject, f"logits must be finite {dtype}, got {logits.dtype}", "compute scores in float32, return values in the view's dtype"
    )
    counts, wanted = ([len(ids) for ids in retained_of(r)] for r in (report, subject.reduced_once(kind, 7)[1]))
    require(counts == wanted, subject, f"{dtype} must leave as many tokens as float32, {wanted}, got {counts}")
    with reduced(model, subject.method(7, kind)):
        generate(model, batch, 2)


@torch.no_grad()
def nothing_is_left_behind(subject: Subject, kind: str) -> None:
    """After the block, also after an exception in it or in the model, modules, hooks, registries and outputs are as before."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    batch, full, _ = subject.unreduced(kind, False)  # generate leaves attributes of its own
    model, method, before = model_of(kind), subject.method(7, kind), snapshot(model_of(kind))

    def same(when: str) -> None:
        clean = type(ALL_ATTENTION_FUNCTIONS) is AttentionInterface and not ALL_ATTENTION_FUNCTIONS._local_mapping
        clean = clean and snapshot(model) == before and torch.equal(model(**batch.inputs, position_ids=batch.positions).logits, full)
        require(
            clean, subject, f"the model must be as before {when}, got a changed one", "register no hooks and change no module in a method"
        )

    with reduced(model, method):
        generate(model, batch, 2)
    same("after the block")
    try:
        with reduced(model, method):
            model(**batch.inputs)
            raise ZeroDivisionError
    except ZeroDivisionError:
        same("after an exception in the block")
    _fails_for_want_of_an_image(subject, batch, lambda inputs: _within(model, method, inputs))
    same("after an exception in the model")


@torch.no_grad()
def a_failed_call_does_not_disturb_the_next(subject: Subject, kind: str) -> None:
    """After an exception inside the block the next call gives the same as without it."""
    model, batch = model_of(kind), batch_of(kind)
    expected, _ = subject.reduced_once(kind, 7)
    with reduced(model, subject.method(7, kind)):
        _fails_for_want_of_an_image(subject, batch, lambda inputs: model(**inputs))
        same = torch.equal(model(**batch.inputs).logits, expected)
    require(
        same, subject, "a call after a failed one must give the same, got other logits", "keep nothing between calls but in `view.memory`"
    )


def _within(model: Any, method: Method, inputs: dict[str, Any]) -> None:
    with reduced(model, method):
        model(**inputs)


def _fails_for_want_of_an_image(subject: Subject, batch: Batch, call: Callable[[dict[str, Any]], Any]) -> None:
    name = next(name for name in PIXELS_OF.values() if name in batch.inputs)
    try:
        call({**batch.inputs, name: batch.inputs[name][:1]})
    except ValueError:
        return
    raise Broken(subject, "a call with two images too few must raise a ValueError, got a result")


@torch.no_grad()
def a_call_without_images_is_bit_identical(subject: Subject, kind: str) -> None:
    """Prompts of text alone give what the full model gives."""
    model, batch = model_of(kind), batch_of(kind, ((9,), (4,)))
    full = model(**batch.inputs).logits
    with reduced(model, subject.method(7, kind)):
        same = torch.equal(model(**batch.inputs).logits, full)
    require(same, subject, "a call without images must equal the full model, got other logits")


def the_report_is_json_and_outlives_the_reduction(subject: Subject, kind: str) -> None:
    """The report survives JSON after the block, with every image, every layer and their mean."""
    told = subject.reduced_once(kind, 7)[1].to_dict()
    require(json.loads(json.dumps(told)) == told, subject, "the report must survive JSON, got another one back")
    order = [(image["row"], image["image"]) for image in told["images"]]
    require(order == [(0, 0), (1, 0), (1, 1)], subject, f"the report must list the images row by row, got {order}")
    grids = [image["patch_grid"] for image in told["images"]]
    wanted = [list(FAMILIES[kind].grids(shot)[0]) for row in batch_of(kind).shots for shot in row]
    require(grids == wanted, subject, f"the report must have the grid of each image, {wanted}, got {grids}")
    fits = len(told["sequence_lengths"]) == LAYERS and told["choosing_ms"] >= 0
    require(fits, subject, f"the report must have {LAYERS} sequence_lengths and a time, got {told['sequence_lengths']}")
    mean = sum(sum(image["per_layer"]) for image in told["images"]) / LAYERS / 3
    require(abs(told["average_keep"] - mean) < 1e-6, subject, f"average_keep must be {mean:g}, got {told['average_keep']}")


def another_seed_gives_another_result(subject: Subject) -> None:
    """Where there is a setting `seed`, another one changes what is kept, and the same one does not."""
    if "seed" not in {f.name for f in fields(subject.cls)}:
        return
    changed = False
    for kind in filter(subject.works_on, KINDS):  # some use chance only where there is no CLS token
        methods = [replace(subject.method(7, kind), **{**subject.random, "seed": seed}) for seed in (0, 1, 0)]
        found = [retained_of(subject.run(batch_of(kind), method=method)[1]) for method in methods]
        require(found[0] == found[2], subject, "the same seed must keep the same tokens, got others")
        changed |= found[0] != found[1]
    way_out = "if chance needs another setting, give it, for example `--set pivot=random`"
    require(changed, subject, "another seed must keep other tokens, got the same", way_out)


def a_host_that_lacks_what_the_card_needs_is_refused(subject: Subject) -> None:
    """Where the card says that a CLS token or AnyRes is needed, a model without is refused with the method's name."""
    for kind in ALL_KINDS:
        if subject.works_on(kind):
            continue
        try:
            apply(model_of(kind), subject.method(7, kind)).remove()
        except VtrError as error:
            require(subject.cls.name in str(error), subject, f"the refusal must name the method, got {str(error)!r}")
        else:
            raise Broken(subject, f"a model without what the card needs ({kind}) must be refused, got a reduction", "correct the card")


def settings_survive_yaml_and_json(subject: Subject) -> None:
    """`asdict` goes through YAML and JSON and back, and a method can be hashed."""
    for method in (subject.method(None), subject.method(7), subject.cls.identity(36)):
        settings = asdict(method)
        for form, text in (("YAML", yaml.safe_load(yaml.safe_dump(settings))), ("JSON", json.loads(json.dumps(settings)))):
            again = create_method(subject.cls.name, **text) if subject.registered else subject.cls(**text)
            require(
                again == method, subject, f"settings must survive {form}, {method}, got {again}", "make a tuple of what may come as a list"
            )
        hash(method)


def the_card_says_what_there_is(subject: Subject) -> None:
    """Title, paper, stages, a docstring, a citation, and a meaning of every setting."""
    cls = subject.cls
    missing = [
        what for what, there in (("card.title", cls.card.title), ("card.paper", cls.card.paper), ("stages", cls.stages)) if not there
    ]
    missing += [] if cls.__doc__ else ["a docstring"]
    require(not missing, subject, f"the class must say what it is, got no {', '.join(missing)}", "see vtr.Card")
    unsaid = {f.name for f in fields(cls)} - {f.name for f in fields(Method)} - set(cls.card.settings)
    require(not unsaid, subject, f"card.settings must explain every setting, got nothing on {', '.join(sorted(unsaid))}")
    cited = bool(cls.card.arxiv or cls.card.ours or cls.card.code)
    require(cited, subject, "the card must cite, got neither arxiv nor code", "give arxiv= or code=, or ours=True")


def stages_are_where_its_steps_are(subject: Subject) -> None:
    """`stages` of the class names the stage of every step."""
    found = {step.stage for step in subject.method(None).steps(TINY)} - set(subject.cls.stages)
    require(not found, subject, f"stages must name where its steps are, got none for {', '.join(sorted(found))}", "add it to `stages`")


CONTRACT: dict[str, Check] = {
    "identity equals the full model": identity_equals_the_full_model,
    **{f"retained is what was asked for, keep={keep}": partial(retained_is_what_was_asked_for, keep=keep) for keep in KEEPS},
    "an exact card is true of the defaults": an_exact_card_is_true_of_the_default_settings,
    "tokens are removed, not masked": tokens_are_removed_and_not_masked,
    "text tokens are untouched": text_tokens_are_untouched,
    **{
        f"neighbours and {pad} padding change nothing": partial(neighbours_and_padding_change_nothing, pad=pad) for pad in ("left", "right")
    },
    "same settings, same result": same_settings_same_result,
    "inputs are not modified": inputs_are_not_modified,
    **{f"{str(dtype)[6:]} runs": partial(half_precision_runs, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)},
    "nothing is left behind": nothing_is_left_behind,
    "a failed call does not disturb the next": a_failed_call_does_not_disturb_the_next,
    "a call without images is the full model": a_call_without_images_is_bit_identical,
    "the report is JSON and outlives the reduction": the_report_is_json_and_outlives_the_reduction,
}
"""Name -> check of a method on a kind of model."""
FACTS: dict[str, Callable[[Subject], None]] = {
    "the card says what there is": the_card_says_what_there_is,
    "stages are where the steps are": stages_are_where_its_steps_are,
    "settings survive YAML and JSON": settings_survive_yaml_and_json,
    "what the card needs is refused elsewhere": a_host_that_lacks_what_the_card_needs_is_refused,
    "another seed, another result": another_seed_gives_another_result,
}
"""Name -> check of a method by itself."""
