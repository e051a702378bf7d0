"""Bad input: one clear line on stderr, an exit code that scripts can rely on, never a traceback."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import vtr
from tests.command_line import CliRunner
from tests.embedded import random_checkpoint
from vtr.cli import app
from vtr.cli._common import EXIT_CODES, parse_list, parse_settings
from vtr.cli.eval import method_settings
from vtr.types.errors import Refusal, WrongType, WrongValue


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "scene.png"
    Image.effect_noise((300, 200), 90).convert("RGB").save(path)
    return path


def refused(code, message, *arguments):
    """The command ends with that code and says that; nothing of a traceback."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    said = " ".join(result.stderr.split())
    assert message in said, result.output + repr(result.exception)
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return said


def run(code, message, scene, *arguments, model=None, question="what is this?", image=None):
    place = ("--out", scene.parent / "pictures", "--model", model or random_checkpoint(), "--image", image or scene)
    return refused(code, message, "run", *place, "--question", question, "--max-new-tokens", 2, *arguments)


def evaluate(code, message, folder, *arguments):
    return refused(code, message, "eval", "--model", random_checkpoint(), "--out", folder, "--limit", 1, *arguments)


def test_unknown_method_names_the_closest(scene):
    for command in (("info", "fast-v"), ("eval", "--model", "x", "--out", scene.parent, "--methods", "fast-v")):
        refused(2, "unknown method 'fast-v'; did you mean 'fastv'", *command)
    run(2, "unknown method 'divprun'; did you mean 'divprune'", scene, "--method", "divprun")


def test_unknown_setting(scene):
    run(2, "fastv: unknown setting 'layr'; did you mean 'layer'", scene, "--method", "fastv", "--set", "layr=2")
    run(2, "divprune: unknown setting 'seed'", scene, "--method", "divprune", "--seed", 1)
    evaluate(2, "fastv: unknown setting 'layr'", scene.parent, "--methods", "fastv", "--set", "fastv.layr=2")


@pytest.mark.parametrize("pair", ["layer", "=2", " =2"])
def test_a_setting_is_key_and_value(scene, pair):
    run(2, f"--set: must look like key=value, got '{pair}'", scene, "--method", "fastv", "--set", pair)


def test_a_setting_is_given_once(scene):
    run(2, "--set: 'layer' is given twice", scene, "--method", "fastv", "--set", "layer=1", "--set", "layer=2")
    run(2, "--set: 'keep' is given by --keep already", scene, "--method", "fastv", "--keep", 64, "--set", "keep=64")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep", 0), "keep must be at least 1, got 0; method 'none' keeps no visual token"),
        (("--keep", -3), "keep must be at least 1, got -3"),
        (("--keep", 64, "--keep-ratio", 0.1), "give exactly one of keep, keep_ratio, average_keep, got keep=64, keep_ratio=0.1"),
        (("--keep-ratio", 0), "keep_ratio must be in (0, 1], got 0.0"),
        (("--keep-ratio", 1.5), "keep_ratio must be in (0, 1], got 1.5"),
        (("--keep", 577), "576"),
    ],
)
def test_impossible_budgets(scene, options, message):
    assert "keep" in run(2, message, scene, "--method", "divprune", *options)


def test_keep_above_the_tokens_of_this_image(scene):
    Image.new("RGB", (192, 192)).save(scene)  # one crop only, while the checkpoint could make 2880 tokens of an image
    message = "divprune: keep must be from 1 to the image's visual tokens, got 2000; image 0 has"
    run(2, message, scene, "--method", "divprune", "--keep", 2000, model=random_checkpoint(True))


def test_impossible_budgets_of_eval(tmp_path):
    both = "budget: give --keep or --keep-ratio, not both (got keep=64, keep_ratio=0.1)"
    evaluate(2, both, tmp_path, "--methods", "fastv", "--keep", "64", "--keep-ratio", "0.1")
    evaluate(2, "keep must be at least 1, got 0", tmp_path, "--methods", "fastv", "--keep", "64,0")
    evaluate(2, "--keep: must be a list of int separated by commas, got '64,x'", tmp_path, "--methods", "fastv", "--keep", "64,x")
    evaluate(2, "577", tmp_path, "--methods", "divprune,fastv", "--keep", "64,577")
    assert list(tmp_path.glob("*.json")) == [], "nothing runs when one cell is impossible"


def test_a_method_without_budget_gets_none(scene):
    run(2, "none: has no budget, got keep=64; leave it out", scene, "--method", "none", "--keep", 64)


def test_images(scene):
    missing = scene.parent / "gone.png"
    run(2, f"image: no file '{missing}'", scene, "--method", "random", image=missing)
    text = scene.parent / "text.png"
    text.write_text("no image")
    run(2, "is not an image that Pillow can read", scene, "--method", "random", image=text)
    cut = scene.parent / "cut.png"
    cut.write_bytes(scene.read_bytes()[:2000])
    run(2, "is damaged", scene, "--method", "random", image=cut)


