"""Real architectures with random weights, so that times can be measured without a download."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vtr.cost import TransformerShape, kv_bytes
from vtr.models.recipes import find_recipe
from vtr.types.errors import WrongValue
from vtr.types.naming import closest

GIB = 2**30
Sizes = tuple[int, int, int, int]


@dataclass(frozen=True)
class Shape:
    """A LLaVA-style model.

    Args:
        name: what `--model` takes.
        tower, llm: `(width, MLP width, layers, heads)`.
        anyres: LLaVA-NeXT with a 2 x 2 grid of crops instead of LLaVA-1.5.
        image, patch: side of a view and of a patch in pixels.
        vocabulary: ids of the LLM; the last but 63 is the placeholder where there are that many.
        text: text tokens of the prompt, half of them in front of the image.
        dtype: as which weights are made on a GPU.
    """

    name: str
    tower: Sizes
    llm: Sizes
    anyres: bool = False
    image: int = 336
    patch: int = 14
    vocabulary: int = 1000
    text: int = 75
    dtype: str = "float16"

    @property
    def tokens(self) -> int:
        """Visual tokens of an image, newline tokens excluded."""
        return (5 if self.anyres else 1) * (self.image // self.patch) ** 2

    @property
    def placeholders(self) -> int:
        """Positions of an image in the prompt, newline tokens included."""
        return self.tokens + (2 * (self.image // self.patch) if self.anyres else 0)


CLIP_L = (1024, 4096, 24, 16)  # vision_config of openai/clip-vit-large-patch14-336
VICUNA_7B, VICUNA_13B = (4096, 11008, 32, 32), (5120, 13824, 40, 40)  # config.json of lmsys/vicuna-7b-v1.5 and -13b-v1.5
_FROM_RECIPES = {
    "llava-1.5-7b": (CLIP_L, VICUNA_7B),
    "llava-1.5-13b": (CLIP_L, VICUNA_13B),
    "llava-next-7b": (CLIP_L, VICUNA_7B),
    "llava-next-13b": (CLIP_L, VICUNA_13B),
}
_OWN = {
    "mid": Shape("", (512, 2048, 24, 8), (1024, 2816, 12, 16)),  # a tower as deep as CLIP-L and an LLM that a laptop can run
    "small": Shape("", (256, 1024, 12, 4), (512, 1408, 8, 8)),
    "tiny": Shape("", (32, 64, 4, 4), (64, 128, 4, 4), image=48, patch=8, text=12),
}
SHAPES = sorted([*_FROM_RECIPES, *(f"llava-{kind}{size}" for kind in ("", "next-") for size in _OWN)])


def find_shape(name: str) -> Shape:
    """Returns the shape called `name`; image geometry of the 7B and 13B shapes comes from their recipes.

    Raises:
        ValueError: no such shape, with the closest names.
    """
    if name in _FROM_RECIPES:
        recipe = find_recipe(name)
        if recipe is None:
            raise WrongValue(f"bench: the recipe of shape {name!r} is missing; run inside the repository or install it with its models/")
        tower, llm = _FROM_RECIPES[name]
        side, patch = recipe.image["size"][0], recipe.image["patch"]
        return Shape(name, tower, llm, recipe.host == "llava_next", side, patch, vocabulary=32064, dtype=recipe.dtype)
    if name not in SHAPES:
        raise WrongValue(f"bench: unknown shape {name!r}{closest(name, SHAPES)}; or give a folder or a hub id")
    return replace(_OWN[name.rpartition("-")[2]], name=name, anyres="-next-" in name)


def build(shape: Shape, dtype: torch.dtype, device: str = "cpu", attention: str = "sdpa", seed: int = 0) -> Any:
    """Returns a random model of that shape in eval mode.

    Args:
        shape: sizes.
        dtype, device: of the weights, which are made in place there; `meta` makes none.
        attention: backend of tower and LLM.
        seed: of the weights.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tower = CLIPVisionConfig(image_size=shape.image, patch_size=shape.patch, **dict(zip(keys, shape.tower, strict=True)))
    llm = LlamaConfig(vocab_size=shape.vocabulary, max_position_embeddings=8192, **dict(zip(keys, shape.llm, strict=True)))
    common = {"vision_config": tower, "text_config": llm, "image_token_id": placeholder_id(shape)}
    torch.manual_seed(seed)
    with torch.device(device):
        if shape.anyres:
            config: Any = LlavaNextConfig(image_grid_pinpoints=[[2 * shape.image] * 2], **common)
            return LlavaNextForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention).eval()
        return LlavaForConditionalGeneration._from_config(LlavaConfig(**common), dtype=dtype, attn_implementation=attention).eval()


