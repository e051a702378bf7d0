"""One question with and without a reduction: answers, tokens, cost, milliseconds, and what is needed to draw it."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vtr.cost import TERA, TransformerShape, average_tokens, kv_bytes, prefill_flops
from vtr.data.frames import Video
from vtr.engine.llm.frame_scores import FrameScores
from vtr.eval.run.asking import encode, generate, placeholders, prefill_ms, prompt_lengths, to_model, visuals_of
from vtr.eval.run.setup import given_to, shown_as, visuals_as
from vtr.hosts._protocol import host_of
from vtr.planning import Visuals
from vtr.reduction import reduced
from vtr.types import Method
from vtr.types.errors import WrongValue
from vtr.types.naming import FULL
from vtr.viz import views_from_inputs, views_from_videos

REPEATS = 3


@dataclass
class Outcome:
    """One side of the comparison.

    Args:
        name: method, or `full`.
        answer: greedy.
        retained: visual tokens of each image at the end of the LLM.
        average_tokens: visual tokens of all images, mean over the LLM's layers.
        prefill_ms: median over repeats, vision tower and choosing included; `prefill_runs_ms` are all of them.
        choosing_ms: the part that computed signals and selected.
        tflops, kv_mib: the LLM's prefill from measured lengths, see `vtr.cost`.
    """

    name: str
    answer: str
    retained: list[int]
    average_tokens: float
    prefill_ms: float
    prefill_runs_ms: list[float]
    choosing_ms: float
    tflops: float
    kv_mib: float


@dataclass
class Comparison:
    """Both sides, the report of the reduced one, and the pixels that the tower saw, per image or video `(V, H, W, 3)` uint8."""

    question: str
    visual_tokens: list[int]
    full: Outcome
    reduced: Outcome
    report: dict[str, Any]
    views: list[np.ndarray] = field(repr=False, default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON, without pixels."""
        return {
            "question": self.question,
            "visual_tokens": self.visual_tokens,
            "full": asdict(self.full),
            "reduced": asdict(self.reduced),
            "report": self.report,
        }


def compare(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    question: str,
    method: Method,
    max_new_tokens: int = 64,
    repeats: int = REPEATS,
    step: Callable[[str], None] = lambda what: None,
    videos: Sequence[Video] = (),
    visuals: Visuals | None = None,
    frame_scores: FrameScores | None = None,
) -> Comparison:
    """Asks once with and once without the method.

    Args:
        model, processor: from `load_model`; the model is left as it was.
        images, videos: of the prompt, in order; either images or videos.
        question: see `build_prompt`.
        method: what to apply.
        max_new_tokens: of each answer.
        repeats: prefills whose median is reported.
        step: called with what is about to be done, for progress.
        visuals: how a model that takes images only is shown videos, see `shown_as`.
        frame_scores: for a method that reads them, see `vtr.reduced`.

    Raises:
        ValueError: `keep` above the visual tokens of an image, or what `build_prompt` and the method refuse.
        VtrError: what `shown_as` and `given_to` refuse.
    """
    prompt = prompted(model, processor, images, question, videos, visuals)
    shortened, report = ask(model, processor, prompt.inputs, method, max_new_tokens, repeats, step, visuals_as(prompt.host), frame_scores)
    whole, _ = ask(model, processor, prompt.inputs, None, max_new_tokens, repeats, step)
    counts = prompt.tokens
    whole.retained, whole.average_tokens = counts, float(sum(counts))
    return Comparison(prompt.question, counts, whole, shortened, report, prompt.views(processor))


class Prompt(NamedTuple):
    """A prompt as one model gets it.

    Args:
        host: as which the model is asked, see `shown_as`.
        question, images, videos: as the model gets them, see `given_to`.
        inputs: of the processor, on the model's device.
    """

    host: Any
    question: str
    images: Sequence[Image.Image]
    videos: Sequence[Video]
    inputs: Any

    @property
    def tokens(self) -> list[int]:
        """Returns the visual tokens of every image, then of every video, newline tokens excluded."""
        return [layout.tokens for layout in visuals_of(self.host, self.inputs)]

    def views(self, processor: Any) -> list[np.ndarray]:
        """Returns the pixels that the tower saw, see `views_of`."""
        return views_of(self.host, processor, self.inputs, self.images, self.videos)