def test_decompression_bomb(scene, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    run(2, "has too many pixels", scene, "--method", "random")


@pytest.mark.parametrize("question", ["<image> or <image>?", "<image><image><image> what?"])
def test_image_count_must_match_the_prompt(scene, question):
    run(2, f"question: has {question.count('<image>')} x <image> but 1 image(s) were given", scene, "--method", "random", question=question)


def test_models_that_cannot_be_loaded(scene):
    copy = shutil.copytree(random_checkpoint(), scene.parent / "copy")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(json.dumps({**json.loads(config), "model_type": "bert"}))
    run(2, "has model type 'bert', for which there is no host; known:", scene, "--method", "random", model=copy)
    (copy / "config.json").write_text(config)
    (copy / "model.safetensors").unlink()
    run(2, "has no weights (*.safetensors or *.bin)", scene, "--method", "random", model=copy)
    run(2, "model: no folder './gone'", scene, "--method", "random", model="./gone")
    run(2, "model: unknown name 'tiny-lava'; did you mean 'tiny-llava'", scene, "--method", "random", model="tiny-lava")


def test_a_hub_id_that_cannot_be_reached(scene):  # tests have no network
    said = run(1, "load_model: config of 'nobody/nothing' cannot be read", scene, "--method", "random", model="nobody/nothing")
    assert "check the id and the network, or give a folder" in said and "Retrying" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda:99"), "device: 'cuda:99' does not exist on this machine; here are cpu"),
        (("--device", "gpu"), "device: unknown name 'gpu'"),
        (("--dtype", "float8"), "dtype: unknown name 'float8'; one of auto, float32"),
        (("--attention", "flash"), "attention: unknown backend 'flash'; one of sdpa"),
    ],
)
def test_where_and_how(scene, tmp_path, options, message):
    run(2, message, scene, "--method", "random", *options)
    evaluate(2, message, tmp_path, "--methods", "full", *options)


def test_flash_attention_that_is_not_installed(scene):
    pytest.importorskip("transformers.utils").is_flash_attn_2_available() and pytest.skip("flash-attn is installed")
    message = "attention: 'flash_attention_2' cannot be used here; use 'sdpa', or install the package flash-attn"
    run(2, message, scene, "--method", "random", "--attention", "flash_attention_2")


def test_unwritable_folders(scene):
    (scene.parent / "file").write_text("")
    run(1, "out: cannot write to", scene, "--method", "random", "--out", scene.parent / "file" / "x")
    evaluate(1, "choose another folder with --out", scene.parent / "file" / "x", "--methods", "full")


def test_eval_options(tmp_path):
    evaluate(2, "unknown task 'shape'; did you mean 'shapes'", tmp_path, "--methods", "full", "--tasks", "shape")
    evaluate(2, "--set: must look like method.key=value here, got layer=2", tmp_path, "--methods", "fastv", "--set", "layer=2")
    evaluate(2, "settings: 'dart' is not among the methods", tmp_path, "--methods", "fastv", "--set", "dart.layer=2")
    evaluate(2, "--seeds: must be a list of int separated by commas, got 'a'", tmp_path, "--methods", "full", "--seeds", "a")
    evaluate(2, "--batch-size: must be at least 1, got 0", tmp_path, "--methods", "full", "--batch-size", 0)
    refused(2, "limit: must be at least 1, got 0", "eval", "--model", "x", "--methods", "full", "--out", tmp_path, "--limit", 0)


@pytest.mark.parametrize("question", ["", " ", "<image>"])
def test_a_question_asks_something(scene, question):
    run(2, f"--question: must not be empty, got '{question}'; ask something", scene, "--method", "random", question=question)


def test_the_rule_for_exit_codes_is_told():
    shown = " ".join(CliRunner().invoke(app, ["--help"], terminal_width=400).stdout.split())
    assert EXIT_CODES in shown


def test_other_commands():
    refused(2, "list: no method matches 'zzz*'; did you mean '", "list", "zzz*")
    refused(2, "list: no method matches 'fastvv'; did you mean 'fastv', ", "list", "fastvv", "--json")
    refused(2, "list: no method matches 'fastv'; did you mean 'flowcut'", "list", "fastv", "--stage", "tower")
    refused(2, "list_methods: unknown stage 'vision'; one of input, tower", "list", "--stage", "vision")
    refused(2, "list: give --json or --markdown, not both", "list", "--json", "--markdown")
    refused(2, "No such command", "runn")
    refused(2, "Missing option", "run")


def module_that(name, source):
    """A module of another package: its function `broken` is what the source says."""
    module = ModuleType(name)
    exec(f"def broken(*_, **__):\n    {source}", module.__dict__)
    return module


