"""Dense checkpoints: layout of the logits, saving and loading."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vtr.data.segmentation import CLASSES
from vtr.models.dense import DenseConfig, DenseViT, load_dense, save_dense
from vtr.types import VtrError

ARGUMENTS = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONFIG = DenseConfig("vit_small_patch8_224", ARGUMENTS, list(CLASSES), 48, 8, [0.5, 0.4, 0.3], [0.2, 0.2, 0.2])


@pytest.fixture
def model() -> DenseViT:
    torch.manual_seed(0)
    return DenseViT(CONFIG).eval()


def test_a_token_gives_the_pixels_of_its_patch(model):
    tokens = torch.randn(2, 24, 32)
    logits = model.logits(tokens, 4)  # 4 x 6 patches
    assert logits.shape == (2, len(CLASSES), 32, 48)
    row, col = 2, 5
    expected = model.head(tokens[1, row * 6 + col]).view(len(CLASSES), 8, 8)
    torch.testing.assert_close(logits[1, :, row * 8 : row * 8 + 8, col * 8 : col * 8 + 8], expected)


def test_saved_and_loaded_it_is_the_same_to_half_precision(model, tmp_path: Path):
    save_dense(model, tmp_path / "new")
    loaded = load_dense(tmp_path / "new")
    pictures = [np.random.default_rng(n).integers(0, 256, (96, 96, 3), dtype=np.uint8) for n in range(2)]
    pixels = model.prepare(pictures)
    assert pixels.shape == (2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels), model(pixels), atol=2e-2, rtol=2e-2)
    assert loaded.classify(pictures).shape == (2, 48, 48) and not loaded.training
    assert loaded.config.classes == list(CLASSES)


def test_prepared_pixels_are_normalised(model):
    grey = np.full((48, 48, 3), 51, np.uint8)
    assert model.prepare([grey])[0, :, 0, 0].tolist() == pytest.approx([-1.5, -1.0, -0.5], abs=1e-5)


def test_incomplete_and_foreign_folders_are_named(model, tmp_path: Path):
    with pytest.raises(VtrError, match=r"has no config.json; give the folder of a dense checkpoint"):
        load_dense(tmp_path)
    save_dense(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "color": 1}))
    with pytest.raises(VtrError, match="is not a dense checkpoint: .*color"):
        load_dense(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "classes": ["a"]}))
    with pytest.raises(VtrError, match="is not a dense checkpoint: Error"):
        load_dense(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(VtrError, match=r"has no model.safetensors"):
        load_dense(tmp_path)
