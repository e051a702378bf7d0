"""Checkpoint folders like the embedded ones, with random weights: what commands and evaluation are tested on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vtr.models.loading import load_model

_PLACES: list[TemporaryDirectory] = []  # removed when the tests end


@cache
def shared_model(*arguments: Any, **settings: Any) -> tuple[Any, Any]:
    """Model and processor of `load_model`, for tests that leave both as they are: every other test with the same arguments gets them, too."""
    return load_model(*arguments, **settings)


@cache
def random_checkpoint(next_: bool = False) -> Path:
    """A folder that plain `from_pretrained` loads: real processor, 576 visual tokens (or AnyRes), 3 layers of width 32."""
    import torch

    from scripts.tiny.export import export
    from scripts.tiny.model import Sizes, build_model
    from scripts.tiny.tokenizer import build_tokenizer

    place = TemporaryDirectory(prefix="vtr-test-")
    _PLACES.append(place)
    folder = Path(place.name) / ("random-next" if next_ else "random")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(build_tokenizer(), Sizes(width=32, tower_layers=3, llm_layers=3, heads=2, intermediate=64), next_=next_)
    export(model, folder)
    return folder


@cache
def random_qwen(most_pixels: int = 64 * 96) -> Path:
    """A Qwen2.5-VL folder: 8 pixels to a patch, 2 x 2 patches to a token, from 4 tokens to 24 unless its processor is told otherwise."""
    import transformers

    from vtr.testing.qwen import QwenVL

    marks = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    tokenizer = _tokenizer(marks, {"image_token": marks[1], "video_token": marks[3]})
    start, image, end, video = tokenizer.convert_tokens_to_ids(list(marks))
    kind, config = QwenVL("qwen2_5_vl").unbuilt(
        text={"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    )
    config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id = image, video, start, end
    grid = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 32 * 32, "max_pixels": most_pixels}
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**grid),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(**grid),
        chat_template=_template("".join(marks[:3]), "".join((marks[0], marks[3], marks[2]))),
    )
    return _saved("random-qwen", kind, config, processor)


@cache
def random_internvl() -> Path:
    """An InternVL folder: tiles of 6 x 6 patches that become 3 x 3 tokens, up to four tiles and a thumbnail of an image."""
    import transformers

    from vtr.testing.joined import InternVL

    marks = ("<img>", "<IMG_CONTEXT>", "</img>", "<video>")
    names = ("start_image_token", "context_image_token", "end_image_token", "video_token")
    tokenizer = _tokenizer(marks, dict(zip(names, marks, strict=True)))
    kind, config = InternVL().unbuilt(
        text={"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    )
    config.image_token_id = tokenizer.convert_tokens_to_ids(marks[1])
    side = dict(zip(("height", "width"), config.vision_config.image_size, strict=True))
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=side, max_patches=4),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(size=side),
        image_seq_length=9,
        chat_template=_template(marks[1]),
    )
    return _saved("random-internvl", kind, config, processor)


@cache
def random_gemma4() -> Path:
    """A Gemma 4 folder: 8 pixels to a patch, 2 x 2 patches to a token, a budget of 280 tokens an image unless its processor is told otherwise."""
    import transformers

    from vtr.testing.joined import Gemma4

    marks = ("<boi>", "<soft>", "<eoi>", "<sound>", "<boa>", "<eoa>")
    names = ("boi_token", "image_token", "eoi_token", "audio_token", "boa_token", "eoa_token")
    tokenizer, size = _tokenizer(marks, dict(zip(names, marks, strict=True))), {"patch_size": 8, "pooling_kernel_size": 2}
    processor = transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessor(**size),
        tokenizer=tokenizer,
        video_processor=transformers.Gemma4VideoProcessor(**size),
        chat_template=_template("<soft>"),
    )
    kind, config = Gemma4().unbuilt(
        text={"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    )
    config.boi_token_id, config.image_token_id, config.eoi_token_id = tokenizer.convert_tokens_to_ids(list(marks[:3]))
    config.audio_token_id, config.video_token_id = tokenizer.convert_tokens_to_ids([marks[3], processor.video_token])
    return _saved("random-gemma4", kind, config, processor)


@cache
def random_next_video() -> Path:
    """A LLaVA-NeXT-Video folder: frames of 48 x 48 pixels, 6 x 6 patches that become 3 x 3 tokens; images are AnyRes."""
    import transformers

    from vtr.testing.families import PINPOINTS, PIXELS, SIDE
    from vtr.testing.onevision import LlavaNextVideo

    tokenizer = _tokenizer(("<video>",), {"image_token": "<image>", "video_token": "<video>"})
    kind, config = LlavaNextVideo().unbuilt(
        text={"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    )
    config.image_token_id, config.video_token_id = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    size = {"size": {"shortest_edge": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}}
    processor = transformers.LlavaNextVideoProcessor(
        image_processor=transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaNextVideoVideoProcessor(**size),
        patch_size=PIXELS // SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>", "<video>"),
    )
    return _saved("random-next-video", kind, config, processor)


@cache
def random_onevision() -> Path:
    """A LLaVA-OneVision folder: frames of 48 x 48 pixels, 6 x 6 patches that become 3 x 3 tokens, and a newline behind a video."""
    import transformers

    from vtr.testing.families import PINPOINTS, PIXELS, SIDE
    from vtr.testing.onevision import OneVision

    tokenizer = _tokenizer(("<video>",), {"image_token": "<image>", "video_token": "<video>"})
    kind, config = OneVision().unbuilt(
        text={"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    )
    config.image_token_id, config.video_token_id = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    size = {"height": PIXELS, "width": PIXELS}
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=SIDE**2,
        vision_feature_select_strategy="full",
        chat_template=_template("<image>", "<video>"),
    )
    return _saved("random-onevision", kind, config, processor)


def _tokenizer(marks: tuple[str, ...], named: dict[str, str]) -> Any:
    """The tokenizer of tiny-llava with the marks of another family; `named` gives each its attribute."""
    from transformers import PreTrainedTokenizerFast

    from scripts.tiny.tokenizer import build_tokenizer

    base = build_tokenizer()
    base.add_special_tokens({"additional_special_tokens": list(marks)})
    roles = ("pad", "bos", "eos", "unk")
    given = {f"{role}_token": f"<{role}>" for role in roles}
    return PreTrainedTokenizerFast(tokenizer_object=base.backend_tokenizer, extra_special_tokens=named, padding_side="left", **given)


def _template(image: str, video: str = "") -> str:
    """A chat template as that of tiny-llava, with other texts for an image and a video; without a text for videos they are left out."""
    from scripts.tiny.tokenizer import CHAT_TEMPLATE

    text = "{% elif part['type'] == 'text' %}"
    places = CHAT_TEMPLATE.replace(r"<image>\n", image).replace("<image>\n", image)
    return places.replace(text, f"{{% elif part['type'] == 'video' %}}{{{{ '{video}' }}}}{text}") if video else places


def _saved(name: str, kind: Any, config: Any, processor: Any) -> Path:
    import torch

    place = TemporaryDirectory(prefix="vtr-test-")
    _PLACES.append(place)
    folder = Path(place.name) / name
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(4, 119))]
LONGEST = 12
"""Tokens of a segment that the text tower of `random_clip` reads, BOS and EOS included."""


def random_clip(folder: Path, vision: Any) -> Path:
    """Writes a CLIP checkpoint with random weights whose vision tower is configured as `vision`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    text = {"vocab_size": 119, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"max_position_embeddings": LONGEST, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return folder
