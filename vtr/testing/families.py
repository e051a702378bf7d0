"""The kinds of models that tests are run on: how a small one is built, what its images become, and where its parts are.

Every model has an LLM of 5 layers (hidden 64, grouped queries) behind a tower of 4 layers (width 32) with patches of 8 pixels. Nothing here or
in `vtr.testing.reference` uses the hosts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

IMAGE, VIDEO, PAD, VOCABULARY, SIDE, PIXELS, LAYERS, TOWER_LAYERS = 100, 101, 0, 120, 6, 48, 5, 4
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


class Clip(NamedTuple):
    """One video of a prompt; `frames` are what it has in the LLM."""

    height: int = PIXELS
    width: int = PIXELS
    frames: int = 3


Visual = Shot | Clip


def marks(shot: Visual, count: int) -> list[int]:
    """Returns the placeholders of an image or a video."""
    return [VIDEO if isinstance(shot, Clip) else IMAGE] * count


class Family:
    """How the models of a kind are built, what their images become, and where their layers are.

    A host written elsewhere comes under the oracles by a subclass and an entry in `FAMILIES`. Its images have one view unless `grids` says more.
    """

    anyres: ClassVar[bool] = False
    """Whether an image has crops and its original size matters."""
    has_cls: ClassVar[bool] = True
    """Whether the tower has a CLS token in front of its patches."""
    types: ClassVar[str | None] = None
    """Argument that says which tokens of a prompt are an image's, e.g. `mm_token_type_ids`."""
    counts_text: ClassVar[bool] = True
    """Whether `generate` works on embeddings without token ids, and on a second turn with an image; False: not even unreduced."""
    cut: ClassVar[bool] = False
    """Whether LLM layers are recurrences, in which a token that is gone was never there; see `vtr.testing.cut`."""
    whole_images: ClassVar[bool] = False
    """Whether tokens that see each other do so beyond a sliding window."""
    noise: ClassVar[float] = 0.0
    """What padding alone changes in the logits of the unreduced model, where its recurrences are float32 whatever its dtype."""
    rounding: ClassVar[float] = 1.0
    """How much more than LLaVA the unreduced model rounds in bfloat16: its distance to float64, as a multiple of LLaVA's."""
    refused: ClassVar[dict[str, str]] = {}
    """Oracle -> word of the message, where the host refuses by name what the oracle does."""
    generation: ClassVar[dict[str, Any]] = {}
    """Settings of `generate` without which an answer of a random model could not be read again."""

    def unbuilt(self, **changes: Any) -> tuple[Any, Any]:
        """Returns the class of the model and its configuration; `text`, `tower` and `backbone` in `changes` are as for `build`."""
        raise NotImplementedError

    def shown(self, shot: Visual) -> Visual:
        """Returns what stands in a prompt where a test asks for an image: the image, or for a family of videos a video."""
        return shot

    def grids(self, shot: Visual) -> list[tuple[int, int]]:
        """Returns `(rows, cols)` of the visual tokens of every view of an image, or frame of a video, as the tower makes them."""
        return [(SIDE, SIDE)]

    def packing(self, model: Callable[[], Any], shot: Visual) -> Tensor:
        """Returns what each placeholder of an image stands for, `(tokens, 4)` int64: view, row, column, newline.

        Args:
            model: gives the shared model, for a family whose own code knows.
            shot: the image.
        """
        views = [torch.cartesian_prod(torch.tensor([v]), torch.arange(r), torch.arange(c)) for v, (r, c) in enumerate(self.grids(shot))]
        return torch.nn.functional.pad(torch.cat(views), (0, 1))

    def together(self, visual: Tensor, kind: str) -> Tensor | None:
        """Returns which tokens see each other whatever their order `(B, S, S)` bool, in LLM layers of a kind; None where none do.

        Args:
            visual: `(B, S)` bool, placeholders.
            kind: as the configuration names it, e.g. `sliding_attention`.
        """
        return None

    def around(self) -> tuple[list[int], list[int]]:
        """Returns the token ids in front of the placeholders of an image and behind them."""
        return [], []

    def placeholders(self, shot: Visual, count: int) -> list[int]:
        """Returns the token ids of an image in a prompt: `count` placeholders, and what stands between them."""
        return marks(shot, count)

    def pixels(self, shot: Visual, random: torch.Generator) -> Tensor:
        """Returns random pixel values of an image or a video, a piece of the model's `pixel_values` or `pixel_values_videos`."""
        return torch.randn(1, 3, PIXELS, PIXELS, generator=random)

    def beside(self, shots: list[Visual]) -> dict[str, Tensor]:
        """Returns the other arguments that have one entry per image."""
        return {}

    def positions(self, model: Callable[[], Any], inputs: dict[str, Tensor]) -> Tensor:
        """Returns the position ids of a prompt as `generate` counts them, `(B, S)` int64 or with a first axis for several kinds."""
        return (inputs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)

    def language(self, model: Any) -> Any:
        """Returns the LLM: a module with `config`, `layers` and `rotary_emb`."""
        return model.model.language_model

    def tower_layers(self, model: Any) -> Any:
        """Returns the layers of the vision tower."""
        return model.model.vision_tower.encoder.layers

    def units(self, hidden: Tensor, shots: list[Visual]) -> Tensor:
        """Returns what becomes one visual token each, as hidden states of the tower have it: `(views, tokens, D)`, zeros behind smaller views."""
        return hidden[:, 1:] if self.has_cls else hidden

    def with_units(self, hidden: Tensor, units: Tensor, shots: list[Visual]) -> Tensor:
        """Returns hidden states of the tower with other units `(views, tokens, D)`."""
        return torch.cat([hidden[:, :1], units], 1) if self.has_cls else units

    def tower_masks(self, model: Any, layer: int, shots: list[Visual], bias: Tensor) -> list[Tensor]:
        """Returns the mask of every attention call of a tower layer, in order, added to logits.

        Args:
            model: which.
            layer: of the tower.
            shots: the images.
            bias: `(views, tokens)`, what the key of a visual token weighs; the smallest number hides it from all but itself.
        """
        if self.has_cls:
            bias = torch.nn.functional.pad(bias, (1, 0))
        return [own_key_seen(bias)]

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

    def grids(self, shot: Visual) -> list[tuple[int, int]]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return [(SIDE, SIDE)] * int(image_size_to_num_patches(list(shot), PINPOINTS, PIXELS))

    def packing(self, model: Callable[[], Any], shot: Visual) -> Tensor:
        """Runs the family's own packing code on the coordinates of the patches."""
        coordinates = super().packing(model, shot).float()
        packed, _ = model().model.pack_image_features(
            [coordinates.view(-1, SIDE * SIDE, 4)],
            torch.tensor([shot]),
            vision_feature_select_strategy="default",
            image_newline=torch.tensor([-1.0, -1, -1, 1]),
        )
        return packed[0].long()

    def pixels(self, shot: Visual, random: torch.Generator) -> Tensor:
        pixels = torch.zeros(1, 5, 3, PIXELS, PIXELS)
        views = len(self.grids(shot))
        pixels[0, :views] = torch.randn(views, 3, PIXELS, PIXELS, generator=random)
        return pixels

    def beside(self, shots: list[Visual]) -> dict[str, Tensor]:
        return {"image_sizes": torch.tensor(shots)}


def own_key_seen(bias: Tensor) -> Tensor:
    """Returns the mask `(R, 1, S, S)` of biases on keys `(R, S)` with which every token sees itself, so that no row is without a key."""
    seen = bias[:, None].expand(-1, bias.shape[1], -1).clone()
    hidden = bias == torch.finfo(bias.dtype).min
    seen.diagonal(dim1=1, dim2=2).masked_fill_(hidden, 0.0)
    return seen[:, None]
