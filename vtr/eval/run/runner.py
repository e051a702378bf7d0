"""Runs cells: batched greedy answers in the order of the samples, and what they sum up to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from vtr.cost import TERA, TransformerShape, kv_bytes, prefill_flops
from vtr.eval.frame_scores import SCORER, Scores, TaskScores
from vtr.eval.run.asking import encode, generate, placeholders, prompt_lengths, to_model, together, visuals_of
from vtr.eval.run.cells import Cell, fingerprint
from vtr.eval.run.provenance import conditions
from vtr.eval.run.setup import Seen, noted, seen_by, shown_as, visuals_as
from vtr.eval.run.sharing import TowerCache
from vtr.eval.stats import accuracy, macro_accuracy
from vtr.hosts._protocol import host_of
from vtr.models.pixels import OWN_LIMITS, PixelLimits
from vtr.planning import Visuals, plan
from vtr.reduction import reduced
from vtr.types.errors import WrongValue


@dataclass
class Runner:
    """A loaded model that answers cells.

    Args:
        model, processor: from `load_model`.
        identity: from `identify`, what the model is called in fingerprints.
        attention, device: as asked for when loading.
        batch_size: prompts at once; changes times, not answers.
        share_tower: run the tower once for all cells that leave it alone; times of these cells mean nothing then.
        pixels: with which the processor was loaded.
        visuals: how a model that takes images only is shown videos, see `shown_as`.
        scorer: the model that scores frames in fingerprints, from `identify` with its `model_type`.
        frame_scores: its scores, for methods that read them.
    """

    model: Any
    processor: Any
    identity: Mapping[str, Any]
    attention: str
    device: str
    batch_size: int = 16
    share_tower: bool = False
    pixels: PixelLimits = OWN_LIMITS
    visuals: Visuals | None = None
    scorer: Mapping[str, Any] | None = None
    frame_scores: TaskScores | None = None
    _counts: dict[Any, list[int]] = field(default_factory=dict)
    _scores: Scores = field(default_factory=lambda: Scores(()))

    def __post_init__(self) -> None:
        self.host = host_of(self.model)
        if self.batch_size < 1:
            raise WrongValue(f"batch size: must be at least 1, got {self.batch_size}")
        self._tower_cache = TowerCache(self.model) if self.share_tower else None

    def fingerprint(self, cell: Cell) -> dict[str, Any]:
        """Of a cell on this model."""
        kind, host = self.model.config.model_type, self._host(cell)
        shown = noted(host, cell.task.frames is not None)
        around = (self.identity, self.model.dtype, self.attention, self.device, kind, self.pixels, shown, self.scorer)
        return fingerprint(cell, *around)

    def answer(self, cell: Cell, advance: Callable[[int], None] = lambda count: None) -> list[dict[str, Any]]:
        """Outcomes of all samples of a cell, in order.

        Args:
            cell: what to run.
            advance: called with the number of samples after each batch.
        """
        outcomes: list[dict[str, Any]] = []
        with (
            reduced(self.model, cell.method, **self._given(cell)) if cell.method else nullcontext() as reduction,
            self._tower(reduction),
        ):
            for batch in _batches(cell.task.samples(cell.limit), self.batch_size):
                outcomes += self._batch(cell, batch, reduction)
                advance(len(batch))
        return outcomes

    def measure(self, cell: Cell, advance: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
        """Run a cell: the parts of its result file (see `vtr.eval.run.results`)."""
        started, clock = datetime.now(UTC), time.perf_counter()
        samples = self.answer(cell, advance)
        took = {"started": started.isoformat(timespec="seconds"), "seconds": round(time.perf_counter() - clock, 3)}
        summary = summarise(samples, cell.task.families, self.model.config, self._frozen(cell))
        if cell.task.metrics:
            summary["metrics"] = cell.task.metrics(cell.limit, [sample["prediction"] for sample in samples])
        return {
            "fingerprint": self.fingerprint(cell),
            "conditions": {**conditions(self.batch_size), "tower": "shared" if self.share_tower else "own", **took},
            "summary": summary,
            "samples": samples,
        }

    def _host(self, cell: Cell) -> Any:
        return cell_host(self.host, cell, self.visuals)

    def _frozen(self, cell: Cell) -> list[int]:
        if cell.method is None:
            return []
        return plan(self.model, cell.method, **self._given(cell)).frozen

    def _given(self, cell: Cell) -> dict[str, Any]:
        """Returns what stands beside the method of a cell in `reduced` and `plan`."""
        given: dict[str, Any] = {"processor": self.processor, "visuals": visuals_as(self._host(cell))}
        if cell.reads_frame_scores and self.frame_scores is not None:
            given["frame_scores"] = lambda frames: self._scores(frames)
        return given

    def _tower(self, reduction: Any) -> AbstractContextManager[Any]:
        return self._tower_cache.used_by(reduction) if self._tower_cache else nullcontext()

    def _batch(self, cell: Cell, batch: Sequence[Any], reduction: Any) -> list[dict[str, Any]]:
        host = self._host(cell)
        seen = [seen_by(host, sample) for sample in batch]
        outcomes: dict[int, dict[str, Any]] = {}
        for rows in together(self.processor, [videos for _, videos in seen]):
            outcomes.update(zip(rows, self._asked(cell, [batch[row] for row in rows], [seen[row] for row in rows], reduction), strict=True))
        return [outcomes[row] for row in range(len(batch))]

    def _asked(self, cell: Cell, batch: Sequence[Any], seen: Sequence[Seen], reduction: Any) -> list[dict[str, Any]]:
        """Returns the outcomes of samples that the processor takes at once."""
        questions = [sample.question for sample in batch]
        images, videos = zip(*seen, strict=True)
        host = self._host(cell)
        scored = self._scored(cell, batch, seen)
        inputs = to_model(encode(self.processor, questions, images, videos, host.frame_settings), self.model)
        predictions, elapsed = generate(self.model, self.processor, inputs, cell.answer_length)
        counts = self._tokens(host, questions, seen, inputs, reduction)
        return [
            {
                "id": sample.id,
                "family": sample.family,
                "answer": sample.answer,
                "prediction": prediction,
                "correct": cell.task.outcome(sample, prediction),
                **({"frames": sum(len(video.frames) for video in shown[1]) or len(shown[0])} if cell.task.frames else {}),
                **own,
                **scores,
                "latency_ms": round(elapsed / len(batch), 3),
            }
            for sample, shown, prediction, own, scores in zip(batch, seen, predictions, counts, scored, strict=True)
        ]

    def _scored(self, cell: Cell, batch: Sequence[Any], seen: Sequence[Seen]) -> list[dict[str, Any]]:
        """Scores the frames of samples where a method reads that, and returns what results say of it for every sample."""
        if not cell.reads_frame_scores or self.frame_scores is None or not cell.task.frames:
            return [{} for _ in batch]
        as_frames = self._host(cell).as_frames
        found = self.frame_scores.of(cell.task, batch, [[images] if as_frames else videos for images, videos in seen])
        self._scores = Scores(tuple(video for one in found for video in one.videos)).joined(self.host.pictures)
        return [one.to_dict() for one in found]

    def _tokens(self, host: Any, questions: Sequence[str], seen: Sequence[Seen], inputs: Any, reduction: Any) -> list[dict[str, Any]]:
        """What the images and videos of every row came to: tokens before, left at the end, and at every LLM layer."""
        layers = self.model.config.get_text_config().num_hidden_layers
        images: list[list[dict[str, Any]]] = [[] for _ in questions]
        for image in reduction.report().to_dict()["images"] if reduction else []:
            images[image["row"]].append(image)
        found = []
        rows = zip(questions, seen, images, placeholders(self.model, inputs), prompt_lengths(inputs), strict=True)
        for question, shown, own, slots, length in rows:
            before = [image["visual_tokens"] for image in own] if reduction else self._full_tokens(host, question, shown)
            per_layer = (
                [sum(layer) for layer in zip(*(image["per_layer"] for image in own), strict=True)] if reduction else [sum(before)] * layers
            )
            found.append(
                {
                    "visual_tokens": before,
                    "retained": [len(image["retained"]) for image in own] if reduction else before,
                    "average_tokens": statistics.fmean(per_layer),
                    "per_layer": per_layer,
                    "text_tokens": length - slots,
                    "newlines": [slots - sum(before), sum(image["newlines"] for image in own) if reduction else slots - sum(before)],
                }
            )
        return found

    def _full_tokens(self, host: Any, question: str, shown: Seen) -> list[int]:
        """Returns the visual tokens of a sample's images and videos without newlines, as the model's host lays them out; once per sizes."""
        images, videos = shown
        size = (host.as_frames, *(image.size for image in images), *((len(video.frames), *video.frames[0].size) for video in videos))
        if size not in self._counts:
            inputs = encode(self.processor, [question], [images], [videos], host.frame_settings)
            self._counts[size] = [layout.tokens for layout in visuals_of(host, inputs)]
        return self._counts[size]


def cell_host(host: Any, cell: Cell, visuals: Visuals | None) -> Any:
    """Returns the host as which a model is asked the questions of a cell, see `shown_as`; `visuals` counts only where there are videos."""
    return shown_as(host, True, visuals) if cell.task.frames else host


def summarise(samples: Sequence[Mapping[str, Any]], families: Sequence[str], config: Any, frozen: Sequence[int] = ()) -> dict[str, Any]:
    """Scores with 95 % intervals (shares, 0 to 1), and means over samples of what was measured.

    TFLOPs and the KV cache are of the LLM's prefill of one sample, from the measured token counts (see `vtr.cost`).
    """
    outcomes = {f: [float(s["correct"]) for s in samples if s["family"] == f] for f in families}
    outcomes = {family: values for family, values in outcomes.items() if values}
    shape = TransformerShape.from_config(config.get_text_config())
    lengths = [_lengths(s) for s in samples]
    flops = [prefill_flops(shape, n, frozen, s["text_tokens"]) for n, s in zip(lengths, samples, strict=True)]
    return {
        "samples": len(samples),
        "families": {family: accuracy(v)._asdict() for family, v in outcomes.items()},
        "macro": macro_accuracy(outcomes)._asdict(),
        "visual_tokens": statistics.fmean(sum(s["visual_tokens"]) for s in samples),
        "retained": statistics.fmean(sum(s["retained"]) for s in samples),
        "average_tokens": statistics.fmean(s["average_tokens"] for s in samples),
        "tflops": statistics.fmean(flops) / TERA,
        "kv_mib_fp16": statistics.fmean(kv_bytes(shape, n, 2) for n in lengths) / 2**20,
        "frozen_layers": list(frozen),
        "latency_ms": statistics.median(s["latency_ms"] for s in samples),
        **{name: statistics.fmean(s[name] for s in samples) for name in SCORER if all(name in s for s in samples)},
    }


def _lengths(sample: Mapping[str, Any]) -> list[int]:
    """Tokens of a sample's prompt at every LLM layer; newlines go when visual tokens go."""
    full, (newlines, left) = sum(sample["visual_tokens"]), sample["newlines"]
    return [sample["text_tokens"] + tokens + (newlines if tokens == full else left) for tokens in sample["per_layer"]]


def _batches(samples: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
