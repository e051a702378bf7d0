"""Scores of an embedded checkpoint on `shapes`, with all visual tokens and with randomly chosen ones.

A check of the training that needs none of the toolkit's reduction code: visual tokens are chosen between projector and LLM.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vtr.data.shapes import FAMILIES, Sample, is_correct
from vtr.eval.stats import wilson
from vtr.hosts._versions import cache_keyword

LONGEST_ANSWER = 8


def _visual(model, processor, images: list) -> Tensor:
    """Projected visual tokens `(B, N, D)`, newlines included."""
    inputs = processor.image_processor(images, return_tensors="pt").to(model.device)
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


@torch.inference_mode()
def predictions(model, processor, samples: Sequence[Sample], keeps: Sequence[int | None], batch: int = 20) -> dict[int | None, list[str]]:
    """Greedy answers for several keep counts (None for all, 0 for none), in the order of the samples.

    Visual tokens are chosen at random (seed: the batch number) and keep their positions; with 0 the placeholders are cut out.
    """
    tokenizer = processor.tokenizer
    texts = {
        sample.id: processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}], add_generation_prompt=True
        )
        for sample in samples
    }
    ids = {name: tokenizer(text)["input_ids"] for name, text in texts.items()}
    found: dict[int | None, dict[str, str]] = {keep: {} for keep in keeps}
    rows = sorted(samples, key=lambda sample: len(ids[sample.id]))
    groups = [list(group) for _, group in groupby(rows, key=lambda sample: len(ids[sample.id]))]
    chunks = [group[n : n + batch] for group in groups for n in range(0, len(group), batch)]
    embed = model.get_input_embeddings()
    for number, chunk in enumerate(chunks):
        visual = _visual(model, processor, [sample.image for sample in chunk])
        prompt = torch.tensor([ids[sample.id] for sample in chunk], device=model.device)
        at = int((prompt[0] == model.config.image_token_id).nonzero())
        before, after = embed(prompt[:, :at]), embed(prompt[:, at + 1 :])
        total = visual.shape[1]
        order = torch.rand(visual.shape[:2], generator=torch.Generator().manual_seed(number)).to(model.device)
        for keep in keeps:
            count = total if keep is None else keep
            kept = order.topk(count, dim=1).indices.sort(dim=1).values
            tokens = torch.cat([before, visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1])), after], dim=1)
            head = torch.arange(at, device=model.device).expand(len(chunk), -1)
            tail = at + (total if count else 0) + torch.arange(after.shape[1], device=model.device).expand(len(chunk), -1)
            answers = _greedy(model, tokens, torch.cat([head, kept + at, tail], dim=1), tokenizer.eos_token_id)
            for sample, text in zip(chunk, tokenizer.batch_decode(answers, skip_special_tokens=True)):
                found[keep][sample.id] = text
    return {keep: [found[keep][sample.id] for sample in samples] for keep in keeps}


def accuracy(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Per family and as `macro`: accuracy in percent (0 to 100) and the ends of its 95 % interval."""
    scores, variance = {}, 0.0
    for family in FAMILIES:
        right = [is_correct(answer, sample.answer) for sample, answer in zip(samples, answers) if sample.family == family]
        if right:
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
