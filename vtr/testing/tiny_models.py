"""Small random-initialised models of the real transformers classes, and batches of prompts for them.

Every model has an LLM of 5 layers (hidden 64, grouped queries) behind a tower of 4 layers (width 32) with 6 x 6 patches of 8 pixels.
Weights are spread so that outputs differ visibly. Models are cached and shared: a test that changes one puts it back.

`FAMILIES` says how the models of a kind are built and where their parts are. Nothing here or in `vtr.testing.reference` uses the hosts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

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


class Shot(NamedTuple):
    """One image of a prompt; the size in pixels matters for AnyRes only."""

    height: int = PIXELS
    width: int = PIXELS


# Left to right: text token counts and images. Odd sizes on purpose: (96, 30) and (70, 31) are unpadded, (40, 90) is wide.
ROWS = ((4, Shot(90, 40), 6), (3, Shot(96, 96), 2, Shot(70, 31), 3))
ONE = ((4, Shot(96, 30), 6),)
ONE_EACH = ((4, Shot(90, 40), 6), (3, Shot(96, 96), 5))
WITH_TEXT_ONLY = ((4, Shot(40, 90), 6), (9,), (3, Shot(96, 30), Shot(48, 48), 5))


class Family:
    """How the models of a kind are built, what their images become, and where their layers are.

    A host written elsewhere comes under the oracles by a subclass and an entry in `FAMILIES`. Its images have one view unless `views` says more.
    """

    anyres: ClassVar[bool] = False
    """Whether an image has crops and its original size matters."""
    has_cls: ClassVar[bool] = True
    """Whether the tower has a CLS token in front of its patches."""

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        """Returns the class of the model and its configuration; `text`, `tower` and `backbone` in `changes` are as for `build`."""
        raise NotImplementedError

    def views(self, shot: Shot) -> int:
        """Returns how many inputs of the tower an image becomes."""
        return 1

    def packing(self, kind: str, shot: Shot) -> Tensor:
        """Returns what each placeholder of an image stands for, `(tokens, 4)` int64: view, row, column, newline."""
        view = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
        return torch.cat([torch.zeros(len(view), 1), view, torch.zeros(len(view), 1)], 1).long()

    def pixels(self, shot: Shot, random: torch.Generator) -> Tensor:
        """Returns random pixel values of an image, as one entry of the model's `pixel_values`."""
        return torch.randn(1, 3, PIXELS, PIXELS, generator=random)[0]

    def language(self, model: Any) -> Any:
        """Returns the LLM: a module with `config`, `layers` and `rotary_emb`."""
        return model.model.language_model

    def tower_layers(self, model: Any) -> Any:
        """Returns the layers of the vision tower."""
        return model.model.vision_tower.encoder.layers

    def projected(self, model: Any, features: Tensor) -> Tensor:
        """Returns what the projector makes of single features of the tower `(..., D)`."""
        return model.model.multi_modal_projector(features)

    def before_mlp(self, layer: Any) -> Any:
        """Returns the norm of a tower layer whose input is what the attention and its residual leave, the same tensor that the MLP is added to."""
        return layer.layer_norm2


class Llava(Family):
    """LLaVA: one view, a CLIP tower (or SigLIP, without a CLS token)."""

    def __init__(self, siglip: bool = False, backbone: str = "llama") -> None:
        self.siglip, self.backbone, self.has_cls = siglip, backbone, not siglip  # type: ignore[misc]

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        return LlavaForConditionalGeneration, LlavaConfig(**self._settings(changes))

    def _settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        from transformers import AutoConfig, CLIPVisionConfig, SiglipVisionConfig

        text, tower = {**LLM, **changes.pop("text", {})}, {**TOWER, **changes.pop("tower", {})}
        return {
            "vision_config": SiglipVisionConfig(**tower, vision_use_head=False) if self.siglip else CLIPVisionConfig(**tower),
            "text_config": AutoConfig.for_model(changes.pop("backbone", self.backbone), **text),
            "image_token_id": IMAGE,
            "vision_feature_select_strategy": "full" if self.siglip else "default",
            "vision_feature_layer": -1 if self.siglip else -2,
            **changes,
        }


