"""Scores of frames by a second model, as QuoTA has them: it is asked about every frame by itself, and one word of its answer is the score.

Paper: Luo et al., AAAI 2026, arXiv 2503.08689; code at github.com/MAC-AutoML/QuoTA, ec194d7 (no licence): nothing copied.

1. Every frame is a prompt of its own. Without a question for frames it is whether the image is sufficient to answer the question, A yes, B no.
2. A frame's score is the probability of the word in the softmax over the whole vocabulary at the first place of the answer, and not the
   probability of "yes" against "no".
3. Of several questions about one frame (is there a dog, is there a ball) the likeliest counts.

The authors take the objects of the question from a call of the large model; here they are the caller's, or the task's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import nn

from vtr.cost import TERA, TransformerShape, prefill_flops
from vtr.data.frames import FrameQuestion, Video
from vtr.eval.run.asking import MARK, VIDEO_MARK, encode, first_logits, placeholders, prompt_lengths, to_model
from vtr.eval.tasks import Task
from vtr.hosts._protocol import host_of
from vtr.models.loading import load_model
from vtr.reduction import reductions_of
from vtr.types import VtrError
from vtr.types.errors import WrongType, WrongValue

MOST_PROMPTS = 64
"""Frames at once, as the authors ask them."""


SCORER = ("scorer_prompts", "scorer_visual_tokens", "scorer_tflops", "scorer_seconds")
"""What results say of scoring, per sample: the fields of `VideoScores`."""


@dataclass(frozen=True)
class VideoScores:
    """How much each frame of one video has to do with a question, and what finding that out took.

    Args:
        row: a score per frame, 0 to 1.
        prompts: that the scorer was asked.
        visual_tokens: of all these prompts, newline tokens included.
        tflops: of the scorer's LLM for all of them; a multiply-add counts once.
        seconds: the video's share of its batch.
    """

    row: tuple[float, ...]
    prompts: int
    visual_tokens: int
    tflops: float
    seconds: float


@dataclass(frozen=True)
class Scores:
    """Scores of some videos in the order of their prompts; this is what `frame_scores=` takes."""

    videos: tuple[VideoScores, ...]

    @property
    def rows(self) -> list[list[float]]:
        """A list of scores per video."""
        return [list(one.row) for one in self.videos]

    @property
    def cost(self) -> dict[str, float]:
        """What the scores took, summed over the videos, by the names in `SCORER`."""
        return {name: sum(getattr(one, name.removeprefix("scorer_")) for one in self.videos) for name in SCORER}

    def to_dict(self) -> dict[str, Any]:
        """Returns what results hold: scores and cost."""
        return {"frame_scores": [[round(score, 6) for score in row] for row in self.rows], **self.cost}

    def joined(self, pictures: int) -> Scores:
        """Returns the scores for a model that puts so many pictures together to one frame (`host.pictures`, 2 for Qwen-VL): the highest counts."""
        rows = (tuple(max(one.row[at : at + pictures]) for at in range(0, len(one.row), pictures)) for one in self.videos)
        return Scores(tuple(replace(one, row=row) for one, row in zip(self.videos, rows, strict=True)))

    def __call__(self, frames: Sequence[int]) -> list[list[float]]:
        """Returns the rows, whatever is asked for; other numbers of frames are refused where the rows are read."""
        return self.rows


def sufficient(question: str) -> FrameQuestion:
    """Returns what the authors ask of a frame where the question names no object."""
    asked = question.replace(MARK, "").replace(VIDEO_MARK, "").strip()
    text = f"Is this image sufficient to answer the question below?\nQuestion: {asked}\nA. yes\nB. no\nAnswer with the letter alone."
    return FrameQuestion((text,), ("A",))


class FrameScorer:
    """A second model that says how much every frame of a video has to do with a question.

    Args:
        model: a model with a host that takes images, or its name (a folder, a hub id, a name of `vtr models`), which is then loaded. It must not be
            the model that is reduced.
        processor: of a model that is given itself.
        batch_size: frames at once.

    Raises:
        ValueError: unknown name; a model without its processor; a batch size below 1.
        VtrError: the model takes no images, or cannot be loaded.

    Example:
        >>> scorer = vtr.FrameScorer("tiny-llava")
        >>> scores = scorer.scores([frames], "which way does the red circle move?")
        >>> with vtr.reduced(model, "quota", keep=72, frame_scores=scores):
        ...     out = model.generate(**inputs)
    """

    def __init__(self, model: str | nn.Module, processor: Any = None, *, batch_size: int = MOST_PROMPTS) -> None:
        if isinstance(model, str) != (processor is None):
            raise WrongValue("FrameScorer: give a model with its processor, or the name of a model alone")
        if batch_size < 1:
            raise WrongValue(f"FrameScorer: batch_size must be at least 1, got {batch_size}")
        loaded: tuple[Any, Any] = load_model(model) if isinstance(model, str) else (model, processor)
        self.model, self.processor = loaded
        if "image" not in getattr(host_of(self.model), "encode", ()):
            raise VtrError(
                "FrameScorer: the scorer must answer questions about images; use a model such as 'tiny-llava' or 'qwen2.5-vl-3b'"
            )
        self.batch_size = batch_size

    def scores(
        self, videos: Sequence[Video | Sequence[Image.Image]], questions: str | FrameQuestion | Sequence[str | FrameQuestion]
    ) -> Scores:
        """Returns the scores of videos, in batches over all their frames.

        Args:
            videos: each a `Video`, or its frames as RGB pictures.
            questions: one for all videos, or one per video: the question about the video as text, for `sufficient`, or what to ask of frames.

        Raises:
            ValueError: another number of questions than of videos, or a video without frames.
            TypeError: a question that is neither text nor a `FrameQuestion`.
            VtrError: no word of an answer is one token of the scorer, or the scorer is reduced itself.
        """
        for reduction in reductions_of(self.model):
            raise VtrError(
                f"FrameScorer.scores: the scorer must see whole frames, and it is reduced by {reduction.plan.described()}; score before the `with` "
                "block, or load the scorer a second time"
            )
        shown = [list(one.frames if isinstance(one, Video) else one) for one in videos]
        given = [questions] * len(shown) if isinstance(questions, (str, FrameQuestion)) else list(questions)
        if len(given) != len(shown):
            raise WrongValue(f"FrameScorer.scores: give one question, or one per video, got {len(given)} for {len(shown)} videos")
        if not all(shown):
            raise WrongValue(f"FrameScorer.scores: a video must have at least one frame, got none for video {shown.index([])}")
        asked = [_frame_question(one) for one in given]
        prompts = [(frame, text, one.words) for frames, one in zip(shown, asked, strict=True) for frame in frames for text in one.texts]
        starts = range(0, len(prompts), self.batch_size)
        found = [answer for start in starts for answer in self._answers(prompts[start : start + self.batch_size])]
        videos_found, taken = [], 0
        for frames, one in zip(shown, asked, strict=True):
            several, first = len(one.texts), taken
            taken += len(frames) * several
            own = found[first:taken]
            row = tuple(max(likely for likely, *_ in own[at : at + several]) for at in range(0, len(own), several))
            _, tokens, flops, seconds = zip(*own, strict=True)
            videos_found.append(VideoScores(row, len(own), sum(tokens), sum(flops) / TERA, sum(seconds)))
        return Scores(tuple(videos_found))

    def _answers(self, prompts: Sequence[tuple[Image.Image, str, tuple[str, ...]]]) -> list[tuple[float, int, float, float]]:
        """Returns, of every prompt of a batch, how likely its word is, its visual tokens, its multiply-adds and its share of the seconds."""
        clock = time.perf_counter()
        frames, texts, words = zip(*prompts, strict=True)
        inputs = to_model(encode(self.processor, texts, [[frame] for frame in frames]), self.model)
        likely = first_logits(self.model, self.processor, inputs).float().softmax(-1)  # (B, vocabulary)
        score = likely.amax(-1)
        for kind in set(words) - {()}:
            rows = torch.tensor([own == kind for own in words], device=score.device)
            score = torch.where(rows, likely[:, self._tokens(kind)].sum(-1), score)
        values = score.tolist()
        seconds = (time.perf_counter() - clock) / len(prompts)
        shape = TransformerShape.from_config(self.model.config.get_text_config())
        counts = zip(values, placeholders(self.model, inputs), prompt_lengths(inputs), strict=True)
        return [(value, tokens, prefill_flops(shape, [length] * shape.layers), seconds) for value, tokens, length in counts]

    def _tokens(self, words: tuple[str, ...]) -> list[int]:
        """Returns the tokens of the spellings that are one token each."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        spelled = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        found = sorted({ids[0] for ids in spelled if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})
        if not found:
            raise VtrError(
                f"FrameScorer: a word of the answer must be one token of the scorer, got {', '.join(map(repr, words))}; ask a question whose answer "
                "begins with one: FrameQuestion(texts, words)"
            )
        return found


