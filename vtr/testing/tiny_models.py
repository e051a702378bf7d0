"""Small random-initialised models of the real transformers classes, and batches of prompts for them.

Weights are spread so that outputs differ visibly. Models are cached and shared: a test that changes one puts it back. `FAMILIES` says how the
models of a kind are built, see `vtr.testing.families`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from vtr.testing.families import IMAGE, PAD, SIDE, VIDEO, Clip, Family, Llava, LlavaNext, Shot, Visual
from vtr.testing.joined import Gemma3, Gemma4, InternVL
from vtr.testing.onevision import LlavaNextVideo, OneVision
from vtr.testing.pixtral import Pixtral
from vtr.testing.qwen import GlmV, Qwen35, QwenVL
from vtr.testing.smolvlm import SmolVLM
from vtr.testing.videos import NextClips, OneVisionClips, QwenClips

# Left to right: text token counts and images. Odd sizes on purpose: (96, 30) and (70, 31) are unpadded, (40, 90) is wide.
ROWS = ((4, Shot(90, 40), 6), (3, Shot(96, 96), 2, Shot(70, 31), 3))
ONE = ((4, Shot(96, 30), 6),)
ONE_EACH = ((4, Shot(90, 40), 6), (3, Shot(96, 96), 5))
WITH_TEXT_ONLY = ((4, Shot(40, 90), 6), (9,), (3, Shot(96, 30), Shot(48, 48), 5))
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Arguments with an entry for every token of a prompt."""
ANSWER = 3
"""New tokens that `generate` asks for: the first comes from the prefill, the others from the cache."""
PIXELS_OF: dict[type, str] = {Shot: "pixel_values", Clip: "pixel_values_videos"}
"""Arguments that hold the pixels of images and of videos."""

