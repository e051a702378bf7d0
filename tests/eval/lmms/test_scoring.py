"""Scores of continuations, against one plain pass over prompt and continuation together."""

import pytest
import torch

import vtr
from tests.embedded import random_checkpoint
from vtr.data import shapes
from vtr.eval.lmms.scoring import continuation_tokens, score
from vtr.eval.run.asking import build_prompt, encode_prompts, generate_tokens, to_model
from vtr.models.loading import load_model

SAMPLES = [shapes.test_samples(family, limit=1)[0] for family in ("text", "attribute", "existence")]
CONTINUATIONS = ["yes", "a gray circle", "no dog"]


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(random_checkpoint()))


def ask(loaded, rows):
    """Inputs of some of the samples, and the tokens of their continuations."""
    model, processor = loaded
    prompts = [build_prompt(processor, SAMPLES[row].question, 1) for row in rows]
    tokens = [continuation_tokens(processor.tokenizer, prompt, CONTINUATIONS[row]) for prompt, row in zip(prompts, rows, strict=True)]
    return to_model(encode_prompts(processor, prompts, [[SAMPLES[row].image] for row in rows]), model), tokens


def one_pass(loaded, row):
    """Mean cross-entropy and greediness by a single forward over everything; the last positions are the continuation's."""
    model, processor = loaded
    prompt = build_prompt(processor, SAMPLES[row].question, 1)
    wanted = torch.tensor(continuation_tokens(processor.tokenizer, prompt, CONTINUATIONS[row]))
    inputs = to_model(encode_prompts(processor, [prompt + CONTINUATIONS[row]], [[SAMPLES[row].image]]), model)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -len(wanted) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, wanted).item(), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("method", [None, "uniform"])
def test_scores_equal_one_pass_in_any_batch(loaded, method):
    reduction = vtr.apply(loaded[0], method, keep=64) if method else None
    try:
        expected = [one_pass(loaded, row) for row in range(3)]
        losses, greedy, _ = score(*loaded, *ask(loaded, [0, 1, 2]))
    finally:
        if reduction:
            reduction.remove()
    assert losses == pytest.approx([loss for loss, _ in expected], abs=1e-4)
    assert greedy == [greedy for _, greedy in expected]


def test_the_greedy_answer_is_greedy_and_another_is_not(loaded):
    inputs, _ = ask(loaded, [1])
    answer = generate_tokens(*loaded, inputs, 3)[0][0].tolist()
    other = [*answer[:-1], (answer[-1] + 7) % loaded[0].config.text_config.vocab_size]
    (loss, worse), (first, second), _ = (
        [*column]
        for column in zip(*([v[0] for v in score(*loaded, inputs, [tokens])[:2]] + [0] for tokens in (answer, other)), strict=True)
    )
    assert (first, second) == (True, False)
    assert loss < worse


def test_a_reduction_does_not_see_the_continuation(loaded):
    with vtr.reduced(loaded[0], "fastv", keep=64) as reduction:
        inputs, tokens = ask(loaded, [1])
        generate_tokens(*loaded, inputs, 1)
        alone = reduction.report().images[0].retained
        score(*loaded, inputs, tokens)
        assert reduction.report().images[0].retained == alone


def test_an_empty_continuation_is_refused(loaded):
    with pytest.raises(ValueError, match="loglikelihood: a continuation must have at least one token, got ''"):
        continuation_tokens(loaded[1].tokenizer, "USER: what? ASSISTANT:", "")