def _frame_question(given: Any) -> FrameQuestion:
    if not isinstance(given, (str, FrameQuestion)):
        raise WrongType(f"FrameScorer.scores: a question must be text or a FrameQuestion, got {given!r}")
    return sufficient(given) if isinstance(given, str) else given


class TaskScores:
    """Scores of the samples of tasks: each sample is scored once, whatever number of cells asks for it.

    Args:
        load: makes the scorer, when the first sample comes.
    """

    def __init__(self, load: Callable[[], FrameScorer]) -> None:
        self._load = load
        self._found: dict[tuple[str, str], Scores] = {}

    @cached_property
    def _scorer(self) -> FrameScorer:
        return self._load()

    def of(self, task: Task, samples: Sequence[Any], videos: Sequence[Sequence[Any]]) -> list[Scores]:
        """Returns the scores of every sample; a sample may say what is asked of its frames (`frame_question`), else `sufficient` is.

        Args:
            task: of the samples.
            samples: see `vtr.eval.tasks.Sample`.
            videos: of each sample, as for `FrameScorer.scores`.
        """
        keys = [(task.name, sample.id) for sample in samples]
        new = [at for at, key in enumerate(keys) if key not in self._found]
        questions = [getattr(samples[at], "frame_question", samples[at].question) for at in new for _ in videos[at]]
        scored = list(self._scorer.scores([one for at in new for one in videos[at]], questions).videos) if new else []
        for at in new:
            count = len(videos[at])
            self._found[keys[at]] = Scores(tuple(scored[:count]))
            del scored[:count]
        return [self._found[key] for key in keys]
