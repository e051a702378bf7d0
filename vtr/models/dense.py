"""Dense models: a timm ViT with a linear head that gives every patch the classes of its pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from einops import rearrange
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vtr.types import VtrError


@dataclass(frozen=True)
class DenseConfig:
    """What `config.json` of a dense checkpoint holds.

    Args:
        architecture: name of a timm model.
        arguments: keyword arguments of `timm.create_model`.
        classes: names of the classes, background first.
        pixels: side of the square input.
        patch: side of a patch in pixels.
        mean, std: of each channel, for values from 0 to 1.
    """

    architecture: str
    arguments: dict[str, Any]
    classes: Sequence[str]
    pixels: int
    patch: int
    mean: Sequence[float]
    std: Sequence[float]


class DenseViT(nn.Module):
    """The model: `vit` is a plain timm ViT, to be reduced as such; `head` maps a token to `patch x patch` pixels of logits."""

    def __init__(self, config: DenseConfig):
        super().__init__()
        import timm

        self.config = config
        self.vit = timm.create_model(config.architecture, pretrained=False, num_classes=0, **config.arguments)
        self.head = nn.Linear(self.vit.embed_dim, len(config.classes) * config.patch**2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Maps pixels `(B, 3, h, w)` to logits `(B, classes, h, w)`."""
        tokens = self.vit.forward_features(pixels)[:, self.vit.num_prefix_tokens :]
        return self.logits(tokens, pixels.shape[-2] // self.config.patch)

    def logits(self, tokens: Tensor, rows: int) -> Tensor:
        """Maps tokens `(B, rows * columns, D)` in raster order to logits `(B, classes, h, w)`."""
        side = self.config.patch
        return rearrange(self.head(tokens), "b (rows cols) (classes k l) -> b classes (rows k) (cols l)", rows=rows, k=side, l=side)

    def prepare(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pictures `(h, w, 3)` uint8 to the model's input `(B, 3, pixels, pixels)`, on its device and in its dtype."""
        side, like = self.config.pixels, self.head.weight
        resized = [Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
        values = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(list(numbers))[:, None, None] for numbers in (self.config.mean, self.config.std))
        return ((values / 255 - mean) / std).to(like.device, like.dtype)

    @torch.no_grad()
    def classify(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures `(h, w, 3)` uint8 to the class of every input pixel `(B, pixels, pixels)` uint8."""
        return self(self.prepare(pictures)).argmax(1).to(torch.uint8).cpu().numpy()


def load_dense(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DenseViT:
    """Loads a dense checkpoint in `eval()` state.

    Args:
        folder: with `config.json` and `model.safetensors`, e.g. `models/tiny-vit-seg`.
        device, dtype: of the weights.

    Raises:
        VtrError: a file is missing or does not fit.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise VtrError(
                f"load_dense: folder {str(folder)!r} has no {name}; give the folder of a dense checkpoint such as models/tiny-vit-seg"
            )
    try:
        model = DenseViT(DenseConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8"))))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (ValueError, TypeError, RuntimeError) as error:
        raise VtrError(f"load_dense: {str(folder)!r} is not a dense checkpoint: {str(error).splitlines()[0]}") from error
    return model.to(device, dtype).eval()


def save_dense(model: DenseViT, folder: Path) -> None:
    """Writes `config.json` and fp16 `model.safetensors`; the folder is made if it is not there."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n", encoding="utf-8")
