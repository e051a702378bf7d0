"""One question with and without a reduction: answers, tokens, cost, milliseconds, and what is needed to draw it."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from vtr.cost import TERA, TransformerShape, average_tokens, kv_bytes, prefill_flops
from vtr.data.frames import Video
from vtr.eval.run.asking import encode, generate, placeholders, prefill_ms, prompt_lengths, to_model, visuals_of
from vtr.hosts._protocol import host_of
from vtr.models.pixels import OWN_LIMITS, PixelLimits, check_frame_limits
from vtr.reduction import reduced
from vtr.types import Method, VtrError
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

    Raises:
        ValueError: `keep` above the visual tokens of an image, or what `build_prompt` and the method refuse.
        VtrError: videos, and the model has none.
    """
    if not images and not videos:
        raise WrongValue("image: at least one is needed, got none")
    if videos:
        check_videos(model)
    inputs = to_model(encode(processor, [question], [list(images)], [list(videos)]), model)
    shortened, report = ask(model, processor, inputs, method, max_new_tokens, repeats, step)
    whole, _ = ask(model, processor, inputs, None, max_new_tokens, repeats, step)
    counts = [image["visual_tokens"] for image in report["images"]]
    whole.retained, whole.average_tokens = counts, float(sum(counts))
    return Comparison(question, counts, whole, shortened, report, views_of(model, processor, inputs, images, videos))


def ask(
    model: Any,
    processor: Any,
    inputs: Any,
    method: Method | None,
    max_new_tokens: int,
    repeats: int = REPEATS,
    step: Callable[[str], None] = lambda what: None,
) -> tuple[Outcome, dict[str, Any]]:
    """Asks on one side and returns the outcome and the report (empty for the full model, whose tokens are then counted with newlines).

    Args:
        model, processor, max_new_tokens, repeats, step: as in `compare`.
        inputs: one encoded prompt on the model's device.
        method: None for the full model.
    """
    name = method.name if method else FULL
    layers = model.config.get_text_config().num_hidden_layers
    slots, length = placeholders(model, inputs)[0], prompt_lengths(inputs)[0]
    report: dict[str, Any] = {}
    lengths, per_layer, retained, frozen, runs, choosing = [length] * layers, [slots] * layers, [slots], [], [], []
    with reduced(model, method, processor=processor) if method else nullcontext() as reduction:
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


def check_videos(model: Any, pixels: PixelLimits = OWN_LIMITS) -> None:
    """Refuses videos where a model has none, and limits of their pixels where it has no such limits.

    Raises:
        ValueError: such limits.
        VtrError: it has no videos.
    """
    host = host_of(model)
    if not host.has_video:
        raise VtrError(
            f"video: {host.name!r} takes images only, got a video; give its frames as images (--image, repeated), or use a model with videos such as "
            "llava-onevision-7b"
        )
    check_frame_limits(host, pixels)


def _report(reduction: Any) -> dict[str, Any]:
    return reduction.report().to_dict()


def views_of(model: Any, processor: Any, inputs: Any, images: Sequence[Image.Image], videos: Sequence[Video] = ()) -> list[np.ndarray]:
    """Returns the pixels of every image, then of every video, of one prompt as the tower saw them, `(V, H, W, 3)` uint8."""
    layouts = visuals_of(host_of(model), inputs)
    counts = [layout.views for layout in layouts]
    found = []
    if images:
        found += views_from_inputs(inputs, getattr(processor, "image_processor", processor), counts[: len(images)], images)
    if videos:
        frames = [video.frames for video in videos]
        found += views_from_videos(inputs, getattr(processor, "video_processor", processor), counts[len(images) :], frames)
    return found