class LlavaNext(Llava):
    """LLaVA-NeXT: AnyRes, a thumbnail and up to four crops with newlines."""

    anyres = True

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

        return LlavaNextForConditionalGeneration, LlavaNextConfig(**self._settings(changes), image_grid_pinpoints=PINPOINTS)

    def views(self, shot: Shot) -> int:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return int(image_size_to_num_patches(list(shot), PINPOINTS, PIXELS))

    def packing(self, kind: str, shot: Shot) -> Tensor:
        """Runs the family's own packing code on the coordinates of the patches."""
        view = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
        views = torch.arange(self.views(shot)).repeat_interleave(len(view))[:, None]
        coordinates = torch.cat([views, view.repeat(len(views) // len(view), 1), torch.zeros_like(views)], 1).float()
        packed, _ = model_of(kind).model.pack_image_features(
            [coordinates.view(-1, len(view), 4)],
            torch.tensor([shot]),
            vision_feature_select_strategy="default",
            image_newline=torch.tensor([-1.0, -1, -1, 1]),
        )
        return packed[0].long()

    def pixels(self, shot: Shot, random: torch.Generator) -> Tensor:
        pixels = torch.zeros(5, 3, PIXELS, PIXELS)
        views = self.views(shot)
        pixels[:views] = torch.randn(views, 3, PIXELS, PIXELS, generator=random)
        return pixels


FAMILIES: dict[str, Family] = {
    "llava": Llava(),
    "llava_siglip": Llava(siglip=True),
    "llava_next": LlavaNext(),
    "llava_qwen": Llava(backbone="qwen2"),
    "llava_next_siglip": LlavaNext(siglip=True),
}
"""Kind -> family. Their models have `model.config._attn_implementation`, and take `input_ids`, `attention_mask` and `pixel_values`."""
KINDS = ("llava", "llava_siglip", "llava_next")
"""One per mechanism: CLS token, no CLS token, AnyRes."""
ALL_KINDS = (*KINDS, "llava_qwen", "llava_next_siglip")


def build(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Builds a fresh model.

    Args:
        kind: `llava`, `llava_siglip`, `llava_qwen` (text configuration with `layer_types`), `llava_next` or `llava_next_siglip`.
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
def packing(kind: str, shot: Shot) -> Tensor:
    """Returns what each placeholder of an image stands for, `(tokens, 4)` int64: view, row, column, newline."""
    return FAMILIES[kind].packing(kind, shot)


def views_of(kind: str, shot: Shot) -> int:
    """Returns how many inputs of the tower an image becomes: 1, or thumbnail and crops."""
    return FAMILIES[kind].views(shot)


def tokens_of(kind: str, shot: Shot) -> int:
    """Returns the visual tokens of an image, newlines excluded."""
    return int((packing(kind, shot)[:, 3] == 0).sum())


def most_tokens(kind: str) -> int:
    """Returns the most visual tokens that one image can have, newlines excluded."""
    return SIDE * SIDE * (5 if FAMILIES[kind].anyres else 1)


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
    images: list[Tensor] = []
    shots: list[tuple[Shot, ...]] = []
    for row in rows:
        prompt: list[int] = []
        for part in row:
            if isinstance(part, Shot):
                prompt += [IMAGE] * len(packing(kind, part))
                images.append(family.pixels(part, random))
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
        if family.anyres:
            inputs["image_sizes"] = torch.tensor([shot for row in shots for shot in row])
    return Batch(kind, inputs, tuple(shots))


def generate(model: Any, batch: Batch, new_tokens: int = 5, **settings: Any) -> Any:
    """Returns the greedy answer with its logits."""
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **settings}
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
