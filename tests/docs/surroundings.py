"""What stands around a block of Python on a page: a small model where the page speaks of a large one, and inputs that nobody made there."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

import vtr
from tests.embedded import random_clip
from vtr.data.shapes_video import test_samples
from vtr.eval.examples import load_examples
from vtr.eval.run.asking import encode, seen_of
from vtr.models import list_recipes
from vtr.models.loading import load_model

CLIP = "openai/clip-vit-large-patch14-336"


@cache
def loaded(name: str) -> tuple[Any, Any]:
    """Returns an embedded checkpoint and its processor, shared by the blocks."""
    return load_model(name, device="cpu")


def of_images() -> dict[str, Any]:
    """A model, its inputs for one picture, and the picture."""
    model, processor = loaded("tiny-llava")
    example = load_examples()[2]
    picture = Image.open(example.file)
    inputs = encode(processor, [example.question], [[picture]])
    return {"vtr": vtr, "model": model, "processor": processor, "inputs": inputs, "image": picture, "question": example.question} | loaders(
        model
    )


def of_training() -> dict[str, Any]:
    """The same with a model of its own, which keeps gradients."""
    given = of_images()
    return given | {"model": deepcopy(given["model"])}


def of_small() -> dict[str, Any]:
    """A small random model, for what takes minutes on a trained one."""
    from tests.tiny_models import ONE, batch_of, build

    model = build("llava", text={"num_hidden_layers": 1}, tower={"num_hidden_layers": 2})
    return {"vtr": vtr, "model": model, "inputs": batch_of("llava", ONE).inputs}


def of_videos() -> dict[str, Any]:
    """A model of videos, inputs for one, its prompt, and 8 frames."""
    model, processor = loaded("tiny-llava-video")
    sample = test_samples(limit=1)[0]
    frames = list(sample.frames)
    content = [{"type": "video"}, {"type": "text", "text": sample.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = encode(processor, [sample.question], [[]], [seen_of(sample, whole=True)[1]])
    return {"vtr": vtr, "model": model, "processor": processor, "inputs": inputs, "frames": frames, "prompt": prompt} | loaders(model)


def of_vits() -> dict[str, Any]:
    """A ViT of timm on a grid of 28 x 28, a picture as numbers, and pixels."""
    import timm
    import torch

    vit = timm.create_model("vit_tiny_patch16_224", img_size=448, depth=12, embed_dim=24, num_heads=2, num_classes=0).eval()
    return {"vtr": vtr, "vit": vit, "pixels": torch.zeros(1, 3, 448, 448), "picture": torch.zeros(192, 192, 3, dtype=torch.uint8).numpy()}


def of_clip(folder: Path) -> dict[str, Any]:
    """A model of images, and a CLIP with random weights in place of one of the hub."""
    given = of_images()
    random_clip(folder, given["model"].config.vision_config)
    return given


def loaders(model: Any) -> dict[str, Any]:
    """The loaders of transformers: embedded checkpoints are loaded, and a known name of the hub gives `model`."""
    import transformers

    def stand_in(name: str, **_: Any) -> Any:
        if Path(name).is_dir():
            return transformers.AutoModelForImageTextToText.from_pretrained(name)
        assert name in [recipe.hub_id for recipe in list_recipes()], f"{name} is no checkpoint that vtr knows"
        return model

    return {"AutoModelForImageTextToText": SimpleNamespace(from_pretrained=stand_in), "AutoProcessor": transformers.AutoProcessor}
