"""Expedit's tau: measured by a rule on an encoder, written where the method reads it."""

import json
from copy import deepcopy

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import vtr
from tests.dense_models import hf_model, images, model_of
from tests.embedded import random_checkpoint
from tests.tiny_models import snapshot
from vtr.calibrate.expedit import measure_tau
from vtr.cli import app
from vtr.hosts._host import host_of
from vtr.methods.expedit import read_tau
from vtr.models.encoders import load_encoder
from vtr.models.loading import load_model
from vtr.models.recipes import find_recipe, with_settings
from vtr.ops.clusters import MEDIAN_LOGIT, candidate_distances
from vtr.registry import create_method


def test_the_median_candidate_is_at_two():
    model, pixels = model_of("timm"), images(3)
    seen: list[torch.Tensor] = []
    handle = model.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        full = model(pixels)
    handle.remove()
    before = snapshot(model)
    found = measure_tau(model, [pixels[:2], pixels[2:]], alpha=2, grid=(4, 4), window=3)
    medians = candidate_distances(seen[0][:, 1:], (6, 6), (4, 4), 3).flatten(1).nanmedian(1).values
    assert (found.alpha, found.grid, found.window, found.layers) == (2, (4, 4), 3, 6)
    assert found.patch_norm == pytest.approx(float(model.patch_embed.proj.weight.norm()))
    assert found.tau == pytest.approx(MEDIAN_LOGIT / float(medians.median()), rel=1e-4)
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(model(pixels), full)


def test_images_without_a_difference_are_refused():
    with pytest.raises(ValueError, match="needs images in which tokens differ, got none"):
        measure_tau(model_of("timm"), [])


def test_the_command_writes_what_the_method_reads(tmp_path):
    file = tmp_path / "tau.yaml"
    arguments = ["calibrate", "expedit", "--model", str(random_checkpoint()), "--samples", "2", "--quiet", "--out", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--grid", "4x3"])
    assert result.exit_code == 0, result.output
    found = yaml.safe_load(file.read_text())["settings"]["expedit"]
    assert found["grid"] == [4, 3] and found["tau"] == read_tau(str(file)) > 0
    assert vtr.create_method("expedit", tau=str(file)).tau == str(file)

    recipe = "# what this is\nhub_id: x  # a hub id\nsettings:\n  other: {a: 1}\n# about the notes\nnotes: a recipe\n"
    file.write_text(recipe)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    content, lines = yaml.safe_load(file.read_text()), file.read_text().splitlines()
    assert content["settings"]["expedit"]["grid"] == 0.7 and content["settings"]["other"] == {"a": 1} and "model" not in content
    assert [line for line in lines if line in recipe.splitlines()] == recipe.splitlines()


def save_timm(folder):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=4, depth=4, img_size=64)
    arguments = {"embed_dim": 32, "num_heads": 4, "depth": 4, "img_size": 64}
    timm.models.save_for_hf(model, folder, model_config={"model_args": arguments, "input_size": [3, 64, 64]}, safe_serialization=True)
    return str(folder)


def save_vit(folder):
    import transformers

    hf_model("ViTModel").save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 96, "width": 96}).save_pretrained(folder)
    return str(folder)


def save_clip(folder):
    open_clip = pytest.importorskip("open_clip")
    tower = {"image_size": 64, "layers": 4, "width": 64, "patch_size": 16, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}
    model = open_clip.CLIP(**config)
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"open_clip:local-dir:{folder}"


@pytest.mark.parametrize("save", [save_timm, save_vit, save_clip, lambda folder: "tiny-vit-seg"], ids=["timm", "HF", "open_clip", "ours"])
def test_any_encoder_and_any_pictures(save, tmp_path, monkeypatch):
    """On pictures of the user's; what was found is what the rule says of that encoder on those pictures."""
    (tmp_path / "pictures").mkdir()
    for name in ("b.png", "a.jpg"):
        Image.effect_noise((70, 50), 90).save(tmp_path / "pictures" / name)
    model, file = save(tmp_path / "model"), tmp_path / "tau.yaml"
    arguments = ["--model", model, "--images", str(tmp_path / "pictures"), "--grid", "0.5", "--quiet", "--out", str(file)]
    result = CliRunner().invoke(app, ["calibrate", "expedit", *arguments])
    assert result.exit_code == 0, result.output
    content = yaml.safe_load(file.read_text())
    encoder, prepare = load_encoder(model)
    batches = [prepare(Image.open(tmp_path / "pictures" / name)) for name in ("a.jpg", "b.png")]
    assert content["settings"]["expedit"] == measure_tau(encoder, batches, grid=0.5).settings()
    assert content["samples"] == 2 and content["data"] == "pictures of pictures" and content["model"] == model


def in_recipe(tmp_path, found, **changes):
    (tmp_path / "models").mkdir(exist_ok=True)
    (tmp_path / "models" / "mine.yaml").write_text(with_settings("# mine\n", "expedit", {**found.settings(), **changes}))


@torch.no_grad()
def test_auto_takes_the_tau_of_the_encoders_recipe(tmp_path, monkeypatch):
    model, pixels = model_of("timm"), images()
    found = measure_tau(model, [images(3)], alpha=2, grid=(4, 4))
    monkeypatch.chdir(tmp_path)

    def run(**settings):
        with vtr.reduced(model, "expedit", **{"alpha": 2, "grid": (4, 4), **settings}):
            return model.forward_features(pixels)

    by_image, wanted = run(), run(tau=found.settings()["tau"])
    assert not torch.equal(by_image, wanted)
    in_recipe(tmp_path, found)
    assert torch.equal(run(), wanted)
    half = deepcopy(model).to(torch.bfloat16)  # rounded weights are still that encoder's
    assert create_method("expedit", alpha=2, grid=(4, 4))._sharpness(host_of(half).geometry(), 2) == found.settings()["tau"]
    for changes in ({"alpha": 3}, {"window": 3}, {"grid": 0.5}, {"encoder": {"layers": 6, "patch_norm": 1.01 * found.patch_norm}}):
        in_recipe(tmp_path, found, **changes)
        assert create_method("expedit", alpha=2, grid=(4, 4))._sharpness(host_of(model).geometry(), 2) == "auto", changes
    in_recipe(tmp_path, found, tau=-1)
    with pytest.raises(ValueError, match="expedit: tau must be above 0"):
        run()


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-vit-seg"])
def test_the_recipes_of_the_embedded_checkpoints_hold_their_tau(name):
    """The command that `models/*.yaml` was written with finds the same again, and `tau=auto` takes it."""
    if name == "tiny-llava":
        model = load_model(name, "cpu")[0]
    else:
        model = load_encoder(name, "cpu")[0]
    geometry, method = host_of(model).geometry(), create_method("expedit")
    stored = find_recipe(name).settings["expedit"]
    assert method._sharpness(geometry, method.steps(geometry)[0].layer) == stored["tau"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples: must be from 1"),
        (["--grid", "4x"], "--grid: must be ROWSxCOLS"),
        (["--window", "4"], "window must be odd"),
        (["--images", "nowhere"], "--images: needs a folder with pictures, got 'nowhere'"),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path):
    result = CliRunner().invoke(
        app, ["calibrate", "expedit", "--model", str(random_checkpoint()), "--out", str(tmp_path / "x.yaml"), *arguments]
    )
    assert result.exit_code == 2 and message in result.output and not list(tmp_path.iterdir())
