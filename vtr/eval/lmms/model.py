"""The model `vtr` of lmms-eval: any checkpoint with a host, with or without a reduction, in batches of any images.

Everything here is about lmms-eval's side: requests in, answers out in their order. Prompts, generation and token counts are the same code as
in `vtr eval`, so that scores agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from vtr.eval.frame_scores import FrameScorer, Scores
from vtr.eval.lmms.arguments import read_count, read_method
from vtr.eval.lmms.prompts import Prompt, Shown, chat_prompt, plain_prompt
from vtr.eval.lmms.scoring import continuation_tokens, score
from vtr.eval.run.asking import encode_prompts, generate_tokens, prompt_lengths, to_model, together, visuals_of
from vtr.hosts._protocol import host_of
from vtr.models.loading import load_model
from vtr.models.pixels import PixelLimits
from vtr.planning import Visuals, host_for
from vtr.reduction import apply
from vtr.types import VtrError
from vtr.types.errors import WrongValue
from vtr.types.naming import FULL

_SEARCH, _RANDOM = ("num_beams", "repetition_penalty"), ("temperature", "top_p", "top_k")
_DEFAULT_STOP = "\n\n"  # lmms-eval adds it where a task says nothing; its own chat models ignore it, as answers with paragraphs need


@dataclass
class Measured(TokenCounts):
    """What is logged with each sample, beside the text tokens.

    Args:
        measured: `visual_tokens` before the reduction, `retained_tokens` after it, `average_tokens` over the LLM's layers, all without newline
            tokens and summed over images and videos, and `latency_ms`, the sample's share of its batch; with `frame_scores` also what scoring took
            (`vtr.eval.frame_scores.SCORER`), its share of the batch.
    """

    measured: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.measured}


class Choice(tuple):
    """Loss and greediness of a continuation.

    lmms-eval 0.7.3 keeps a pair as it is only inside a `GenerationResult`; its response cache, which would give text back, leaves out whatever
    strips to nothing.
    """

    def strip(self) -> str:
        """Nothing, see above."""
        return ""


class Vtr(lmms):
    """A checkpoint under a reduction.

    Args:
        pretrained: hub id, local folder, or a name of `vtr models`.
        method: registry name, or `full` for no reduction.
        device, dtype, attention: see `load_model`; under `accelerate launch` every process has its own device.
        max_frames_num: most frames of a video; a model without videos is shown them as images.
        min_pixels, max_pixels: of an image, where the processor has such limits; default: its own.
        frame_scores: a second model, by name, which is asked whether every frame of a video is sufficient to answer; for methods that read that.
        visuals: `prompt` = the images of a prompt, frames of videos among them, are one video; for models that take images only.
        max_new_tokens: for tasks that set none.
        batch_size: prompts at once; changes times, not answers.
        max_batch_size: not used.
        **settings: of the method, e.g. `keep=64`.

    Raises:
        ValueError, TypeError: an argument that does not exist or makes no sense.
        VtrError: the checkpoint cannot be loaded, or cannot be reduced so.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        method: str = FULL,
        device: str | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        max_frames_num: int = 8,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        visuals: Visuals = "each",
        frame_scores: str | None = None,
        max_new_tokens: int = 1024,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if pretrained is None:
            raise WrongValue("vtr: model_args need pretrained=, a hub id, a folder or a name of vtr models")
        chosen = read_method(method, settings)
        self.batch_size, frames = read_count("batch_size", batch_size), read_count("max_frames_num", max_frames_num)
        self.max_new_tokens = read_count("max_new_tokens", max_new_tokens)
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        pixels = PixelLimits(**{name: read_count(name, value) for name, value in limits.items() if value is not None})
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            if device == "auto":
                raise WrongValue("vtr: device=auto spreads one model over all devices; leave it out when several processes have one each")
            device = str(self.accelerator.device) if device in (None, "cuda") else device
        self.model, self.processor = load_model(str(pretrained), device, str(dtype), str(attention), pixels=pixels)
        self.host = host_of(self.model)
        asked: Any = host_for(self.model, visuals)
        self.shown, self.frame_settings, self.as_frames = Shown(frames, self.host.has_video), asked.frame_settings, asked.as_frames
        self.scorer: FrameScorer | None = None
        self._scores = Scores(())
        given: dict[str, Any] = {"processor": self.processor, "visuals": visuals}
        if frame_scores is not None:
            if chosen is None or not chosen.card.needs_frame_scores:
                raise WrongValue(f"vtr: frame_scores is for methods that read scores of frames, got method={method}; leave it out")
            self.scorer = FrameScorer(*load_model(str(frame_scores), device, str(dtype), str(attention)))
            given["frame_scores"] = lambda frames: self._scores(frames)
        self.reduction = apply(self.model, chosen, **given) if chosen else None

    @property
    def device(self) -> torch.device:
        """Of the model; lmms-eval gathers counts there."""
        return self.accelerator.device if self._world_size > 1 else self.model.device

    def clean(self) -> None:
        """Restores the model and lets go of it."""
        if self.reduction:
            self.reduction.remove()
        self.reduction = None
        del self.host  # holds the model
        super().clean()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """An answer to every request, in their order; requests with equal generation settings share batches."""
        answers: dict[int, GenerationResult] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(_generation(request), sort_keys=True, default=str), []).append(index)
        for indices in groups.values():
            settings = _generation(requests[indices[0]])
            for batch in self._batches(indices, "answers"):
                prompts = [self._prompt(requests[index]) for index in batch]
                for rows in together(self.processor, [prompt.videos for prompt in prompts]):
                    own = self._answer([prompts[row] for row in rows], settings)
                    answers.update(zip([batch[row] for row in rows], own, strict=True))
        self._log(answers.values())
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Of every continuation its mean cross-entropy per token and whether it is the greedy answer.

        A loss, not a probability: lmms-eval picks the choice with the smallest value, and its own models return the same.
        """
        results: dict[int, GenerationResult] = {}
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        for batch in self._batches(list(range(len(requests))), "choices"):
            asked = [self._continuation(requests[index]) for index in batch]
            for rows in together(self.processor, [prompt.videos for prompt, _ in asked]):
                prompts = [asked[row][0] for row in rows]
                continuations = [
                    continuation_tokens(tokenizer, prompt.text, asked[row][1]) for row, prompt in zip(rows, prompts, strict=True)
                ]
                inputs = self._encode(prompts)
                losses, greedy, elapsed = score(self.model, self.processor, inputs, continuations)
                counts = self._measured(prompts, inputs, [len(tokens) for tokens in continuations], elapsed)
                made = map(GenerationResult, map(Choice, zip(losses, greedy, strict=True)), counts)
                results.update(zip([batch[row] for row in rows], made, strict=True))
        return [results[index] for index in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported: a later turn would answer on a cache that the reduction of the first has shortened."""
        raise VtrError("vtr: tasks with several rounds are not supported; choose tasks of type generate_until or multiple_choice")

    def _batches(self, indices: Sequence[int], what: str) -> Iterator[list[int]]:
        with tqdm(total=len(indices), desc=f"vtr: {what}", disable=self.rank != 0) as bar:
            for start in range(0, len(indices), self.batch_size):
                batch = list(indices[start : start + self.batch_size])
                yield batch
                bar.update(len(batch))

    def _document(self, document: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][document]

    def _prompt(self, request: Instance) -> Prompt:
        """Of a request to generate, from a chat task (a function of messages comes second) or a simple one."""
        text, second, third, *place = request.args
        if callable(second):
            return chat_prompt(self.processor, second(self._document(*place)), self.shown)
        return plain_prompt(self.processor, text, third(self._document(*place)), self.shown)

    def _continuation(self, request: Instance) -> tuple[Prompt, str]:
        """Prompt and continuation; without images where the continuation is scored for itself."""
        text, continuation, *rest = request.args
        if not rest:
            return plain_prompt(self.processor, text, None, self.shown), continuation
        visuals, *place = rest
        document = self._document(*place)
        return plain_prompt(self.processor, text, visuals(document), self.shown), (
            continuation(document) if callable(continuation) else continuation
        )

    def _encode(self, prompts: Sequence[Prompt]) -> Any:
        texts, images, videos = zip(*((prompt.text, prompt.images, prompt.videos) for prompt in prompts), strict=True)
        inputs = encode_prompts(self.processor, texts, images, videos, self.frame_settings)
        if self.scorer is not None:
            asked = [(one, prompt.question) for prompt in prompts for one in self._videos(prompt)]
            scored = self.scorer.scores([video for video, _ in asked], [question for _, question in asked])
            self._scores = scored.joined(self.host.pictures)
        return to_model(inputs, self.model)

    def _videos(self, prompt: Prompt) -> Sequence[Any]:
        """Returns the videos of a prompt, its images where they are the frames of one."""
        return [prompt.images] if self.as_frames and prompt.images else prompt.videos

    def _answer(self, prompts: Sequence[Prompt], settings: dict[str, Any]) -> list[GenerationResult]:
        inputs = self._encode(prompts)
        longest = settings.get("max_new_tokens") or self.max_new_tokens
        tokens, elapsed = generate_tokens(self.model, self.processor, inputs, int(longest), **_sampling(settings))
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        special = torch.tensor(tokenizer.all_special_ids, device=tokens.device)
        written = (~torch.isin(tokens, special)).sum(1).tolist()
        answers = [_cut(text.strip(), settings.get("until")) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        return list(map(GenerationResult, answers, self._measured(prompts, inputs, written, elapsed)))

    def _measured(self, prompts: Sequence[Prompt], inputs: Any, written: Sequence[int], elapsed: float) -> list[Measured]:
        share = {"latency_ms": round(elapsed / len(prompts), 3)}
        share |= {name: total / len(prompts) for name, total in self._scores.cost.items()} if self.scorer else {}
        counts = zip(prompt_lengths(inputs), written, self._visual_tokens(prompts, inputs), strict=True)
        return [Measured(before, after, measured={**own, **share}) for before, after, own in counts]

    def _visual_tokens(self, prompts: Sequence[Prompt], inputs: Any) -> list[dict[str, float]]:
        """Visual tokens of every prompt, summed over its images and videos: before, at the end of the LLM, and mean over its layers."""
        rows = [row for row, prompt in enumerate(prompts) for _ in (prompt.images[:1] if self.host.tiles else prompt.images)]
        rows += [row for row, prompt in enumerate(prompts) for _ in prompt.videos]
        if self.reduction and rows:
            images = [(i.row, i.visual_tokens, len(i.retained), fmean(i.per_layer)) for i in self.reduction.report().images]
        else:
            images = [(row, one.tokens, one.tokens, one.tokens) for row, one in zip(rows, visuals_of(self.host, inputs), strict=True)]
        names = ("visual_tokens", "retained_tokens", "average_tokens")
        own = [[counts for at, *counts in images if at == row] for row in range(len(prompts))]
        return [dict(zip(names, map(sum, zip(*counts, strict=True)), strict=True)) if counts else dict.fromkeys(names, 0) for counts in own]

    def _log(self, answers: Iterable[GenerationResult]) -> None:
        counts: list[Any] = [answer.token_counts for answer in answers]
        if not counts:
            return
        seconds, written = sum(c.measured["latency_ms"] for c in counts) / 1000, sum(c.output_tokens for c in counts)
        means = {name: fmean(c.measured[name] for c in counts) for name in ("visual_tokens", "retained_tokens", "average_tokens")}
        log_metrics(seconds, written, written / seconds if seconds else 0.0, {**means, "total_requests": len(counts)})


class SimpleVtr(Vtr):
    """The same for `--force_simple`, without which lmms-eval builds no multiple-choice requests."""

    is_simple = True


def _generation(request: Instance) -> dict[str, Any]:
    """Generation settings of a request: third in a chat task, second in a simple one."""
    return request.args[2] if callable(request.args[1]) else request.args[1]


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """What of a task's settings `generate` gets: greedy unless they ask for sampling at a temperature above 0."""
    temperature, do_sample = settings.get("temperature"), settings.get("do_sample")
    sampled = temperature != 0 and (bool(temperature) if do_sample is None else do_sample)
    chosen = (*_SEARCH, *_RANDOM) if sampled else _SEARCH
    return {**{key: settings[key] for key in chosen if settings.get(key) is not None}, "do_sample": bool(sampled)}


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """Up to the first stop string that the task itself asks for."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop and stop != _DEFAULT_STOP:
            text = text.split(stop)[0]
    return text.strip()
