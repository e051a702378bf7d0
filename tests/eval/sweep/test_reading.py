"""A sweep that is wrong says all of what is wrong, where, and what to write instead."""

import pytest

pytest.importorskip("pydantic")

from vtr.eval.sweep.grid import load_sweep
from vtr.eval.sweep.reading import SweepError

GOOD = """\
models: tiny-llava
methods: [full, random, fastv]
budgets: {keep: [192, 64]}
equalise: keep
settings: {fastv: {layer: [2, 3]}}
tasks: shapes
seeds: [0, 1]
limit: 5
"""

MALFORMED = {
    "unknown key": ("limit: 5", "limt: 5", r"line 8, limt: unknown key 'limt'; did you mean 'limit'"),
    "unknown method": (
        "[full, random, fastv]",
        "[full, random, fast-v, fastv]",
        r"line 2, methods\[2\]: unknown method 'fast-v'; did you mean 'fastv'",
    ),
    "unknown task": ("tasks: shapes", "tasks: [shape]", r"line 6, tasks\[0\]: unknown task 'shape'; did you mean 'shapes'"),
    "unknown model": ("models: tiny-llava", "models: tiny-lava", r"line 1, models.*unknown name 'tiny-lava'; did you mean 'tiny-llava'"),
    "unknown setting": (
        "layer: [2, 3]",
        "layr: [2, 3]",
        r"line 5, settings\.fastv\.layr: unknown setting 'layr' of fastv; did you mean 'layer'",
    ),
    "setting of another method": (
        "{fastv: {layer",
        "{dart: {layer",
        r"line 5, settings\.dart: 'dart' is not among the methods of this sweep; leave it out",
    ),
    "setting of full": (
        "{fastv: {layer",
        "{full: {layer",
        r"line 5, settings\.full: 'full' is the model without reduction and has no settings",
    ),
    "value out of range": ("layer: [2, 3]", "layer: [2, 0]", r"line 5, settings\.fastv\.layer: fastv: layer must be at least 1, got 0"),
    "value of a wrong kind": ("layer: [2, 3]", "layer: [two]", r"line 5, settings\.fastv\.layer: fastv: layer .*'two'"),
    "layer the model has not": (
        "layer: [2, 3]",
        "layer: [2, 99]",
        r"settings\.fastv: fastv keep=192 layer=99.* on tiny-llava: .*99.* this LLM has 6 layers; use 1 to 5",
    ),
    "budget of nothing": (
        "[192, 64]",
        "[192, 0]",
        r"line 3, budgets\.keep\[1\]: .*keep must be at least 1, got 0; method 'none' keeps no visual token",
    ),
    "budget above the model": (
        "[192, 64]",
        "[9999]",
        r"methods\[1\]: random keep=9999.* on tiny-llava: keep=9999 is above the 576 visual tokens",
    ),
    "ratio above one": (
        "{keep: [192, 64]}",
        "{keep_ratio: [1.5]}",
        r"budgets\.keep_ratio\[0\]: .*must be in \(0, 1\], got 1.5; 0.25 keeps a quarter",
    ),
    "two kinds of budget": (
        "{keep: [192, 64]}",
        "{keep: [64], keep_ratio: [0.5]}",
        r"budgets: give exactly one of keep, keep_ratio, average_keep, got keep and keep_ratio",
    ),
    "average out of reach": ("equalise: keep\n", "", r"average_keep=64.0 is out of reach.*or write `equalise: keep`"),
    "text for a number": ("limit: 5", "limit: five", r"line 8, limit: must be an integer without quotes, got 'five'"),
    "number below one": ("limit: 5", "limit: 0", r"line 8, limit: must be at least 1, got 0"),
    "no tasks": ("tasks: shapes\n", "", r"'tasks' is missing; write for example `tasks: \[shapes\]`"),
    "nothing to run": ("[full, random, fastv]", "[]", r"methods: must name at least one, got nothing and no plans"),
    "a key twice": ("limit: 5", "limit: 5\nlimit: 6", r"limit: is given twice; the first would be ignored"),
    "a mapping for a list": ("[0, 1]", "{a: 1}", r"line 7, seeds\[0\]: must be an integer without quotes"),
    "unknown word": ("equalise: keep", "equalise: none", r"line 4, equalise: must be 'average_keep' or 'keep', got 'none'"),
    "unknown dtype": ("limit: 5", "dtype: float33", r"dtype: unknown dtype 'float33'; did you mean 'float32'"),
    "unknown attention": ("limit: 5", "attention: spda", r"attention: unknown attention backend 'spda'; did you mean 'sdpa'"),
    "plan of one": (
        "limit: 5",
        "plans: [[fastv]]",
        r"plans\[0\]: a plan has at least two methods, got 1; a single one belongs under methods",
    ),
    "plan that removes nothing": (
        "limit: 5",
        "plans: [[{divprune: {keep: 64}}, {fastv: {keep: 128}}]]",
        r"plans\[0\]: .*removes nothing, 64 tokens are left",
    ),
    "plan with an unknown setting": (
        "limit: 5",
        "plans: [[{divprune: {keeep: 64}}, fastv]]",
        r"plans\[0\]: divprune: unknown setting 'keeep'; did you mean 'keep'",
    ),
    "bad resources": ("limit: 5", "workers: {gpu: 1}", r"workers\.gpu: unknown key 'gpu'; did you mean 'gpus'"),
    "not YAML": ("[full, random, fastv]", "[full, random", r"not a YAML file \(.*line 3"),
    "tabs": ("limit: 5", "\tlimit: 5", r"not a YAML file"),
}