@pytest.mark.parametrize(
    ("module", "source", "error"),
    [
        ("transformers.cache_utils", "raise ValueError('Received cache of an unknown class')", ValueError),
        ("torch.nn.modules", "raise TypeError('missing keyword')", TypeError),
        ("vtr.eval.run.compare", "a, b = [1]", ValueError),
        ("vtr.eval.run.compare", "int('x')", ValueError),
        ("vtr.eval.run.compare", "len(1)", TypeError),
        ("vtr.eval.run.compare", "raise KeyError('raise')", KeyError),
        ("vtr.eval.run.compare", "raise ValueError('a plain one is no check')", ValueError),
    ],
)
@pytest.mark.usefixtures("quick_answers")
def test_a_bug_keeps_its_traceback(scene, monkeypatch, module, source, error):
    """What vtr's own checks did not raise is not the user's mistake, however it was raised."""
    monkeypatch.setattr("vtr.eval.run.compare.compare", module_that(module, source).broken)
    arguments = ["run", "--model", random_checkpoint(), "--image", scene, "--question", "?", "--method", "random"]
    result = CliRunner().invoke(app, [str(a) for a in [*arguments, "--out", scene.parent]])
    assert type(result.exception) is error
    assert result.exit_code == 1 and "error:" not in result.output


@dataclass(frozen=True, kw_only=True)
class Theirs(vtr.Method):
    """A method of another package, which raises plain errors where it looks at its settings."""

    tau: float = 1.0
    layers: tuple = ()

    stages = ("boundary",)
    default_budget = vtr.Budget(keep=5)

    def __post_init__(self):
        super().__post_init__()
        if self.tau < 0:
            raise ValueError(f"theirs: tau must be above 0, got {self.tau}; give a positive one")
        if self.tau == 0:
            raise TypeError("theirs: tau must be another number")

    def steps(self, geometry):
        if self.tau > 5:
            raise ValueError(f"theirs: tau must be at most 5 on {geometry.host}, got {self.tau}")
        return (vtr.Remove(vtr.Boundary(), lambda view: int("x")),)


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        (-1, "theirs: tau must be above 0, got -1; give a positive one"),
        (0, "theirs: tau must be another number"),
        (9, "theirs: tau must be at most 5 on llava, got 9"),
        ('"x"', "theirs: tau must be a number, got 'x'"),
    ],
)
def test_a_check_of_a_method_of_another_package_is_the_users_mistake(scene, monkeypatch, tau, message):
    monkeypatch.setitem(vtr.registry._METHODS, "theirs", Theirs)
    monkeypatch.setattr(Theirs, "name", "theirs")
    run(2, message, scene, "--method", "theirs", "--set", f"tau={tau}")


def test_what_such_a_method_raises_while_it_runs_is_a_bug(scene, monkeypatch):
    monkeypatch.setitem(vtr.registry._METHODS, "theirs", Theirs)
    monkeypatch.setattr(Theirs, "name", "theirs")
    arguments = ["run", "--model", random_checkpoint(), "--image", scene, "--question", "?", "--method", "theirs", "--out", scene.parent]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert type(result.exception) is ValueError and "invalid literal" in str(result.exception) and "error:" not in result.output


def test_checks_are_told_from_bugs_by_their_class():
    """No check of vtr raises a plain error where a command would take it for a bug; methods are checked where they are made."""
    for made in (
        lambda: vtr.create_method("fastv", layer=0),
        lambda: vtr.create_method("fastv", keep=0),
        lambda: vtr.create_method("fast-v"),
    ):
        with pytest.raises(ValueError) as error:
            made()
        assert isinstance(error.value, WrongValue)
    with pytest.raises(TypeError) as error:
        vtr.create_method("fastv", layer="two")
    assert isinstance(error.value, WrongType) and isinstance(error.value, Refusal)
    plain = re.compile(r"raise (ValueError|TypeError)\b")
    exempt = ("methods", "ops", "cost.py", "errors.py")
    files = [path for path in (Path(vtr.__file__).parent).rglob("*.py") if not set(exempt) & set(path.parts)]
    assert not [path.name for path in files if plain.search(path.read_text())], "raise WrongValue or WrongType of vtr.types.errors"


def test_values_are_json_where_they_can_be():
    pairs = ["a=1", "b=0.5", "c=true", "d=null", "e=[1, 2]", "f=rows", "g=1e-3", "h=True", "i=", "j=x=y"]
    values = [1, 0.5, True, None, [1, 2], "rows", 0.001, True, "", "x=y"]
    assert parse_settings(pairs) == dict(zip("abcdefghij", values))
    assert method_settings(["fastv.layer=3", "fastv.newlines=all"]) == {"fastv": {"layer": 3, "newlines": "all"}}
    assert parse_list("3, 1,3", int, "--x") == [3, 1]
