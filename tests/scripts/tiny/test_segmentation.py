"""The recipe of tiny-vit-seg: where it starts, what it learns from, what it writes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from scripts.tiny import segmentation
from scripts.tiny.export import export
from scripts.tiny.model import build_model, grid_positions
from scripts.tiny.tokenizer import build_tokenizer
from vtr.data.segmentation import CLASSES
from vtr.models.dense import DenseViT, load_dense

SHORT = tuple(replace(stage, steps=2, batch=1) for stage in segmentation.STAGES)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A checkpoint of tiny-llava's sizes with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    export(build_model(build_tokenizer()), folder)
    return folder


@pytest.mark.slow
def test_it_starts_with_the_features_of_tiny_llavas_tower(llava):
    model = DenseViT(segmentation.CONFIG).eval()
    segmentation.start_from(model.vit, llava)
    tower = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).model.vision_tower.eval()
    pixels = torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    model.vit.norm = torch.nn.Identity()
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[segmentation.LEARNED]
        torch.testing.assert_close(model.vit.forward_features(pixels), expected, atol=1e-4, rtol=1e-4)


def test_windows_keep_the_positions_of_the_whole_picture():
    torch.manual_seed(0)
    model = DenseViT(segmentation.CONFIG).eval()
    whole = torch.randn(2, 3, 192, 192)
    everywhere = grid_positions(torch.zeros(2, 2, dtype=torch.long), 24, 24)
    with torch.no_grad():
        tokens = segmentation.window_tokens(model.vit, whole, everywhere)
        torch.testing.assert_close(model.logits(tokens, 24), model(whole))
        window = whole[:1, :, :96, :96]
        moved = [segmentation.window_tokens(model.vit, window, grid_positions(torch.tensor([at]), 12, 12)) for at in ([0, 0], [5, 7])]
    assert not torch.allclose(moved[0], moved[1], atol=1e-3)


def test_batches_are_reproducible_and_show_what_they_say():
    data = segmentation.Pictures(replace(SHORT[1], batch=2))
    one, two = data[1], data[1]
    assert all(torch.equal(one[name], two[name]) for name in one) and not torch.equal(one["pixels"], data[0]["pixels"])
    assert one["pixels"].shape == (2, 3, 192, 192) and one["classes"].shape == (2, 192, 192)
    assert set(one["classes"].unique().tolist()) <= set(range(len(CLASSES))) and (one["classes"] == CLASSES.index("sign")).any()


@pytest.mark.slow
def test_the_recipe_writes_a_checkpoint_of_at_most_8_megabytes(tmp_path: Path, llava):
    out = tmp_path / "tiny-vit-seg"
    segmentation.train(out, tmp_path / "state", llava, stages=SHORT, count=5)
    assert (out / "model.safetensors").stat().st_size <= 8e6
    text = (out / "README.md").read_text()
    assert "| windows | 96 px | 1 | 2 (2 images) | 0.001 |" in text and "5 test scenes" in text
    model = load_dense(out)
    state = torch.load(tmp_path / "state" / "tiny-vit-seg" / "state.pt", weights_only=True)
    assert state["done"] == {"windows": 2, "whole": 2}
    torch.testing.assert_close(model.head.weight, state["model"]["head.weight"].half().float())
