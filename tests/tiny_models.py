"""Small random-initialised models of the real transformers classes, and batches of prompts for them.

Every model has an LLM of 5 layers (hidden 64, grouped queries) behind a tower of 4 layers (width 32) with 6 x 6 patches of 8 pixels.
Weights are spread so that outputs differ visibly. Models are cached and shared: a test that changes one puts it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IMAGE, PAD, VOCABULARY, SIDE, PIXELS, LAYERS, TOWER_LAYERS = 100, 0, 120, 6, 48, 5, 4
PINPOINTS = [[48, 96], [96, 48], [96, 96]]
LLM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": TOWER_LAYERS,
    "num_attention_heads": 4,
    "image_size": PIXELS,
    "patch_size": PIXELS // SIDE,
}

torch.set_num_threads(1)  # tensors this small are only slowed down by a second thread, badly so when the other core is busy


class Shot(NamedTuple):
    """One image of a prompt; the size in pixels matters for AnyRes only."""

    height: int = PIXELS
    width: int = PIXELS


# Left to right: text token counts and images. Odd sizes on purpose: (96, 30) and (70, 31) are unpadded, (40, 90) is wide.
ROWS = ((4, Shot(90, 40), 6), (3, Shot(96, 96), 2, Shot(70, 31), 3))
ONE = ((4, Shot(96, 30), 6),)
ONE_EACH = ((4, Shot(90, 40), 6), (3, Shot(96, 96), 5))
WITH_TEXT_ONLY = ((4, Shot(40, 90), 6), (9,), (3, Shot(96, 30), Shot(48, 48), 5))


def _config(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaNextConfig, SiglipVisionConfig

    siglip = "siglip" in kind
    text, tower = {**LLM, **changes.pop("text", {})}, {**TOWER, **changes.pop("tower", {})}
    backbone = changes.pop("backbone", "qwen2" if "qwen" in kind else "llama")
    settings: dict[str, Any] = {
        "vision_config": SiglipVisionConfig(**tower, vision_use_head=False) if siglip else CLIPVisionConfig(**tower),
        "text_config": AutoConfig.for_model(backbone, **text),
        "image_token_id": IMAGE,
        "vision_feature_select_strategy": "full" if siglip else "default",
        "vision_feature_layer": -1 if siglip else -2,
        **changes,
    }
    return LlavaNextConfig(**settings, image_grid_pinpoints=PINPOINTS) if "next" in kind else LlavaConfig(**settings)


def build(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A fresh model.

    Args:
        kind: `llava`, `llava_siglip`, `llava_qwen` (text configuration with `layer_types`), `llava_next` or `llava_next_siglip`.
        attention: attention implementation.
        dtype: of the weights; all dtypes round the same float32 weights.
        **changes: configuration fields; `text=` and `tower=` hold those of the LLM and of the tower, `backbone=` is the LLM's model type.
    """
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    config = _config(kind, **changes)
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = (LlavaNextForConditionalGeneration if "next" in kind else LlavaForConditionalGeneration)(config)
        for weight in model.parameters():
            varied = weight.ndim == 1 and weight.shape[0] in (32, 64) and not bool((weight == weight[0]).all())
            if weight.ndim > 1 or varied:
                nn.init.normal_(weight, std=0.15)
    return model.to(dtype).eval().requires_grad_(False)


