"""What tiny-llava-video makes of `shapes-video`, with all visual tokens, with some, with few frames, and with frames in a wrong order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtr.data.shapes_video import VideoSample, constant_accuracy
from vtr.markdown import markdown_table

from .check import Choice, Chosen, accuracy, answers, some
from .video import PER_FRAME

Scores = Mapping[str, tuple[float, float, float]]
GUESSED = {  # accuracy in percent of who does not know when a frame was
    "one frame": {"order": 50.0, "motion": 25.0},
    "one frame, repeated": {"order": 50.0, "motion": 25.0},
    "frames shuffled": {"order": 50.0, "motion": 50.0},  # the axis of a motion is still seen
}
NEAR = 10.0  # points
TWO_OF_EIGHT = (2, 6)


class Floor(NamedTuple):
    """One rule, what was found, and whether it holds."""

    rule: str
    found: str
    passed: bool


def see_videos(model, processor, samples: Sequence[VideoSample]) -> Tensor:
    """Projected visual tokens `(B, N, D)` of the samples' frames."""
    inputs = processor.video_processor([sample.frames for sample in samples], do_sample_frames=False, return_tensors="pt").to(model.device)
    tokens = model.model.get_video_features(**inputs).pooler_output
    return torch.stack(tuple(tokens)).view(len(samples), -1, tokens[0].shape[-1])


def _tokens(frames: Tensor) -> Tensor:
    """Indices of the tokens of frames `(B, F)` in their order `(B, F * 36)`."""
    return (frames[..., None] * PER_FRAME + torch.arange(PER_FRAME, device=frames.device)).flatten(1)


def _any_frame(order: Tensor) -> Tensor:
    return order[:, ::PER_FRAME].argmax(1, keepdim=True)


def _given(kept: Tensor) -> Chosen:
    """Tokens as if they were all."""
    return Chosen(kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept), kept.shape[1])


def one_frame(order: Tensor) -> Chosen:
    """One frame, any, as a video of one frame."""
    return _given(_tokens(_any_frame(order)))


def one_frame_at_its_place(order: Tensor) -> Chosen:
    """One frame, any, at its positions, which say when it was."""
    kept = _tokens(_any_frame(order))
    return Chosen(kept, kept, order.shape[1])


def still(order: Tensor) -> Chosen:
    """One frame, any, in place of all of them."""
    return _given(_tokens(_any_frame(order).expand(-1, order.shape[1] // PER_FRAME)))


def shuffled(order: Tensor) -> Chosen:
    """All frames in any order."""
    return _given(_tokens(order[:, ::PER_FRAME].argsort(1)))


def two_frames(order: Tensor) -> Chosen:
    """Two frames of eight, evenly, as a video of two frames."""
    return _given(_tokens(torch.tensor(TWO_OF_EIGHT, device=order.device).expand(len(order), -1)))


def choices(frames: int) -> dict[str, Choice]:
    """Returns what is measured on clips of 8 or 16 frames."""
    total = frames * PER_FRAME
    shares = {f"random {total // part}": some(total // part) for part in (2, 4, 8)}
    if frames > 8:
        return {"full": some(None), **shares}
    of_frames: dict[str, Choice] = {
        "2 of 8 frames": two_frames,
        "one frame": one_frame,
        "one frame, repeated": still,
        "one frame, at its place": one_frame_at_its_place,
        "frames shuffled": shuffled,
    }
    return {"full": some(None), **shares, **of_frames, "none": some(0)}


def measure(model, processor, samples: Sequence[VideoSample], frames: int, batch: int = 20) -> dict[str, Scores]:
    """Returns the accuracies in percent of every choice, see `accuracy`."""
    found = answers(model, processor, samples, choices(frames), "video", see_videos, batch)
    return {name: accuracy(samples, own) for name, own in found.items()}


def check_floors(scores: Mapping[str, Scores], frames: int = 8) -> list[Floor]:
    """Checks the floors of clips of 8 frames."""
    full, none = scores["full"], scores["none"]
    gaps = {family: none[family][0] - constant_accuracy(family, frames) for family in none if family != "macro"}
    widest = max(gaps, key=lambda family: abs(gaps[family]))
    quarter = f"random {frames * PER_FRAME // 4}"
    drop = full["macro"][0] - scores[quarter]["macro"][0]
    floors = [
        Floor("full: macro accuracy at least 85 %", _percent(full["macro"]), full["macro"][0] >= 85),
        Floor("none: within 10 points of the best constant answer", f"{widest} {gaps[widest]:+.1f}", abs(gaps[widest]) <= NEAR),
        Floor(f"{quarter}: at least 8 points below full", f"{drop:.1f} below", drop >= 8),
        Floor("2 of 8 frames: needle under 40 %", _percent(scores["2 of 8 frames"]["needle"]), scores["2 of 8 frames"]["needle"][0] < 40),
    ]
    for name, guessed in GUESSED.items():
        for family, chance in guessed.items():
            value = scores[name][family]
            floors.append(Floor(f"{name}: {family} under {chance + NEAR:.0f} %", _percent(value), value[0] < chance + NEAR))
    return floors


def _percent(score: tuple[float, float, float]) -> str:
    return f"{score[0]:.1f} ({score[1]:.1f}-{score[2]:.1f})"


def table(scores: Mapping[str, Scores], frames: int) -> str:
    """Returns the accuracies as a Markdown table."""
    families = list(scores["full"])
    body = [
        [name if name != "full" else f"full ({frames * PER_FRAME})", *(_percent(own[f]) for f in families)] for name, own in scores.items()
    ]
    constants = [constant_accuracy(family, frames) for family in families if family != "macro"]
    body.append(["best constant answer", *(f"{value:.1f}" for value in (*constants, sum(constants) / len(constants)))])
    return markdown_table(["visual tokens", *families], body)


def section(scores: Mapping[int, Mapping[str, Scores]], floors: Sequence[Floor], scope: str) -> str:
    """Returns the Markdown of a model card: accuracies by the number of frames, and what the floors say."""
    lines = [f"Accuracy in percent on `shapes-video` v1 ({scope}) with 95 % intervals over samples. Tokens that stay keep their positions."]
    for frames, own in scores.items():
        lines += ["", f"{frames} frames, {PER_FRAME} visual tokens each:", "", table(own, frames)]
    verdicts = [[floor.rule, floor.found, "pass" if floor.passed else "MISSED"] for floor in floors]
    return "\n".join([*lines, "", markdown_table(["floor (8 frames)", "found", ""], verdicts)])
