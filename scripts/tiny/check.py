"""Scores of an embedded checkpoint on `shapes`, with all visual tokens and with randomly chosen ones.

A check of the training that needs none of the toolkit's reduction code: visual tokens are chosen between projector and LLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vtr.data.shapes import is_correct
from vtr.eval.stats import wilson
from vtr.hosts._versions import cache_keyword

LONGEST_ANSWER = 8


class Chosen(NamedTuple):
    """Visual tokens that are given to the LLM `(B, K)`, their positions after the first `(B, K)`, and how many positions they take."""

    kept: Tensor
    positions: Tensor
    length: int


Choice = Callable[[Tensor], Chosen]
"""From random numbers `(B, N)` to the tokens that stay."""


def see_images(model, processor, samples: Sequence) -> Tensor:
    """Projected visual tokens `(B, N, D)` of the samples' images, newlines included."""
    inputs = processor.image_processor([sample.image for sample in samples], return_tensors="pt").to(model.device)
    out = model.model.get_image_features(
        **inputs,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    )
    return torch.stack(tuple(getattr(out, "pooler_output", out)))


def _greedy(model, tokens: Tensor, positions: Tensor, stop: int) -> Tensor:
    """Returns the greedy continuation `(B, LONGEST_ANSWER)` of embedded prompts `(B, S, D)`, filled up with `stop`."""
    llm, embed, cache = model.model.language_model, model.get_input_embeddings(), DynamicCache()
    answer: list[Tensor] = []
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    while len(answer) < LONGEST_ANSWER and not ended.all():
        hidden = llm(inputs_embeds=tokens, position_ids=positions, use_cache=True, **{cache_keyword(): cache}).last_hidden_state
        word = model.lm_head(hidden[:, -1]).argmax(-1).masked_fill(ended, stop)
        ended = ended | (word == stop)
        answer.append(word)
        tokens, positions = embed(word)[:, None], positions[:, -1:] + 1
    return torch.stack(answer, 1)


def predictions(model, processor, samples: Sequence, keeps: Sequence[int | None], batch: int = 20) -> dict[int | None, list[str]]:
    """Greedy answers for several keep counts (None for all, 0 for none), in the order of the samples.

    Visual tokens are chosen at random (seed: the batch number) and keep their positions; with 0 the placeholders are cut out.
    """
    return answers(model, processor, samples, {keep: some(keep) for keep in keeps}, batch=batch)


def some(keep: int | None) -> Choice:
    """Returns the choice of so many visual tokens at random, in order, with the positions that they have; None for all."""

    def choose(order: Tensor) -> Chosen:
        total = order.shape[1]
        kept = order.topk(total if keep is None else keep, dim=1).indices.sort(dim=1).values
        return Chosen(kept, kept, total if kept.shape[1] else 0)

    return choose


@torch.inference_mode()
def answers(
    model, processor, samples: Sequence, choices: Mapping[Any, Choice], part: str = "image", see=see_images, batch: int = 20
) -> dict[Any, list[str]]:
    """Greedy answers for several choices of visual tokens, in the order of the samples.

    Args:
        model: an embedded LLaVA.
        processor: its processor.
        samples: questions, each about one image or one video.
        choices: name -> choice.
        part: `image` or `video`, as the chat template calls it.
        see: `(model, processor, samples) -> visual tokens (B, N, D)`.
        batch: samples at once.
    """
    tokenizer = processor.tokenizer
    texts = {
        sample.id: processor.apply_chat_template(
            [{"role": "user", "content": [{"type": part}, {"type": "text", "text": sample.question}]}], add_generation_prompt=True
        )
        for sample in samples
    }
    ids = {name: tokenizer(text)["input_ids"] for name, text in texts.items()}
    found: dict[Any, dict[str, str]] = {name: {} for name in choices}
    rows = sorted(samples, key=lambda sample: len(ids[sample.id]))
    groups = [list(group) for _, group in groupby(rows, key=lambda sample: len(ids[sample.id]))]
    chunks = [group[n : n + batch] for group in groups for n in range(0, len(group), batch)]
    embed = model.get_input_embeddings()
    for number, chunk in enumerate(chunks):
        visual = see(model, processor, chunk)
        prompt = torch.tensor([ids[sample.id] for sample in chunk], device=model.device)
        at = int((prompt[0] == getattr(model.config, f"{part}_token_id")).nonzero())
        before, after = embed(prompt[:, :at]), embed(prompt[:, at + 1 :])
        order = torch.rand(visual.shape[:2], generator=torch.Generator().manual_seed(number)).to(model.device)
        for name, choose in choices.items():
            kept, positions, length = choose(order)
            tokens = torch.cat([before, visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1])), after], dim=1)
            head = torch.arange(at, device=model.device).expand(len(chunk), -1)
            tail = at + length + torch.arange(after.shape[1], device=model.device).expand(len(chunk), -1)
            made = _greedy(model, tokens, torch.cat([head, positions + at, tail], dim=1), tokenizer.eos_token_id)
            for sample, text in zip(chunk, tokenizer.batch_decode(made, skip_special_tokens=True)):
                found[name][sample.id] = text
    return {name: [found[name][sample.id] for sample in samples] for name in choices}


def accuracy(samples: Sequence, answers: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Per family and as `macro`: accuracy in percent (0 to 100) and the ends of its 95 % interval."""
    scores, variance = {}, 0.0
    for family in dict.fromkeys(sample.family for sample in samples):
        right = [is_correct(answer, sample.answer) for sample, answer in zip(samples, answers) if sample.family == family]
        scores[family] = share_in_percent(sum(right), len(right))
        share = sum(right) / len(right)
        variance += share * (1 - share) / len(right)
    mean = sum(score[0] for score in scores.values()) / len(scores)
    margin = 196 * math.sqrt(variance) / len(scores)
    return {**scores, "macro": (mean, max(0.0, mean - margin), min(100.0, mean + margin))}


def share_in_percent(right: int, total: int) -> tuple[float, float, float]:
    """Returns the share in percent and its 95 % Wilson interval."""
    value, low, high = wilson(right, total)
    return 100 * value, 100 * low, 100 * high