def model_of(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """The shared model of that kind; see `build`."""
    return _shared(kind, attention, dtype)


_shared = cache(build)


KINDS = ("llava", "llava_siglip", "llava_next")
"""One per mechanism: CLS token, no CLS token, AnyRes."""
ALL_KINDS = (*KINDS, "llava_qwen", "llava_next_siglip")


@cache
def packing(kind: str, shot: Shot) -> Tensor:
    """What each placeholder of an image stands for, `(tokens, 4)` int64: view, row, column, newline; by the family's own packing code."""
    view = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    if "next" not in kind:
        return torch.cat([torch.zeros(len(view), 1), view, torch.zeros(len(view), 1)], 1).long()
    views = torch.arange(views_of(kind, shot)).repeat_interleave(len(view))[:, None]
    coordinates = torch.cat([views, view.repeat(len(views) // len(view), 1), torch.zeros_like(views)], 1).float()
    packed, _ = model_of(kind).model.pack_image_features(
        [coordinates.view(-1, len(view), 4)],
        torch.tensor([shot]),
        vision_feature_select_strategy="default",
        image_newline=torch.tensor([-1.0, -1, -1, 1]),
    )
    return packed[0].long()


def views_of(kind: str, shot: Shot) -> int:
    """Tower inputs of one image: 1, or thumbnail and crops."""
    if "next" not in kind:
        return 1
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return int(image_size_to_num_patches(list(shot), PINPOINTS, PIXELS))


def tokens_of(kind: str, shot: Shot) -> int:
    """Visual tokens of an image, newlines excluded."""
    return int((packing(kind, shot)[:, 3] == 0).sum())


def most_tokens(kind: str) -> int:
    """The most visual tokens that one image can have, newlines excluded."""
    return SIDE * SIDE * (5 if "next" in kind else 1)


@dataclass(frozen=True)
class Batch:
    """A batch of prompts: the model's keyword arguments, and which images are in which row."""

    kind: str
    inputs: dict[str, Tensor]
    shots: tuple[tuple[Shot, ...], ...]

    @property
    def valid(self) -> Tensor:
        """`(B, S)` bool: real tokens."""
        return self.inputs["attention_mask"].bool()

    @property
    def visual(self) -> Tensor:
        """`(B, S)` bool: placeholders, newlines included."""
        return self.inputs["input_ids"] == IMAGE

    @property
    def positions(self) -> Tensor:
        """`(B, S)` int64: positions as `generate` counts them."""
        return (self.valid.long().cumsum(1) - 1).clamp(min=0)

    def counts(self) -> list[int]:
        """Visual tokens of every image, row by row."""
        return [tokens_of(self.kind, shot) for row in self.shots for shot in row]

    def row(self, index: int) -> Batch:
        """One prompt alone, without padding."""
        real = self.valid[index]
        inputs = {name: self.inputs[name][index : index + 1, real] for name in ("input_ids", "attention_mask")}
        start = sum(len(row) for row in self.shots[:index])
        images = slice(start, start + len(self.shots[index]))
        if self.shots[index]:
            inputs |= {name: self.inputs[name][images] for name in ("pixel_values", "image_sizes") if name in self.inputs}
        return Batch(self.kind, inputs, (self.shots[index],))

    def changed(self, **inputs: Tensor) -> Batch:
        """The same batch with other arguments."""
        return replace(self, inputs={**self.inputs, **inputs})

    def to(self, dtype: torch.dtype) -> Batch:
        """The same batch with pixel values in another dtype."""
        return self.changed(pixel_values=self.inputs["pixel_values"].to(dtype)) if "pixel_values" in self.inputs else self

    def followed_by(self, tokens: Tensor) -> Batch:
        """The same prompts with generated tokens `(B, T)` at their end."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        return self.changed(input_ids=torch.cat([ids, tokens], 1), attention_mask=torch.cat([mask, torch.ones_like(tokens)], 1))


def batch_of(
    kind: str, rows: Iterable[tuple[int | Shot, ...]] = ROWS, pad: str = "left", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Batch:
    """Prompts of random text and random images.

    Args:
        kind: as for `build`.
        rows: prompts; an int is that many text tokens, a `Shot` an image.
        pad: `left` or `right`.
        dtype: of the pixel values.
        seed: another seed gives other text and other images.
    """
    random = torch.Generator().manual_seed(seed)
    prompts: list[list[int]] = []
    images: list[Tensor] = []
    shots: list[tuple[Shot, ...]] = []
    for row in rows:
        prompt: list[int] = []
        for part in row:
            if isinstance(part, Shot):
                prompt += [IMAGE] * len(packing(kind, part))
                pixels = torch.zeros(5 if "next" in kind else 1, 3, PIXELS, PIXELS)
                views = views_of(kind, part)
                pixels[:views] = torch.randn(views, 3, PIXELS, PIXELS, generator=random)
                images.append(pixels if "next" in kind else pixels[0])
            else:
                prompt += torch.randint(5, 90, (part,), generator=random).tolist()
        prompts.append(prompt)
        shots.append(tuple(part for part in row if isinstance(part, Shot)))
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if pad == "left" else slice(0, len(prompt))
        ids[i, where], mask[i, where] = torch.tensor(prompt), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if images:
        inputs["pixel_values"] = torch.stack(images).to(dtype)
        if "next" in kind:
            inputs["image_sizes"] = torch.tensor([shot for row in shots for shot in row])
    return Batch(kind, inputs, tuple(shots))


def generate(model: Any, batch: Batch, new_tokens: int = 5, **settings: Any) -> Any:
    """Greedy answer with its logits."""
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **settings}
    return model.generate(**batch.inputs, max_new_tokens=new_tokens, **settings)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a reduction may touch and has to put back: attribute names, hook counts and forwards of every module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        name: (sorted(module.__dict__), *(len(getattr(module, kind)) for kind in kinds), module.__dict__.get("forward"), module.training)
        for name, module in model.named_modules()
    }


def beam_rows() -> tuple[tuple[int | Shot, ...], ...]:
    """Prompts for beam search: transformers 5.17 mixes up the images of a prompt with several (also unreduced), later ones do not."""
    from transformers.generation.utils import GenerationMixin

    return ROWS if hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation") else ONE_EACH