def write(folder, text):
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_the_good_one_is_good(tmp_path):
    sweep = load_sweep(write(tmp_path, GOOD))
    assert [job.cell.label for job in sweep.jobs] == [
        "full",
        *(f"random keep={keep} seed {seed}" for keep in (192, 64) for seed in (0, 1)),
        *(f"fastv keep={keep}{layer}" for layer in ("", " layer=3") for keep in (192, 64)),
    ]
    assert sweep.folder.parts[-2:] == ("sweeps", "sweep")


@pytest.mark.parametrize(("old", "new", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_mistake_is_named_with_its_place_and_the_way_out(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(SweepError, match=message) as caught:
        load_sweep(write(tmp_path, GOOD.replace(old, new)))
    assert str(tmp_path / "sweep.yaml") in str(caught.value) and "nothing was run" in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path):
    mistakes = [MALFORMED[name] for name in ("unknown key", "unknown task", "unknown setting", "budget of nothing")]
    text = GOOD
    for old, new, _ in mistakes:
        text = text.replace(old, new)
    with pytest.raises(SweepError, match="4 mistakes") as caught:
        load_sweep(write(tmp_path, text))
    for _, _, message in mistakes:
        assert caught.match(message)


@pytest.mark.parametrize("content", ["- a\n- b\n", "", "3"])
def test_a_file_that_is_no_mapping(tmp_path, content):
    with pytest.raises(SweepError, match="must be a mapping with models, methods and tasks"):
        load_sweep(write(tmp_path, content))


def test_changes_from_the_command_line(tmp_path):
    changes = ["methods=fastv", "budgets.keep=[32]", "settings.fastv.layer=4", "seeds.1=7", "limit=null"]
    (job,) = load_sweep(write(tmp_path, GOOD), changes).jobs
    assert job.cell.label == "fastv keep=32 layer=4" and job.cell.limit is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("limit", "override: must look like key=value, got 'limit'"),
        ("seeds.9=1", "override: there is no 'seeds.9' in this sweep"),
        ("limit=[", "override: the value of 'limit' must be YAML"),
        ("limt=3", "limt: unknown key 'limt'; did you mean 'limit'"),
    ],
)
def test_a_wrong_change_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_sweep(write(tmp_path, GOOD), [change])


def test_a_sweep_that_is_not_there():
    with pytest.raises(ValueError, match="no file 'missing.yaml'; eval/sweeps and eval/ablations have examples"):
        load_sweep("missing.yaml")
