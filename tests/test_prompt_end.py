"""What a method reads ends where the prompt ends: not at a draft's guesses, labelled answers or what was generated without a cache."""

from functools import cache

import pytest
import torch
import transformers
from transformers import DynamicCache

import vtr
from tests.caches import held
from tests.marks import quick_only
from tests.test_contract import NAMES, REPRESENTATIVES, home, method_of
from tests.tiny_models import IMAGE, ONE, Batch, Shot, batch_of, build, model_of
from vtr.registry import method_class
from vtr.testing import given
from vtr.testing.subject import TINY

pytestmark = pytest.mark.usefixtures("no_gradients")
FP64 = torch.float64
NEW = 6
METHODS = [name for name in NAMES if name not in ("none", "expedit", "shortv", "prunevid")]
"""The others choose nothing: `none` keeps nothing, `expedit` restores, `shortv` freezes. `prunevid` refuses guesses behind its prompt."""
SOME = quick_only(REPRESENTATIVES, METHODS)
"""One of each mechanism in the quick suite."""
READERS = [name for name in METHODS if method_class(name).card.needs_text or "prefill" in method_class(name).stages]
"""Methods that read the text, or attention of it."""


@cache
def draft(kind: str):
    """Of the same family, as transformers 5.17 hands the draft the images, too."""
    model = build(kind, dtype=FP64, text={"num_hidden_layers": 1})
    settings = model.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule, settings.assistant_confidence_threshold = 4, "constant", 0.0
    return model


def asked(name: str, **settings) -> tuple[list[int], list[list[int]]]:
    """The answer, and the patches retained of every image, of one prompt."""
    kind = home(name)
    model, batch = model_of(kind, dtype=FP64), batch_of(kind, ONE, dtype=FP64, seed=2)
    with given.reduced(model, method_of(name, 7, kind)) as reduction:
        out = model.generate(**batch.inputs, max_new_tokens=NEW, do_sample=False, suppress_tokens=[IMAGE], **settings)
        return out[0, -NEW:].tolist(), [image.retained for image in reduction.report().images]


unhelped = cache(asked)
"""What several tests compare with."""


