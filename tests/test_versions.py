"""What another release of transformers may rename: read under either name, or an error; never an answer."""

import warnings

import pytest
import torch
from transformers import DynamicCache

import vtr
from tests.caches import held, output_cache
from tests.probes import ByAttention, EveryNth
from tests.tiny_models import Shot, batch_of, build, generate, model_of
from vtr.hosts import _versions

pytestmark = pytest.mark.usefixtures("no_gradients")
PLANS = ([EveryNth(stride=3)], [ByAttention(keep=7)])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", _versions.CACHE_NAMES)
def test_either_keyword_of_the_cache_is_read(plan, name):
    model, batch = model_of("llava", dtype=torch.float64), batch_of("llava", ((4, Shot(), 6),), dtype=torch.float64)
    if name == "cache" and _versions.cache_keyword() != "cache":
        name = "past_key_values"  # what this release does not know it cannot be given
    with vtr.reduced(model, plan), warnings.catch_warnings():
        expected = generate(model, batch, 4)
        warnings.simplefilter("ignore")  # an old name is the user's, and so is the warning
        cache = DynamicCache(config=model.config.get_text_config())
        logits = [model(**batch.inputs, **{name: cache}).logits[:, -1]]
        for _ in range(3):
            logits.append(model(input_ids=logits[-1].argmax(-1, keepdim=True), **{name: cache}).logits[:, -1])
    assert float((torch.stack(logits) - torch.stack(expected.logits)).abs().max()) < 1e-6


@pytest.mark.parametrize("plan", PLANS)
def test_no_warning_of_ours_reaches_a_user(plan):
    model, batch = model_of("llava"), batch_of("llava")
    with warnings.catch_warnings(), vtr.reduced(model, plan) as reduction:
        warnings.simplefilter("error")
        generate(model, batch, 3)
        model(**batch.inputs, labels=batch.inputs["input_ids"])
        reduction.report().to_dict()


def other_cache(model) -> None:
    """A language model that keeps its keys in another cache than the one it is given, as after a rename that nobody noticed."""
    language = model.model.language_model
    original = language.forward

    def forward(*args, **kwargs):
        for name in _versions.CACHE_NAMES:
            kwargs.pop(name, None)
        return original(*args, **held(DynamicCache(config=language.config)), **kwargs)

    language.forward = forward


def dropped_cache(model) -> None:
    """A layer that does not write what it was given."""
    attention = model.model.language_model.layers[3].self_attn
    original = attention.forward

    def forward(*args, **kwargs):
        for name in _versions.CACHE_NAMES:
            kwargs.pop(name, None)
        return original(*args, **kwargs)

    attention.forward = forward


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("broken", "message"), [(other_cache, "must return the KV cache that it was given"), (dropped_cache, "layer 3 must leave")]
)
def test_a_language_model_that_does_something_else_with_the_cache_is_an_error(plan, broken, message):
    model, batch = build("llava"), batch_of("llava")
    broken(model)
    with vtr.reduced(model, plan), pytest.raises(vtr.VtrError, match=rf"{message}.*transformers .* differs from the releases"):
        generate(model, batch, 3)


def test_the_output_names_the_cache():
    model, batch = model_of("llava"), batch_of("llava")
    with vtr.reduced(model, PLANS[0]):
        assert output_cache(model(**batch.inputs)).get_seq_length() < batch.valid.shape[1]
        as_tuple = model(**batch.inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
