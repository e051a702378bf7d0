"""Images or videos and questions in, greedy answers out: one batch at a time, any host, the processor's own chat template."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from vtr.data.frames import Video, video_of
from vtr.hosts._layout import Layout
from vtr.hosts._protocol import host_of, one_video
from vtr.models.devices import synchronize
from vtr.types import VtrError
from vtr.types.errors import WrongValue

MARK, VIDEO_MARK = "<image>", "<video>"
_MARKS = re.compile(f"({MARK}|{VIDEO_MARK})")
_GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


def seen_of(sample: Any, whole: bool) -> tuple[list[Image.Image], list[Video]]:
    """Returns the images and the videos of a sample of a task, see `vtr.eval.tasks.Sample`.

    Args:
        sample: with `frames`, `visuals`, `images` or an `image`.
        whole: videos stay videos; else their frames become images.
    """
    visuals = getattr(sample, "visuals", None)
    if visuals is None:
        frames = getattr(sample, "frames", None)
        visuals = [video_of(frames)] if frames is not None else getattr(sample, "images", None) or [sample.image]
    videos = [one for one in visuals if whole and isinstance(one, Video)]
    shown = [one for one in visuals if not (whole and isinstance(one, Video))]
    return [image for one in shown for image in (one.frames if isinstance(one, Video) else [one])], videos


def build_prompt(processor: Any, question: str, images: int, videos: int = 0) -> str:
    """Returns the chat template filled with one user turn: images and videos, then the question, or as `<image>` and `<video>` in it say.

    Raises:
        ValueError: the question has another number of `<image>` than there are images, or of `<video>` than there are videos.
        VtrError: the processor has no chat template.
    """
    return fill_template(processor, [{"role": "user", "content": build_content(question, images, videos)}])


def build_content(question: str, images: int, videos: int = 0) -> list[dict[str, str]]:
    """Parts of one turn, see `build_prompt`."""
    for mark, count in ((MARK, images), (VIDEO_MARK, videos)):
        check_marks(question, mark, count)
    parts = _MARKS.split(question)
    content = [{"type": "image"} for _ in range(images) if MARK not in parts]
    content += [{"type": "video"} for _ in range(videos) if VIDEO_MARK not in parts]
    for part in parts:
        if part in (MARK, VIDEO_MARK):
            content.append({"type": part.strip("<>")})
        elif part.strip():
            content.append({"type": "text", "text": part.strip() if len(parts) > 1 else part})
    return content


def check_marks(question: str, mark: str, count: int) -> None:
    """Refuses a question that says where images or videos go, but not of `count` of them.

    Raises:
        ValueError: it has another number of marks.
    """
    marks, kind = question.count(mark), mark.strip("<>")
    if marks not in (0, count):
        raise WrongValue(f"question: has {marks} x {mark} but {count} {kind}(s) were given; give one {kind} for each, or leave {mark} out")


def fill_template(processor: Any, turns: Sequence[dict[str, Any]]) -> str:
    """Returns the processor's own chat template filled with `turns`, up to where the answer starts.

    Raises:
        VtrError: the processor has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise VtrError("processor: has no chat template, so the prompt cannot be built; use a checkpoint that has one")
    return processor.apply_chat_template(list(turns), add_generation_prompt=True)


