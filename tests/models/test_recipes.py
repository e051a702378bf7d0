"""Recipes: what is shipped is complete and consistent, and a broken one says what is wrong."""

from pathlib import Path

import pytest

from vtr.cost import TransformerShape, kv_bytes
from vtr.models.recipes import Recipe, find_recipe, list_recipes, load_recipe, with_settings
from vtr.registry import list_hosts

ROOT = Path(__file__).parents[2]
SHIPPED = ["llava-1.5-13b", "llava-1.5-7b", "llava-next-13b", "llava-next-7b", "tiny-llava", "tiny-llava-next", "tiny-vit-seg"]
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
    tokens = recipe.tokens
    assert set(tokens) == {"patch_grid", "per_view", "most_views", "most", "newlines"}
    assert tokens["per_view"] == tokens["patch_grid"][0] * tokens["patch_grid"][1]
    assert tokens["most"] == tokens["per_view"] * tokens["most_views"]
    assert recipe.image["size"][0] // recipe.image["patch"] == tokens["patch_grid"][0]
    assert recipe.host in list_hosts()
    mentioned = [part in recipe.prompt for part in ("<image>", "{question}")]
    assert all(mentioned) if "llava" in recipe.host else recipe.prompt == ""
    assert tokens["newlines"] == (recipe.host == "llava_next")


def test_memory_is_that_of_the_parameters():
    assert find_recipe("llava-1.5-7b").memory_gib == pytest.approx(7_063_427_072 * 2 / 2**30, abs=0.05)
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
