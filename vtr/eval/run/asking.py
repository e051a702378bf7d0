"""Images and questions in, greedy answers out: one batch at a time, any host, the processor's own chat template."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from vtr.data.pictures import as_shown
from vtr.hosts._host import host_of
from vtr.models.devices import synchronize
from vtr.types import VtrError

MARK = "<image>"
_GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@contextmanager
def _whole_files() -> Iterator[None]:
    """Makes cut files errors, also where something else in this process (lmms-eval does) has told Pillow to fill them up."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_image(path: str | Path) -> Image.Image:
    """Opens an image file as RGB, turned as its EXIF data says, with the brightness that a viewer gives it (see `as_shown`).

    Raises:
        ValueError: no such file, or more pixels than Pillow holds safe (a small file may unpack to gigabytes).
        VtrError: not an image, a damaged one, or one that cannot be shown.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image: no file {str(path)!r}")
    most = Image.MAX_IMAGE_PIXELS or float("inf")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        if image.width * image.height > most:
            raise Image.DecompressionBombError(f"{image.width} x {image.height}")
        with _whole_files():
            ImageOps.exif_transpose(image, in_place=True)
            return as_shown(image)
    except VtrError as error:
        raise VtrError(f"image: {str(path)!r}: {str(error).removeprefix('image: ')}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"image: {str(path)!r} has too many pixels ({error}), at most {most:.0f}; make it smaller first") from None
    except UnidentifiedImageError:
        raise VtrError(f"image: {str(path)!r} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for truncated and broken files
        raise VtrError(f"image: {str(path)!r} is damaged ({error})") from None


def build_prompt(processor: Any, question: str, images: int) -> str:
    """Returns the chat template filled with one user turn: the images, then the question, or in the order of `<image>` in the question.

    Raises:
        ValueError: the question has another number of `<image>` than there are images.
        VtrError: the processor has no chat template.
    """
    return fill_template(processor, [{"role": "user", "content": build_content(question, images)}])


def build_content(question: str, images: int) -> list[dict[str, str]]:
    """Parts of one turn, see `build_prompt`."""
    marks = question.count(MARK)
    if marks not in (0, images):
        raise ValueError(f"question: has {marks} x {MARK} but {images} image(s) were given; give one image for each, or leave {MARK} out")
    content: list[dict[str, str]] = []
    for index, text in enumerate(question.split(MARK) if marks else [""] * images + [question]):
        if index and index <= images:
            content.append({"type": "image"})
        if text.strip():
            content.append({"type": "text", "text": text.strip() if marks else text})
    return content


def fill_template(processor: Any, turns: Sequence[dict[str, Any]]) -> str:
    """Returns the processor's own chat template filled with `turns`, up to where the answer starts.

    Raises:
        VtrError: the processor has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise VtrError("processor: has no chat template, so the prompt cannot be built; use a checkpoint that has one")
    return processor.apply_chat_template(list(turns), add_generation_prompt=True)


def encode(processor: Any, questions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
    """Returns the model inputs of a batch of questions, see `encode_prompts`.

    Args:
        processor: of the model.
        questions: one per row.
        images: images of each row, in order.
    """
    return encode_prompts(
        processor, [build_prompt(processor, question, len(own)) for question, own in zip(questions, images, strict=True)], images
    )


def encode_prompts(processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
    """Returns the model inputs of a batch of prompts with the chat template filled in, padded on the left.

    Args:
        processor: of the model.
        prompts: one per row.
        images: images of each row, in order.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    several = len(prompts) > 1
    if several and tokenizer.pad_token is None:
        processor, tokenizer = _with_padding(processor)
    flat = [image for own in images for image in own]
    bos = tokenizer.bos_token
    return processor(
        text=prompts,
        images=flat or None,
        padding=several,
        padding_side="left",
        add_special_tokens=not (bos and prompts[0].startswith(bos)),
        return_tensors="pt",
    )


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


def prefill_ms(model: Any, inputs: Any) -> float:
    """Returns the milliseconds of one pass over the whole prompt, vision tower and cache included, up to the first new token."""
    synchronize(model)
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=1, **_GREEDY)
    synchronize(model)
    return (time.perf_counter() - start) * 1000


def placeholders(model: Any, inputs: Any) -> list[int]:
    """Placeholders of each row of the inputs: its visual tokens with newlines before any reduction."""
    return (inputs["input_ids"] == host_of(model).placeholder_ids["image"]).sum(1).tolist()


def prompt_lengths(inputs: Any) -> list[int]:
    """Returns the real positions of each row, placeholders included."""
    return inputs["attention_mask"].sum(1).tolist()