def encode(
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    videos: Sequence[Sequence[Video]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Returns the model inputs of a batch of questions, see `encode_prompts`.

    Args:
        processor: of the model.
        questions: one per row.
        images, videos: of each row, in order.
        settings: see `encode_prompts`.
    """
    videos = [()] * len(questions) if videos is None else videos
    rows = zip(questions, images, videos, strict=True)
    prompts = [build_prompt(processor, asked, len(one), len(two)) for asked, one, two in rows]
    return encode_prompts(processor, prompts, images, videos, settings)


def encode_prompts(
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    videos: Sequence[Sequence[Video]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Returns the model inputs of a batch of prompts with the chat template filled in, padded on the left.

    Args:
        processor: of the model.
        prompts: one per row.
        images, videos: of each row, in order.
        settings: of the processor, for this call; `Host.frame_settings` where images are frames.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    several = len(prompts) > 1
    _check_places(processor, prompts, videos)
    shown = [video for own in videos or () for video in own]
    _check_lengths(processor, shown)
    if several and tokenizer.pad_token is None:
        processor, tokenizer = _with_padding(processor)
    flat = [image for own in images for image in own]
    bos = tokenizer.bos_token
    return processor(
        text=prompts,
        images=flat or None,
        **_as_sampled(shown),
        padding=several,
        padding_side="left",
        add_special_tokens=not (bos and prompts[0].startswith(bos)),
        return_tensors="pt",
        **(settings or {}),
    )


def together(processor: Any, videos: Sequence[Sequence[Video]]) -> list[list[int]]:
    """Returns the numbers of the rows of a batch, in groups that the processor takes at once: some want as many frames in every video."""
    if _packs(processor):
        return [list(range(len(videos)))]
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, own in enumerate(videos):
        groups.setdefault(tuple(sorted({len(video.frames) for video in own})), []).append(row)
    return list(groups.values())


def _packs(processor: Any) -> bool:
    """Tells whether videos go into one row of patches, and not side by side into a tensor."""
    return "video_grid_thw" in getattr(getattr(processor, "video_processor", None), "model_input_names", ())


def _check_lengths(processor: Any, videos: Sequence[Video]) -> None:
    """Refuses videos that the processor cannot lay side by side.

    Raises:
        VtrError: they have different numbers of frames.
    """
    counts = sorted({len(video.frames) for video in videos})
    if len(counts) > 1 and not _packs(processor):
        raise VtrError(
            f"processor: takes videos of one number of frames at a time, got {' and '.join(map(str, counts))}; show {counts[0]} frames of each, or "
            "ask about one at a time"
        )


def _check_places(processor: Any, prompts: Sequence[str], videos: Sequence[Sequence[Video]] | None) -> None:
    """Refuses a chat template that leaves videos out.

    Raises:
        VtrError: a prompt has another number of placeholders than videos.
    """
    mark = getattr(processor, "video_token", None)
    for prompt, own in zip(prompts, videos or (), strict=False):
        if own and (mark is None or prompt.count(mark) != len(own)):
            places = prompt.count(mark) if mark else 0
            raise VtrError(
                f"processor: its chat template has places for {places} video(s) in this prompt, got {len(own)}; give frames as images (with "
                "visuals='prompt' they are one video), or use a checkpoint whose template knows videos"
            )


def _as_sampled(videos: Sequence[Video]) -> dict[str, Any]:
    """Returns what a processor is told of videos: their frames, that these are all that is to be seen, and when each is shown."""
    if not videos:
        return {}
    return {
        "videos": [list(video.frames) for video in videos],
        "do_sample_frames": False,
        "video_metadata": [video.metadata for video in videos],
    }


def _with_padding(processor: Any) -> tuple[Any, Any]:
    """Copies of a processor and its tokenizer, which pads with its end token; the user's own stay as they are."""
    tokenizer = copy.deepcopy(getattr(processor, "tokenizer", processor))
    if tokenizer.eos_token is None:
        raise VtrError("processor: its tokenizer has no padding token and no end token, so prompts cannot be batched; use --batch-size 1")
    tokenizer.pad_token = tokenizer.eos_token
    if not hasattr(processor, "tokenizer"):
        return tokenizer, tokenizer
    padding = copy.copy(processor)
    padding.tokenizer = tokenizer
    return padding, tokenizer


def padding_id(processor: Any) -> int | None:
    """Returns the token that fills rows up: the tokenizer's padding token, or its end token where it has none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def to_model(inputs: Any, model: Any) -> Any:
    """Inputs on the model's device, floats in its dtype."""
    return inputs.to(device=model.device, dtype=model.dtype)


def generate(model: Any, processor: Any, inputs: Any, max_new_tokens: int, **settings: Any) -> tuple[list[str], float]:
    """Returns the answers of a batch and the milliseconds that they took together, see `generate_tokens`."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens, elapsed = generate_tokens(model, processor, inputs, max_new_tokens, **settings)
    return [answer.strip() for answer in tokenizer.batch_decode(tokens, skip_special_tokens=True)], elapsed


def generate_tokens(model: Any, processor: Any, inputs: Any, max_new_tokens: int, **settings: Any) -> tuple[Tensor, float]:
    """Returns the new tokens of a batch `(B, new)` int64 and the milliseconds of generation; inputs are on the device already.

    Args:
        model, processor: from `load_model`.
        inputs: from `encode`.
        max_new_tokens: of the longest answer.
        **settings: of `model.generate`; without any the answers are greedy.
    """
    synchronize(model)
    start = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=padding_id(processor), **{**_GREEDY, **settings})
    synchronize(model)
    return out[:, inputs["input_ids"].shape[1] :], (time.perf_counter() - start) * 1000


def first_logits(model: Any, processor: Any, inputs: Any) -> Tensor:
    """Returns the logits at the first place of every answer `(B, vocabulary)`; inputs are on the device already."""
    settings = {"max_new_tokens": 1, "pad_token_id": padding_id(processor), "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **settings, **_GREEDY).logits[0]


def prefill_ms(model: Any, inputs: Any) -> float:
    """Returns the milliseconds of one pass over the whole prompt, vision tower and cache included, up to the first new token."""
    synchronize(model)
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=1, **_GREEDY)
    synchronize(model)
    return (time.perf_counter() - start) * 1000


def placeholders(model: Any, inputs: Any) -> list[int]:
    """Placeholders of each row of the inputs: its visual tokens with newlines before any reduction."""
    ids = set(host_of(model).placeholder_ids.values())
    return sum((inputs["input_ids"] == one).sum(1) for one in ids).tolist()


def visuals_of(host: Any, inputs: Any) -> list[Layout]:
    """Returns the layouts of what a processor made of prompts: of all images, then of all videos, in order; of a host whose images are frames that
    of the video of the one prompt."""
    found = list(host.images_of(inputs))
    if host.as_frames and found:
        return [one_video(host, found)]
    if inputs.get("pixel_values_videos") is not None:
        found += host.layouts("video", {**inputs, "pixel_values": inputs["pixel_values_videos"]})
    return found


def prompt_lengths(inputs: Any) -> list[int]:
    """Returns the real positions of each row, placeholders included."""
    return inputs["attention_mask"].sum(1).tolist()
