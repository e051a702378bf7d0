"""Expedit's tau: searched by what it does to an encoder's output, written where the method reads it."""

import json
from copy import deepcopy

import pytest
import torch
import yaml
from PIL import Image

import vtr
from tests import windowed_models
from tests.command_line import CliRunner
from tests.dense_models import hf_model, images, model_of
from tests.embedded import random_checkpoint
from tests.marks import slow
from tests.tiny_models import snapshot
from vtr.calibrate import expedit as calibration
from vtr.calibrate.expedit import TIMES, search
from vtr.cli import app
from vtr.hosts._protocol import host_of
from vtr.methods.expedit import read_tau
from vtr.models.encoders import load_encoder
from vtr.models.loading import load_model
from vtr.models.recipes import find_recipe, with_settings
from vtr.ops.sharpness import auto_tau
from vtr.registry import create_method


@torch.no_grad()
def blocks_seen(model, run, layers):
    """Inputs of those blocks in a call, and what its last block hands on."""
    seen = {}
    handles = [model.blocks[n].register_forward_pre_hook(lambda module, args, n=n: seen.update({n: args[0]})) for n in layers]
    handles.append(model.norm.register_forward_pre_hook(lambda module, args: seen.update(end=args[0])))
    run()
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_the_least_error_of_the_output_wins():
    """Errors are recomputed from what the model's final norm is given, with hooks of the test's own."""
    model, pixels = model_of("timm"), images(3)
    full = model(pixels)
    before, calls = snapshot(model), []
    found = search(model, [pixels[:1], pixels[1:2], pixels[2:]], [2], [(4, 4)], window=3, advance=calls.append)
    assert (found.best.alpha, found.best.grid, found.window, found.layers) == (2, (4, 4), 3, 6)
    assert found.patch_norm == pytest.approx(float(model.patch_embed.proj.weight.norm()))
    assert len(calls) == 3 * (2 + len(TIMES)) and len(found.candidates) == 1 + len(TIMES)
    assert found.best.error == min(one.error for one in found.candidates if one.tau is not None)

    wanted = [blocks_seen(model, lambda one=one: model(one[None]), [2]) for one in pixels]
    own = torch.cat([auto_tau(seen[2][:, 1:], (6, 6), (4, 4), 3, torch.zeros(1, dtype=torch.long)) for seen in wanted])
    taus = [one.tau for one in found.candidates if one.tau is not None]
    assert taus == pytest.approx([float(own.median()) * times for times in TIMES], rel=1e-3)
    for candidate in found.candidates:
        errors = []
        for one, seen in zip(pixels, wanted, strict=True):
            with vtr.reduced(model, "expedit", alpha=2, grid=(4, 4), window=3, tau=candidate.tau or "auto"):
                made = blocks_seen(model, lambda one=one: model(one[None]), [])
            end = seen["end"][0, 1:]
            errors.append(float((made["end"][0, 1:] - end).square().sum() / (end - end.mean(0)).square().sum()))
        assert candidate.error == pytest.approx(sum(errors) / 3, rel=1e-4)
        assert candidate.tokens == pytest.approx((2 + 4 * 16 / 36) / 6) and candidate.ms > 0
    assert snapshot(model) == before and torch.equal(model(pixels), full)


@pytest.fixture
def few_taus(monkeypatch):
    monkeypatch.setattr(calibration, "TIMES", TIMES[::4])


@pytest.mark.usefixtures("few_taus")
def test_depths_and_grids_are_compared_among_those_with_few_tokens():
    model, batches = model_of("timm"), [images(1)]
    found = search(model, batches, [2, 4], [(4, 4), 0.5])
    assert {(one.alpha, one.grid) for one in found.candidates} == {(2, (4, 4)), (2, 0.5), (4, (4, 4)), (4, 0.5)}
    assert found.best.error == min(one.error for one in found.candidates if one.tau is not None) and found.best.alpha == 4
    few = search(model, batches, [2, 4], [(4, 4), 0.5], most_tokens=0.6)
    assert (few.best.alpha, few.best.grid, few.best.tokens) == (2, 0.5, pytest.approx(0.5))
    with pytest.raises(ValueError, match=r"no candidate has at most 0.4 of the tokens, the fewest are 0.50; try a smaller alpha or grid"):
        search(model, batches, [2, 4], [0.5], most_tokens=0.4)


