"""How likely given continuations are, by the same prefill and decoding as an answer, so that a reduction never sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtr.eval.run.asking import generate_tokens, padding_id
from vtr.types.errors import WrongValue


class Forced:
    """A logits processor that makes `generate` write given tokens, and notes what the model thought of them.

    Args:
        tokens: `(B, L)` int64, `real` `(B, L)` bool; what is not real comes after the end of a row.
    """

    def __init__(self, tokens: Tensor, real: Tensor) -> None:
        self.tokens, self.real, self.step = tokens, real, 0
        self.loss = torch.zeros(len(tokens), device=tokens.device)
        self.greedy = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted, real = self.tokens[:, self.step, None], self.real[:, self.step]
        self.loss -= torch.where(real, scores.float().log_softmax(-1).gather(1, wanted)[:, 0], 0.0)
        self.greedy &= (scores.argmax(-1) == wanted[:, 0]) | ~real
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


def continuation_tokens(tokenizer: Any, prompt: str, continuation: str) -> list[int]:
    """Returns the tokens that `continuation` adds to `prompt`, tokenised together; at least one.

    Raises:
        ValueError: an empty continuation.
    """
    before, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + continuation))
    added = both[len(before) :] or tokenizer(continuation, add_special_tokens=False)["input_ids"]
    if not added:
        raise WrongValue(f"loglikelihood: a continuation must have at least one token, got {continuation!r}")
    return added


def score(model: Any, processor: Any, inputs: Any, continuations: Sequence[Sequence[int]]) -> tuple[list[float], list[bool], float]:
    """Returns what the model thinks of a continuation of each prompt.

    Args:
        model, processor: from `load_model`.
        inputs: prompts, from `encode_prompts`.
        continuations: tokens of each row.

    Returns:
        Mean cross-entropy over the tokens of each row in nats, whether greedy decoding would have written them, and milliseconds of the batch.
    """
    longest = max(map(len, continuations))
    padded = [[*tokens, *[padding_id(processor) or 0] * (longest - len(tokens))] for tokens in continuations]
    lengths = torch.tensor([len(tokens) for tokens in continuations], device=model.device)
    real = torch.arange(longest, device=model.device) < lengths[:, None]
    forced = Forced(torch.tensor(padded, device=model.device), real)
    _, elapsed = generate_tokens(model, processor, inputs, longest, logits_processor=[forced])
    return (forced.loss / lengths).tolist(), forced.greedy.tolist(), elapsed
