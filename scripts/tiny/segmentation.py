"""How tiny-vit-seg is trained: a timm ViT that starts from the tower of tiny-llava and segments the `shapes` scenes.

First windows of 12 x 12 patches that lie anywhere in the 24 x 24 grid and keep the positions they have there, then whole pictures.
"""

import hashlib
import logging
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from vtr.data.questions import compose
from vtr.data.scenes import CANVAS, Dice, draw
from vtr.data.segmentation import CLASSES, MOST_TEST_SCENES, confusion, iou, score, segment, test_scenes
from vtr.data.shapes import STREAMS, TEST_SHA256, VERSION
from vtr.markdown import markdown_table
from vtr.models.dense import DenseConfig, DenseViT, load_dense, save_dense

from .batches import MEAN, STD, normalised
from .model import GRID, grid_positions
from .run import device_in_words
from .tokenizer import PATCH, PIXELS
from .training import Stage, Training

log = logging.getLogger(__name__)
STAGES = (
    Stage("windows", 500, 16, CANVAS // 2, 1e-3),
    Stage("whole", 240, 8, CANVAS, 8e-4),
)
_CARD = """---
license: apache-2.0
library_name: timm
pipeline_tag: image-segmentation
---

# tiny-vit-seg

A ViT of {millions:.2f} M parameters with 576 tokens (24 x 24 patches of 8 pixels at 192 pixels, CLS) and a linear head that gives every
token the classes of its 64 pixels: {classes}. It is a toy with a real architecture: it
segments the scenes of the generated benchmark `shapes` {version} and nothing else, so that token reduction in dense ViTs can be measured
on a laptop. Made by `scripts/train_tiny.py --model tiny-vit-seg` of this repository.

```python
from vtr.models.dense import load_dense

model = load_dense("models/tiny-vit-seg")  # model.vit is a plain timm model
classes = model.classify([picture])  # uint8 (h, w, 3) to (1, 192, 192)
```

## Architecture

`timm.create_model("{architecture}", num_classes=0, {arguments})`, pre-norm as CLIP's.

## Training

The first {learned} layers, patches and positions start from the tower of tiny-llava (its `model.safetensors` had sha256 `{start}`),
which learned from the same scenes; the other layers start as the identity. Then all weights learn from the cross-entropy of every pixel. Scenes
are drawn while training, never twice; their random stream is not the test split's. No other data.

| Stage | Scenes | Images per step | Steps | Learning rate |
|---|---|---|---|---|
{stages}

Device: {device}. Wall time: {minutes:.0f} minutes after tiny-llava. Seed: {seed}. AdamW, bf16 autocast.
Versions: python {python}, torch {torch}, timm {timm}. Date: {date}. Licence: Apache-2.0.

There is no depth head: the scenes are flat, and nothing in them is nearer than anything else.

## Scores

Intersection over union in percent, all pixels of {count} test scenes of `shapes` {version} (sha256 `{sha}`), at 192 x 192, fp16 weights computed
in fp32 on the CPU, no reduction.

{table}
"""
LEARNED = 5  # layers of the tower that learned what patches show; its last one serves CLS alone
CONFIG = DenseConfig(
    architecture="vit_base_patch16_clip_224",
    arguments={"img_size": PIXELS, "patch_size": PATCH, "embed_dim": 128, "depth": 8, "num_heads": 4, "act_layer": "gelu_tanh"},
    classes=CLASSES,
    pixels=PIXELS,
    patch=PATCH,
    mean=[round(float(value), 8) for value in MEAN],
    std=[round(float(value), 8) for value in STD],
)


class Pictures(Dataset):
    """Batch number n of a stage, always the same for the same seed: `pixels` `(B, 3, h, w)`, `classes` `(B, h, w)`, `corner` `(B, 2)`."""

    def __init__(self, stage: Stage, seed: int = 0):
        self.stage = stage
        self.stream = STREAMS["train"] + (seed << 8) + (stage.canvas << 20) + (1 << 42)

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        pixels, classes, corners = [], [], []
        for n in range(number * self.stage.batch, (number + 1) * self.stage.batch):
            dice = Dice(self.stream, n)
            scene = compose(dice, self.stage.canvas, free=True)
            room = GRID - scene.size // (2 * PATCH) + 1
            corners.append((dice.below(room), dice.below(room)))
            pixels.append(torch.from_numpy(normalised(draw(scene), 2)))
            classes.append(torch.from_numpy(segment(scene, 2)).long())
        return {"pixels": torch.stack(pixels), "classes": torch.stack(classes), "corner": torch.tensor(corners)}


class SegmentationTraining(Training):
    """Trains a `DenseViT` with the cross-entropy of every pixel."""

    def __init__(self, model: DenseViT, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        if self.device == "cpu":
            for block in model.vit.blocks:
                block.attn.fused_attn = False  # its backward pass in bf16 takes a fifth of the time of SDPA's

    def batches(self, stage: Stage) -> Pictures:
        return Pictures(stage, self.seed)

    def loss(self, stage: Stage, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy; scores are the accuracy and mean IoU of this batch."""
        rows = batch["pixels"].shape[-1] // PATCH
        logits = self.model.logits(window_tokens(self.model.vit, batch["pixels"], grid_positions(batch["corner"], rows, rows)), rows)
        target, guess = batch["classes"], logits.detach().argmax(1)
        counts = confusion(target.cpu().numpy(), guess.cpu().numpy())
        scores = {"miou": float(np.nanmean(iou(counts))), "right": float((guess == target)[target > 0].float().mean())}
        return F.cross_entropy(logits.float(), target), scores


def window_tokens(vit, pixels: Tensor, where: Tensor) -> Tensor:
    """Last tokens `(B, P, D)` of windows `(B, 3, h, w)` whose patches are at the raster indices `where` `(B, P)` of the whole grid."""
    patches = vit.patch_embed.proj(pixels).flatten(2).mT + vit.pos_embed[0, 1:][where]
    cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(pixels), -1, -1)
    return vit.norm(vit.blocks(vit.norm_pre(torch.cat([cls.to(patches.dtype), patches], 1))))[:, 1:]


def start_from(vit, folder: Path) -> None:
    """Gives a timm ViT the first `LEARNED` layers of the tower in a LLaVA checkpoint; the others start as the identity.

    Args:
        vit: of the tower's width, heads and grid; changed in place.
        folder: with `model.safetensors`, e.g. `models/tiny-llava`.
    """
    theirs = load_file(folder / "model.safetensors")
    prefix = next(name for name in theirs if name.endswith("class_embedding")).removesuffix("embeddings.class_embedding")
    tower = {name.removeprefix(prefix): value.float() for name, value in theirs.items() if name.startswith(prefix)}
    own = {
        "cls_token": tower["embeddings.class_embedding"].view(1, 1, -1),
        "pos_embed": tower["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": tower["embeddings.patch_embedding.weight"],
    }
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for kind in ("weight", "bias"):
        own[f"norm_pre.{kind}"] = tower[f"pre_layrnorm.{kind}"]
        for n in range(LEARNED):
            layer = f"encoder.layers.{n}"
            own[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat([tower[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
            own |= {f"blocks.{n}.{to}.{kind}": tower[f"{layer}.{name}.{kind}"] for name, to in names.items()}
    missing, unknown = vit.load_state_dict(own, strict=False)
    new = tuple(f"blocks.{n}." for n in range(LEARNED, len(vit.blocks)))
    assert not unknown and all(name.startswith((*new, "norm.")) for name in missing), (missing, unknown)
    with torch.no_grad():
        for block in vit.blocks[LEARNED:]:
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.zero_()
                linear.bias.zero_()


def train(
    out: Path,
    state: Path,
    start: Path,
    device: str = "cpu",
    seed: int = 0,
    stages: tuple[Stage, ...] = STAGES,
    count: int = MOST_TEST_SCENES,
) -> None:
    """Trains tiny-vit-seg into `out`, measures it and writes its card; continues where an earlier run was stopped.

    Args:
        out: checkpoint folder, e.g. `models/tiny-vit-seg`.
        state: folder of training states (about 20 MB).
        start: checkpoint folder of tiny-llava, whose tower it starts from.
        device: `cuda` or `cpu`.
        seed: seed of weights and scenes.
        stages: stages in order.
        count: test scenes for the card.
    """
    torch.manual_seed(seed)
    model = DenseViT(CONFIG)
    start_from(model.vit, start)
    training = SegmentationTraining(model, state / "tiny-vit-seg", stages, device, seed)
    training.resume()
    training.run()
    save_dense(model, out)
    scenes = test_scenes(count)
    targets = [segment(scene, CANVAS // PIXELS) for scene in scenes]
    found = 100 * iou(score(load_dense(out).classify, [draw(scene) for scene in scenes], targets).sum(0))
    log.info("mIoU %.1f", np.nanmean(found))
    digest = hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()
    (out / "README.md").write_text(card(training, found, device_in_words(device), digest, count))


def card(training: SegmentationTraining, found: np.ndarray, device: str, start: str, count: int) -> str:
    """Returns the README of the checkpoint.

    Args:
        training: the finished training.
        found: intersection over union of each class in percent.
        device: device in words.
        start: sha256 of the weights it started from.
        count: test scenes measured.
    """
    config = training.model.config
    return _CARD.format(
        millions=sum(p.numel() for p in training.model.parameters()) / 1e6,
        classes=", ".join(config.classes),
        version=VERSION,
        architecture=config.architecture,
        arguments=", ".join(f"{name}={value!r}" for name, value in config.arguments.items()),
        learned=LEARNED,
        start=start,
        stages="\n".join(
            f"| {s.name} | {s.canvas // 2} px | {s.batch} | {s.steps} ({s.steps * s.batch:,} images) | {s.rate:g} |"
            for s in training.stages
        ),
        device=device,
        minutes=training.seconds / 60,
        seed=training.seed,
        python=platform.python_version(),
        torch=version("torch"),
        timm=version("timm"),
        date=datetime.now(UTC).date(),
        sha=TEST_SHA256,
        count=count,
        table=markdown_table([*config.classes, "mean"], [[f"{value:.1f}" for value in (*found, np.nanmean(found))]]),
    )