@pytest.mark.usefixtures("few_taus")
@pytest.mark.parametrize("build", [windowed_models.timm_swin, windowed_models.timm_sam, windowed_models.hf_swin])
def test_windows_are_calibrated_too(build):
    """As many clusters as tokens and a sharp tau: the output is the full one, whatever the order of windows."""
    found = search(build().eval(), [images(1, 128, 128)], [None], [1.0])
    assert min(one.error for one in found.candidates) < 1e-6


def test_what_cannot_be_calibrated_is_refused():
    model = model_of("timm")
    with pytest.raises(ValueError, match="needs at least one image, got none"):
        search(model, [])
    flat = deepcopy(model)
    for weight in flat.parameters():
        weight.zero_()
    with pytest.raises(ValueError, match="needs images in which tokens differ, got one without"):
        search(flat, [images(1)])


@pytest.mark.usefixtures("few_taus")
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


@pytest.mark.parametrize(
    "save",
    [*map(slow, (save_timm, save_vit, save_clip)), lambda folder: "tiny-vit-seg"],
    ids=["timm", "HF", "open_clip", "ours"],
)
@pytest.mark.usefixtures("few_taus")
def test_any_encoder_and_any_pictures(save, tmp_path):
    """On pictures of the user's; what was found is what the search says of that encoder on those pictures."""
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
    found = search(encoder, batches, grids=[0.5])
    assert content["settings"]["expedit"] == found.settings() and content["error"] == pytest.approx(found.best.error, rel=1e-3)
    shown = [line for line in result.output.splitlines() if line.endswith("best")]
    assert len(shown) == 1 and f"{found.best.tau:.4g}" in shown[0] and f"{found.best.error:.4f}" in shown[0]
    assert content["samples"] == 2 and content["data"] == "pictures of pictures" and content["model"] == model


def in_recipe(tmp_path, found, **changes):
    (tmp_path / "models").mkdir(exist_ok=True)
    (tmp_path / "models" / "mine.yaml").write_text(with_settings("# mine\n", "expedit", {**found.settings(), **changes}))


@torch.no_grad()
def test_auto_takes_the_tau_of_the_encoders_recipe(tmp_path, monkeypatch):
    model, pixels = model_of("timm"), images()
    found = search(model, [images(3)], [2], [(4, 4)])
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
        (["--grid", "0.5,x"], "--grid: must be ROWSxCOLS or a share in (0, 1], got 'x'"),
        (["--alpha", "2,three"], "--alpha: must be a number of blocks, or several with commas between, got 'three'"),
        (["--most-tokens", "0"], "--most-tokens: must be in (0, 1], got 0.0"),
        (["--window", "4"], "window must be odd"),
        (["--images", "nowhere"], "--images: needs a folder with pictures, got 'nowhere'"),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path):
    result = CliRunner().invoke(
        app, ["calibrate", "expedit", "--model", str(random_checkpoint()), "--out", str(tmp_path / "x.yaml"), *arguments]
    )
    assert result.exit_code == 2 and message in result.output and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "message"), [(b"no picture", "is not an image that Pillow can read"), (None, "is damaged")])
def test_one_broken_picture_is_named(content, message, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((70, 50), 90).save(tmp_path / "pictures" / "a.png")
    good = (tmp_path / "pictures" / "a.png").read_bytes()
    (tmp_path / "pictures" / "b.png").write_bytes(content or good[: len(good) // 2])
    arguments = ["--model", str(random_checkpoint()), "--images", str(tmp_path / "pictures"), "--out", str(tmp_path / "x.yaml")]
    result = CliRunner().invoke(app, ["calibrate", "expedit", *arguments])
    assert result.exit_code == 1 and message in result.output and "b.png" in result.output
    assert result.output.startswith("error:") and result.output.count("\n") == 1 and not (tmp_path / "x.yaml").exists()