@pytest.fixture
def silent_transformers():
    """transformers' own assisted decoding calls its draft in a way that it announces to be deprecated."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.usefixtures("silent_transformers")
@pytest.mark.parametrize("name", SOME)
def test_assisted_decoding_changes_nothing(name):
    assert asked(name, assistant_model=draft(home(name))) == unhelped(name)


@pytest.mark.usefixtures("silent_transformers")
def test_guesses_that_would_see_keys_that_go_are_refused():
    with pytest.raises(
        vtr.VtrError, match="prunevid: removes keys of earlier layers behind the prompt, which guesses of a draft in the same call"
    ):
        asked("prunevid", assistant_model=draft(home("prunevid")))


@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "cdpruner"])
def test_prompt_lookup_changes_nothing(name):
    kind = home(name)
    model = model_of(kind, dtype=FP64)
    batch = batch_of(kind, ONE, dtype=FP64, seed=2)
    batch = batch.followed_by(batch.inputs["input_ids"][:, -6:].repeat(1, 2))  # proposals in the first pass
    found = []
    for settings in ({}, {"prompt_lookup_num_tokens": 3}):
        with given.reduced(model, method_of(name, 7, kind)) as reduction:
            out = model.generate(**batch.inputs, max_new_tokens=NEW, do_sample=False, suppress_tokens=[IMAGE], **settings)
            found.append((out[0, -NEW:].tolist(), [image.retained for image in reduction.report().images]))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", quick_only(REPRESENTATIVES, READERS))
def test_generating_without_a_cache_changes_nothing(name):
    if any(step.earlier_keys for step in method_of(name).steps(TINY)):
        with pytest.raises(vtr.VtrError, match="changes which keys of a cache are used, and there is none"):
            asked(name, use_cache=False)
        return
    assert asked(name, use_cache=False) == unhelped(name)


@pytest.mark.parametrize("name", quick_only(REPRESENTATIVES, READERS))
def test_a_labelled_answer_is_no_instruction(name):
    """A prompt with its answer behind it keeps what the prompt alone keeps, row by row, with any padding."""
    kind = home(name)
    model = model_of(kind, dtype=FP64)
    for pad in ("left", "right"):
        batch = batch_of(kind, dtype=FP64, pad=pad)
        prompts = [batch.row(row) for row in range(2)]
        answered = [prompt.followed_by(torch.tensor([answer])) for prompt, answer in zip(prompts, ([71, 72, 73], [81, 82]))]
        whole = _padded(answered, batch, pad)
        answer = torch.zeros_like(whole.valid)
        for row, count in enumerate((3, 2)):
            last = whole.valid[row].nonzero()[-count:, 0]
            answer[row, last] = True
        labels = torch.where(answer, whole.inputs["input_ids"], -100)
        with given.reduced(model, method_of(name, 7, kind)) as reduction:
            model(**whole.inputs, labels=labels, position_ids=whole.positions)
            found = reduction.report().images
            alone = []
            for row, prompt in enumerate(prompts):
                model(**prompt.inputs, position_ids=prompt.positions)
                alone += [(row, image.image, image.retained) for image in reduction.report().images]
        assert [(image.row, image.image, image.retained) for image in found] == alone


def _padded(rows: list[Batch], batch: Batch, pad: str) -> Batch:
    width = max(row.valid.shape[1] for row in rows)
    side = (lambda t: (width - t.shape[1], 0)) if pad == "left" else (lambda t: (0, width - t.shape[1]))
    inputs = {
        n: torch.cat([torch.nn.functional.pad(r.inputs[n], side(r.inputs[n])) for r in rows]) for n in ("input_ids", "attention_mask")
    }
    return Batch(batch.kind, {**batch.inputs, **inputs}, batch.shots)


@pytest.mark.parametrize("name", ["fastv", "cdpruner"])
def test_where_all_text_behind_the_image_is_labelled_it_is_the_instruction(name):
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", ONE, dtype=FP64)
    labels = torch.where(batch.visual, -100, batch.inputs["input_ids"])
    with vtr.reduced(model, name, keep=7) as reduction:
        model(**batch.inputs, labels=labels)
        labelled = reduction.report().images[0].retained
        model(**batch.inputs)
        assert labelled == reduction.report().images[0].retained


@pytest.mark.parametrize("name", ["fastv", "divprune", "flowcut", "expedit"])
def test_an_image_token_without_an_image_is_text(name):
    """A prompt with a literal image token, and a model or a draft that writes one: as the full model takes them."""
    model = model_of("llava", dtype=FP64)
    ids = torch.tensor([[5, 6, IMAGE, 7, IMAGE, IMAGE, 8]])
    full = model(input_ids=ids).logits
    batch, written = batch_of("llava", ONE, dtype=FP64, seed=2), torch.tensor([[9, IMAGE, 9, IMAGE]])
    with vtr.reduced(model, method_of(name, 7, "llava")):
        assert torch.equal(model(input_ids=ids).logits, full)
        caches = [DynamicCache(config=model.config.get_text_config()) for _ in range(2)]
        for known in caches:
            model(**batch.inputs, **held(known))
        together = model(input_ids=written, **held(caches[0])).logits
        one_by_one = torch.cat([model(input_ids=written[:, i : i + 1], **held(caches[1])).logits for i in range(4)], 1)
    assert float((together - one_by_one).abs().max()) < 1e-6


def test_what_one_generate_said_does_not_outlive_it():
    """An own loop that prepares its inputs as `generate` does, for a longer prompt than the one that was answered before."""
    model = model_of("llava", dtype=FP64)
    short, long = (batch_of("llava", ((4, Shot(), text),), dtype=FP64, seed=2) for text in (6, 20))
    with vtr.reduced(model, "fastv", keep=7) as reduction:
        model(**long.inputs)
        wanted = reduction.report().images[0].retained
        model.generate(**short.inputs, max_new_tokens=2, do_sample=False)
        ids = long.inputs["input_ids"]
        rest = {name: value for name, value in long.inputs.items() if name != "input_ids"}
        made = model.prepare_inputs_for_generation(ids, **rest, is_first_iteration=True, use_cache=False)
        model(**{name: value for name, value in made.items() if value is not None})
        assert reduction.report().images[0].retained == wanted


MADE = {"pixel_values", "mm_encoder_outputs"}
"""What a model is given of images."""


@pytest.mark.parametrize("name", ["fastv", "divprune"])
@pytest.mark.parametrize("size", [10, 45])
def test_a_prompt_that_generate_passes_in_pieces_is_refused(name, size):
    """45 tokens hold the whole image, but not the whole question."""
    model, batch = model_of("llava", dtype=FP64), batch_of("llava", ((4, Shot(), 20),), dtype=FP64)
    shown: list[bool] = []
    hook = model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: shown.append(any(kwargs.get(made) is not None for made in MADE)), with_kwargs=True
    )
    try:
        model.generate(**batch.inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=size)
    except ValueError:
        pytest.skip("this transformers passes no prompt with an image in pieces")
    finally:
        hook.remove()
    if not any(shown):
        pytest.skip("this transformers leaves the image out of a prompt that it passes in pieces")
    with vtr.reduced(model, name, keep=7), pytest.raises(vtr.VtrError, match="prefill_chunk_size"):
        model.generate(**batch.inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=size)