def placeholder_id(shape: Shape) -> int:
    """Returns the id of the placeholder."""
    return shape.vocabulary - 64 if shape.vocabulary > 64 else shape.vocabulary - 1


def prompts(shape: Shape, dtype: torch.dtype, device: str, batch: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Returns `count` batches that share no image and no text: system text, one image, a question.

    Args:
        shape: of the model.
        dtype, device: of the pixels.
        batch: prompts of a batch.
        count: batches.
    """
    found = []
    for number in range(count):
        dice = torch.Generator().manual_seed(1 + number)
        views = (batch, 5) if shape.anyres else (batch,)
        pixels = torch.randn(*views, 3, shape.image, shape.image, generator=dice)
        text = torch.randint(5, placeholder_id(shape), (batch, shape.text), generator=dice)
        image = torch.full((batch, shape.placeholders), placeholder_id(shape))
        ids = torch.cat([text[:, : shape.text // 2], image, text[:, shape.text // 2 :]], 1).to(device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(device, dtype)}
        if shape.anyres:
            inputs["image_sizes"] = torch.tensor([[2 * shape.image] * 2] * batch, device=device)
        found.append(inputs)
    return found


def needed_gib(shape: Shape, dtype: torch.dtype, batch: int, new_tokens: int) -> float:
    """Returns the GiB (2^30 bytes) that the full model takes: exact for weights and KV cache, an upper estimate for activations."""
    weights = sum(p.numel() for p in build(shape, dtype, "meta").parameters())
    width, inner, layers, heads = shape.llm
    llm = TransformerShape(layers, width, inner, heads, heads, width // heads)
    length = shape.placeholders + shape.text
    cache = kv_bytes(llm, [length + new_tokens] * layers, dtype.itemsize) * batch
    views = 5 if shape.anyres else 1
    tower = batch * views * (shape.image // shape.patch) ** 2 * (shape.tower[0] * (shape.tower[2] + 8) + 2 * shape.tower[1])
    activations = batch * length * (8 * width + 3 * inner)
    return (weights * dtype.itemsize + cache + (tower + activations) * dtype.itemsize) / GIB


def free_gib(device: str) -> float:
    """Returns the free GiB of a device: of a GPU as its driver says, of the machine as the kernel and the process's memory limit say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] / GIB
    limits = []
    meminfo, limit, used = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if meminfo.is_file():
        facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(int(facts["MemAvailable"].split()[0]) * 1024)
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        limits.append(int(limit.read_text()) - int(used.read_text()))
    return min(limits) / GIB if limits else float("inf")


def check_fits(shape: Shape, dtype: torch.dtype, device: str, batch: int, new_tokens: int) -> None:
    """Refuses what cannot run here.

    Raises:
        ValueError: more memory is needed than is free, with both numbers.
    """
    needed, free = needed_gib(shape, dtype, batch, new_tokens), free_gib(device)
    if needed > free:
        name = str(dtype).removeprefix("torch.")
        raise WrongValue(
            f"bench: {shape.name} at batch {batch} in {name} needs about {needed:.1f} GiB, {free:.1f} GiB are free on {device}; "
            "take a smaller batch or shape, or --dtype float16"
        )
