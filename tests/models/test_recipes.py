"""Recipes: what is shipped is complete and consistent, and a broken one says what is wrong."""

import math
from pathlib import Path

import pytest

from vtr.cost import TransformerShape, kv_bytes
from vtr.eval.run.setup import Setup, sketch
from vtr.hosts._protocol import host_of
from vtr.models.recipes import VIDEO, Recipe, find_recipe, list_recipes, load_recipe, with_settings
from vtr.registry import list_hosts

ROOT = Path(__file__).parents[2]
SHIPPED = [
    *("gemma-3-4b", "internvl3-1b", "internvl3-2b", "internvl3-8b", "llava-1.5-13b", "llava-1.5-7b", "llava-next-13b", "llava-next-7b"),
    "llava-next-video-7b",
    *("llava-onevision-0.5b", "llava-onevision-7b", "pixtral-12b", "qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b", "smolvlm2-2.2b"),
    *("tiny-llava", "tiny-llava-next", "tiny-llava-video", "tiny-qwen-vl", "tiny-vit-seg"),
]
GOOD = (ROOT / "models" / "llava-1.5-7b.yaml").read_text()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_what_is_shipped():
    assert [recipe.name for recipe in list_recipes()][: len(SHIPPED)] == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_complete_and_consistent(name):
    recipe = find_recipe(name)
    assert isinstance(recipe, Recipe)
    tokens, image, side = recipe.tokens, recipe.image, math.isqrt(recipe.tokens.get("joins", 1))
    assert set(tokens) <= {"patch_grid", "per_view", "most_views", "most", "least", "newlines", "joins", "video"}
    assert recipe.host in list_hosts()
    if "patch_grid" in tokens:
        assert tokens["per_view"] == tokens["patch_grid"][0] * tokens["patch_grid"][1]
        most = tokens["per_view"] * tokens["most_views"]
        assert tokens["most"] == most or (tokens["most"] < most and recipe.host == "llava_onevision"), "which interpolates"
        assert image["size"][0] // image["patch"] == tokens["patch_grid"][0] * side
    elif "max_pixels" in image:
        unit = (image["patch"] * side) ** 2
        assert (tokens["least"], tokens["most"]) == (image["min_pixels"] // unit, image["max_pixels"] // unit)
    place = "<video>" if name.startswith(("llava-next-video", "tiny-llava-video")) else "<image>"
    mentioned = [part in recipe.prompt for part in (place, "{question}")]
    assert all(mentioned) if name.startswith(("llava", "tiny-llava")) else recipe.prompt == "" or mentioned[1]
    images = name != "tiny-llava-video"
    assert tokens["newlines"] == (images and recipe.host in ("llava_next", "llava_next_video", "llava_onevision"))


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("tiny") and not name.endswith("13b")])
def test_the_config_of_a_recipe_is_the_model_that_it_speaks_of(name):
    """Memory follows from the parameters, the grid and the joins from the host."""
    recipe, model = find_recipe(name), sketch(Setup(name))
    host = host_of(model)
    assert recipe.memory_gib == pytest.approx(sum(weight.numel() for weight in model.parameters()) * 2 / 2**30, abs=0.05)
    assert recipe.tokens.get("joins", 1) == host.tower.joins and recipe.image["patch"] == host.tower.patch_size
    assert (tuple(recipe.tokens["patch_grid"]) if "patch_grid" in recipe.tokens else None) == host.tower.patch_grid
    assert ("max_pixels" in recipe.image) == (host.pixel_limits is not None)


@pytest.mark.parametrize("name", [recipe.name for recipe in list_recipes() if "video" in recipe.tokens and not recipe.name.startswith("tiny")])
def test_tokens_of_a_video_are_those_of_the_model(name):
    """Pooled frames from the host, others from their assumed size: sides to multiples of a token's, unless the whole is too large."""
    recipe, host = find_recipe(name), host_of(sketch(Setup(name)))
    video = recipe.tokens["video"]
    assert host.has_video and set(video) <= set(VIDEO)
    if host.pooling is not None:
        assert set(video) == {"frames", "per_frame"} and video["per_frame"] == math.prod(host.pooling.grid)
    else:
        unit = host.tower.patch_size * math.isqrt(host.tower.joins)
        assert video["per_frame"] * video["joins"] == math.prod(round(side / unit) for side in video["of"])
    if "most" in video:
        assert host.name == "qwen3_vl" and video["most"] == 25165824 // (unit**2 * video["joins"])


def test_models_with_videos_have_recipes_that_say_so():
    for recipe in list_recipes():
        if recipe.host in ("llava_next_video", "llava_onevision", "qwen3_vl") or recipe.name.startswith("qwen2.5"):
            assert "video" in recipe.tokens, recipe.name


@pytest.mark.parametrize("video", ["{frames: 8}", "{frames: 8, per_frame: 4, fps: 2}", "12"])
def test_a_broken_video_entry_is_refused(tmp_path, video):
    (tmp_path / "x.yaml").write_text(GOOD.replace("  newlines: false", f"  newlines: false\n  video: {video}"))
    with pytest.raises(ValueError, match=r"recipe .*x\.yaml: tokens\.video must have frames, per_frame and no others than .*, got "):
        load_recipe(tmp_path / "x.yaml")


def test_the_cache_of_a_known_model_is_as_large_as_is_known():
    assert kv_bytes(TransformerShape(32, 4096, 11008, 32, 32, 128), [576] * 32, 2) == 288 * 2**20


def test_the_working_folder_wins(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llava-1.5-7b.yaml").write_text(GOOD.replace("llava-hf/llava-1.5-7b-hf", "me/mine"))
    monkeypatch.chdir(tmp_path)
    assert find_recipe("llava-1.5-7b").hub_id == "me/mine"
    assert find_recipe("llava-1.5-13b").hub_id == "llava-hf/llava-1.5-13b-hf"
    assert [r.name for r in list_recipes()].count("llava-1.5-7b") == 1


def test_an_embedded_checkpoint_is_the_folder_beside_its_recipe(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own.yaml").write_text(GOOD.replace("llava-hf/llava-1.5-7b-hf", "own"))
    assert load_recipe(tmp_path / "own.yaml").source == str((tmp_path / "own").resolve())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not a YAML file"),
        ("- a", "must be a mapping of keys, got list"),
        (GOOD + "\nlicense: x", "unknown key 'license'; did you mean 'licence'"),
        (GOOD.replace("host: llava\n", ""), "keys missing: host"),
    ],
)
def test_a_broken_recipe_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not a YAML file"), ("- a", "must be a mapping"), ("settings: 3", "'settings'")])
def test_settings_are_not_written_into_what_is_no_recipe(text, message):
    with pytest.raises(ValueError, match=message):
        with_settings(text, "expedit", {"tau": 1.0})


def test_unknown_names_are_none():
    assert find_recipe("nothing") is None
