"""What the embedded dense checkpoint promises."""

from pathlib import Path

import numpy as np
import pytest
import torch

import vtr
from vtr.data.scenes import draw
from vtr.data.segmentation import CLASSES, iou, score, segment, test_scenes
from vtr.models.dense import DenseViT, load_dense

FOLDER = Path(__file__).parents[2] / "models" / "tiny-vit-seg"
FLOOR = 0.80


@pytest.fixture(scope="module")
def model() -> DenseViT:
    return load_dense(FOLDER)


@pytest.fixture(scope="module")
def scenes():
    return test_scenes(20)


def test_it_is_small_and_has_the_token_grid_of_the_others(model):
    assert (FOLDER / "model.safetensors").stat().st_size <= 8e6
    assert model.vit.patch_embed.grid_size == (24, 24) and len(model.vit.blocks) >= 8 and model.config.classes == list(CLASSES)


def test_all_tokens_reach_the_floor(model, scenes):
    found = score(model.classify, [draw(scene) for scene in scenes], [segment(scene, 2) for scene in scenes])
    assert np.nanmean(iou(found.sum(0))) >= FLOOR


@torch.no_grad()
def test_restored_tokens_are_as_long_as_those_of_the_full_model(model, scenes):
    """Mean norm in front of the last LayerNorm, within 5 %, at the defaults of `expedit`."""
    pixels, lengths = model.prepare([draw(scene) for scene in scenes[:4]]), []
    handle = model.vit.norm.register_forward_pre_hook(lambda _norm, args: lengths.append(args[0][:, 1:].norm(dim=-1).mean().item()))
    try:
        model(pixels)
        with vtr.reduced(model, "expedit"):
            model(pixels)
    finally:
        handle.remove()
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)