FAMILIES: dict[str, Family] = {
    "llava": Llava(),
    "llava_siglip": Llava(siglip=True),
    "llava_next": LlavaNext(),
    "llava_qwen": Llava(backbone="qwen2"),
    "llava_next_siglip": LlavaNext(siglip=True),
    "llava_next_video": LlavaNextVideo(),
    "llava_onevision": OneVision(),
    "llava_onevision_max": OneVision(limit=1),
    "internvl": InternVL(),
    "smolvlm": SmolVLM("smolvlm"),
    "idefics3": SmolVLM("idefics3"),
    "gemma3": Gemma3(),
    "gemma4": Gemma4(),
    "gemma4_small": Gemma4(small=True),
    "gemma4_unified": Gemma4(unified=True),
    "mistral3": Pixtral(2),
    "ministral3": Pixtral(2, "ministral3"),
    "llava_pixtral": Pixtral(1),
    "qwen2_vl": QwenVL("qwen2_vl"),
    "qwen2_5_vl": QwenVL("qwen2_5_vl"),
    "qwen3_vl": QwenVL("qwen3_vl"),
    "qwen3_vl_moe": QwenVL("qwen3_vl_moe"),
    "qwen3_5": Qwen35(),
    "qwen3_5_moe": Qwen35(moe=True),
    "glm4v": GlmV(),
    "glm4v_moe": GlmV(moe=True),
    "llava_next_video_mixed": NextClips(mixed=True),
    "llava_onevision_mixed": OneVisionClips(mixed=True),
    "qwen2_vl_mixed": QwenClips("qwen2_vl", mixed=True),
    "qwen2_5_vl_mixed": QwenClips("qwen2_5_vl", mixed=True),
    "qwen3_vl_mixed": QwenClips("qwen3_vl", mixed=True),
    "llava_next_video_clips": NextClips(),
    "llava_onevision_clips": OneVisionClips(),
    "qwen2_vl_clips": QwenClips("qwen2_vl"),
    "qwen2_5_vl_clips": QwenClips("qwen2_5_vl"),
    "qwen3_vl_clips": QwenClips("qwen3_vl"),
}
"""Kind -> family. Their models have `model.config._attn_implementation`, and take `input_ids`, `attention_mask` and `pixel_values`."""
KINDS = ("llava", "llava_siglip", "llava_next")
"""One per mechanism: CLS token, no CLS token, AnyRes."""
ALL_KINDS = (*KINDS, "llava_qwen", "llava_next_siglip")
OTHER_KINDS = tuple(kind for kind in FAMILIES if kind not in ALL_KINDS and not kind.endswith(("_clips", "_mixed")))
MECHANISMS = ("llava_onevision_max", "internvl", "gemma3", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""One per mechanism beyond LLaVA's: views of different grids, joined tower, images that see themselves in windows, packed tower with windows,
features added behind the LLM's first layers, layers of linear attention."""
VIDEO_KINDS = tuple(kind for kind in FAMILIES if kind.endswith("_clips"))
"""Every image that a test asks for is a video there."""
MIXED_KINDS = tuple(kind for kind in FAMILIES if kind.endswith("_mixed"))
"""The same models with images and the videos that a test asks for."""
MIXED = ((4, Shot(90, 40), 3, Clip(48, 32), 6), (3, Clip(48, 48), 2, Shot(70, 31), 2, Clip(32, 64), 3))
"""Prompts with images and videos."""


def build(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Builds a fresh model.

    Args:
        kind: one of `FAMILIES`.
        attention: attention implementation.
        dtype: of the weights; all dtypes round the same float32 weights.
        **changes: configuration fields; `text=` and `tower=` hold those of the LLM and of the tower, `backbone=` is the LLM's model type.
    """
    cls, config = FAMILIES[kind].unbuilt(**changes)
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = cls(config)
        for weight in model.parameters():
            varied = weight.ndim == 1 and weight.shape[0] in (32, 64) and not bool((weight == weight[0]).all())
            if weight.ndim > 1 or varied:
                nn.init.normal_(weight, std=0.15)
    return model.to(dtype).eval().requires_grad_(False)


def model_of(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """Returns the shared model of that kind; see `build`."""
    return _shared(kind, attention, dtype)


_shared = cache(build)


@cache
def packing(kind: str, shot: Visual) -> Tensor:
    """Returns what each placeholder of an image stands for, `(tokens, 4)` int64: view, row, column, newline."""
    return FAMILIES[kind].packing(partial(model_of, kind), shot)


def views_of(kind: str, shot: Visual) -> int:
    """Returns how many inputs of the tower an image becomes: 1, or thumbnail and crops."""
    return len(FAMILIES[kind].grids(shot))


def tokens_of(kind: str, shot: Visual) -> int:
    """Returns the visual tokens of an image, newlines excluded."""
    return int((packing(kind, shot)[:, 3] == 0).sum())


def most_tokens(kind: str) -> int:
    """Returns the most visual tokens that one image can have, newlines excluded; of videos, of those in `ROWS`."""
    if kind in VIDEO_KINDS:
        return max(batch_of(kind).counts())
    return SIDE * SIDE * (5 if FAMILIES[kind].anyres else 1)


@dataclass(frozen=True)
class Batch:
    """A batch of prompts: the model's keyword arguments, and which images are in which row."""

    kind: str
    inputs: dict[str, Tensor]
    shots: tuple[tuple[Visual, ...], ...]

    @property
    def valid(self) -> Tensor:
        """`(B, S)` bool: real tokens."""
        return self.inputs["attention_mask"].bool()

    @property
    def visual(self) -> Tensor:
        """`(B, S)` bool: placeholders, newlines included."""
        ids = self.inputs["input_ids"]
        videos = any(isinstance(shot, Clip) for row in self.shots for shot in row)  # without one the id is text
        return (ids == IMAGE) | (ids == VIDEO) if videos else ids == IMAGE

    @property
    def positions(self) -> Tensor:
        """Position ids as `generate` counts them, `(B, S)` int64 or with a first axis for several kinds."""
        return FAMILIES[self.kind].positions(partial(model_of, self.kind), self.inputs)

    def counts(self) -> list[int]:
        """Visual tokens of every image, row by row."""
        return [tokens_of(self.kind, shot) for row in self.shots for shot in row]

    def row(self, index: int) -> Batch:
        """One prompt alone, without padding."""
        real = self.valid[index]
        inputs = {name: self.inputs[name][index : index + 1, real] for name in PER_TOKEN if name in self.inputs}
        start = sum(len(row) for row in self.shots[:index])
        return Batch(self.kind, inputs | self.images(start, start + len(self.shots[index])), (self.shots[index],))

    def images(self, start: int, stop: int) -> dict[str, Tensor]:
        """Arguments of some of the images, row by row."""
        shots, family = [shot for row in self.shots for shot in row], FAMILIES[self.kind]
        found: dict[str, Tensor] = {}
        for kind, name in PIXELS_OF.items():
            before, own = ([shot for shot in part if isinstance(shot, kind)] for part in (shots[:start], shots[start:stop]))
            if own:
                first, count = (sum(len(family.pixels(shot, torch.Generator())) for shot in part) for part in (before, own))
                found |= {name: self.inputs[name][first : first + count], **family.beside(own)}
        return found

    def changed(self, **inputs: Tensor) -> Batch:
        """The same batch with other arguments."""
        return replace(self, inputs={**self.inputs, **inputs})

    def to(self, dtype: torch.dtype) -> Batch:
        """The same batch with pixel values in another dtype."""
        return self.changed(**{name: self.inputs[name].to(dtype) for name in PIXELS_OF.values() if name in self.inputs})

    def followed_by(self, tokens: Tensor) -> Batch:
        """The same prompts with generated tokens `(B, T)` at their end."""
        zeros = torch.zeros_like(tokens)
        new = {"input_ids": tokens, "attention_mask": zeros + 1, "mm_token_type_ids": zeros, "token_type_ids": zeros}
        return self.changed(**{name: torch.cat([self.inputs[name], new[name]], 1) for name in PER_TOKEN if name in self.inputs})


def batch_of(
    kind: str, rows: Iterable[tuple[int | Visual, ...]] = ROWS, pad: str = "left", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Batch:
    """Makes prompts of random text and random images.

    Args:
        kind: as for `build`.
        rows: prompts; an int is that many text tokens, a `Shot` an image.
        pad: `left` or `right`.
        dtype: of the pixel values.
        seed: another seed gives other text and other images.
    """
    family, random = FAMILIES[kind], torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = []
    pixels: dict[str, list[Tensor]] = {}
    shots: list[tuple[Visual, ...]] = []
    for row in rows:
        prompt: list[int] = []
        parts = [part if isinstance(part, int) else family.shown(part) for part in row]
        for part in parts:
            if isinstance(part, int):
                prompt += torch.randint(5, 90, (part,), generator=random).tolist()
                continue
            before, behind = family.around()
            prompt += [*before, *family.placeholders(part, len(packing(kind, part))), *behind]
            pixels.setdefault(PIXELS_OF[type(part)], []).append(family.pixels(part, random))
        prompts.append(prompt)
        shots.append(tuple(part for part in parts if not isinstance(part, int)))
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if pad == "left" else slice(0, len(prompt))
        ids[i, where], mask[i, where] = torch.tensor(prompt), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    for cls, name in PIXELS_OF.items():
        if name in pixels:
            inputs[name] = torch.cat(pixels[name]).to(dtype)
            inputs |= family.beside([shot for row in shots for shot in row if isinstance(shot, cls)])
    if family.types is not None:
        inputs[family.types] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return Batch(kind, inputs, tuple(shots))


def generate(model: Any, batch: Batch, new_tokens: int = ANSWER, **settings: Any) -> Any:
    """Returns the greedy answer with its logits."""
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **FAMILIES[batch.kind].generation, **settings}
    return model.generate(**batch.inputs, max_new_tokens=new_tokens, **settings)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns what a reduction may touch and has to put back: attribute names, hook counts and forwards of every module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        name: (sorted(module.__dict__), *(len(getattr(module, kind)) for kind in kinds), module.__dict__.get("forward"), module.training)
        for name, module in model.named_modules()
    }


def beam_rows() -> tuple[tuple[int | Shot, ...], ...]:
    """Returns prompts for beam search: transformers 5.17 mixes up the images of a prompt with several (also unreduced), later ones do not."""
    from transformers.generation.utils import GenerationMixin

    return ROWS if hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation") else ONE_EACH