def prompted(
    model: Any, processor: Any, images: Sequence[Image.Image], question: str, videos: Sequence[Video] = (), visuals: Visuals | None = None
) -> Prompt:
    """Returns a prompt as the model gets it; arguments and errors as for `compare`."""
    if not images and not videos:
        raise WrongValue("image: at least one is needed, got none")
    host = shown_as(host_of(model), bool(videos), visuals)
    question, (images, videos) = given_to(host, question, images, videos)
    inputs = to_model(encode(processor, [question], [images], [videos], host.frame_settings), model)
    return Prompt(host, question, images, videos, inputs)


def ask(
    model: Any,
    processor: Any,
    inputs: Any,
    method: Method | None,
    max_new_tokens: int,
    repeats: int = REPEATS,
    step: Callable[[str], None] = lambda what: None,
    visuals: Visuals = "each",
    frame_scores: FrameScores | None = None,
) -> tuple[Outcome, dict[str, Any]]:
    """Asks on one side and returns the outcome and the report (empty for the full model, whose tokens are then counted with newlines).

    Args:
        model, processor, max_new_tokens, repeats, step: as in `compare`.
        inputs: one encoded prompt on the model's device.
        method: None for the full model.
        visuals, frame_scores: see `vtr.reduced`.
    """
    name = method.name if method else FULL
    layers = model.config.get_text_config().num_hidden_layers
    slots, length = placeholders(model, inputs)[0], prompt_lengths(inputs)[0]
    report: dict[str, Any] = {}
    lengths, per_layer, retained, frozen, runs, choosing = [length] * layers, [slots] * layers, [slots], [], [], []
    with reduced(model, method, processor=processor, frame_scores=frame_scores, visuals=visuals) if method else nullcontext() as reduction:
        step(f"{name}: answer")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*all its tokens stay")  # refused below
            prefill_ms(model, inputs)  # warms up, and tells whether the budget fits these images
        if method and reduction:
            report, frozen = _report(reduction), reduction.plan.frozen
            check_budget(method, report)
            lengths = report["sequence_lengths"]
            per_layer = [sum(layer) for layer in zip(*(image["per_layer"] for image in report["images"]), strict=True)]
            retained = [len(image["retained"]) for image in report["images"]]
        answer = generate(model, processor, inputs, max_new_tokens)[0][0]
        step(f"{name}: timing")
        for _ in range(repeats):
            runs.append(prefill_ms(model, inputs))
            choosing.append(_report(reduction)["choosing_ms"] if method else 0.0)
    shape = TransformerShape.from_config(model.config.get_text_config())
    outcome = Outcome(
        name=name,
        answer=answer,
        retained=retained,
        average_tokens=average_tokens(per_layer),
        prefill_ms=statistics.median(runs),
        prefill_runs_ms=runs,
        choosing_ms=statistics.median(choosing),
        tflops=prefill_flops(shape, lengths, frozen, length - slots) / TERA,
        kv_mib=kv_bytes(shape, lengths, model.dtype.itemsize) / 2**20,
    )
    return outcome, report


def check_budget(method: Method, report: dict[str, Any]) -> None:
    """Refuses an int `keep` above what an image has; the library only warns, but here the image is known.

    Raises:
        ValueError: it is above.
    """
    for image in report["images"]:
        if method.keep is not None and method.keep > image["visual_tokens"]:
            kind = image.get("kind", "image")
            where = f"{kind} {image['image']} has {image['visual_tokens']} visual tokens"
            raise WrongValue(f"{method.name}: keep must be from 1 to the {kind}'s visual tokens, got {method.keep}; {where}")


def _report(reduction: Any) -> dict[str, Any]:
    return reduction.report().to_dict()


def views_of(host: Any, processor: Any, inputs: Any, images: Sequence[Image.Image], videos: Sequence[Video] = ()) -> list[np.ndarray]:
    """Returns the pixels of every image, then of every video, of one prompt as the tower saw them, `(V, H, W, 3)` uint8.

    Args:
        host: as which the model was asked, see `shown_as`; where images are frames there is one entry for all.
        processor, inputs: of the prompt.
        images, videos: that the processor got, in order.
    """
    counts = [layout.views for layout in visuals_of(host, inputs)]
    found = []
    if images:
        rows = inputs["pixel_values"].ndim == 5  # those of a prompt are in one row
        own = [1] * len(images) if host.as_frames and not rows else counts[: len(images)]
        found += views_from_inputs(inputs, getattr(processor, "image_processor", processor), own, images)
        found = [np.concatenate(found)] if host.as_frames else found
    if videos:
        frames = [video.frames for video in videos]
        found += views_from_videos(inputs, getattr(processor, "video_processor", processor), counts[len(images) :], frames)
    return found
