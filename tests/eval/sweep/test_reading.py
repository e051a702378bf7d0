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
        r"line 5, settings\.fastv\.layer: fastv keep=192 layer=99.* on tiny-llava: .*99.* this LLM has 6 layers; use 1 to 5",
    ),
    "budget of nothing": (
        "[192, 64]",
        "[192, 0]",
        r"line 3, budgets\.keep\[1\]: .*keep must be at least 1, got 0; method 'none' keeps no visual token",
    ),
    "budget above the model": (
        "[192, 64]",
        "[9999]",
        r"line 3, budgets\.keep\[0\]: random keep=9999.* on tiny-llava: keep=9999 is above the 576 visual tokens",
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
    "average out of reach": (
        "equalise: keep",
        "equalise: average_keep",
        r"line 3, budgets\.keep\[1\]: fastv average_keep=64.0.* on tiny-llava: average_keep=64 is out of reach.*or write `equalise: keep`",
    ),
    "text for a number": ("limit: 5", "limit: five", r"line 8, limit: must be an integer without quotes, got 'five'"),
    "number below one": ("limit: 5", "limit: 0", r"line 8, limit: must be at least 1, got 0"),
    "no tasks": ("tasks: shapes\n", "", r"'tasks' is missing; write for example `tasks: \[shapes\]`"),
    "nothing to run": ("[full, random, fastv]", "[]", r"methods: must name at least one, got nothing and no plans"),
    "a key twice": ("limit: 5", "limit: 5\nlimit: 6", r"limit: is given twice; the first would be ignored"),
    "a mapping for a list": ("[0, 1]", "{a: 1}", r"line 7, seeds\[0\]: must be an integer without quotes"),
    "unknown word": ("equalise: keep", "equalise: none", r"line 4, equalise: must be 'keep' or 'average_keep', got 'none'"),
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
    "plan with an unknown method": (
        "limit: 5",
        "plans: [[nope, fastv]]",
        r"1 mistake;(?s:.*)line 8, plans\[0\]\[0\].*: unknown method 'nope'",
    ),
    "budget among the settings": (
        "layer: [2, 3]",
        "keep: [3]",
        r"line 5, settings\.fastv\.keep: keep is a budget and the sweep has `budgets`, got keep=3; write the value there, or leave `budgets` out",
    ),
    "seed that is not among the seeds": (
        "{fastv: {layer: [2, 3]}}",
        "{random: {seed: 7}}",
        r"line 5, settings\.random\.seed: seed must be one of `seeds` \(0, 1\), got 7; write it there",
    ),
    "method twice": (
        "[full, random, fastv]",
        "[full, random, fastv, random]",
        r"line 2, methods\[3\]: random is given twice; leave one out",
    ),
    "task twice": ("tasks: shapes", "tasks: [shapes, shapes]", r"line 6, tasks\[1\]: shapes is given twice"),
    "budget twice": ("[192, 64]", "[64, 192, 64]", r"line 3, budgets\.keep\[2\]: 64 is given twice"),
    "seed twice": ("[0, 1]", "[1, 1]", r"line 7, seeds\[1\]: 1 is given twice"),
    "model twice": ("models: tiny-llava", "models: [tiny-llava, tiny-llava]", r"line 1, models\[1\]: tiny-llava is given twice"),
    "value twice": ("layer: [2, 3]", "layer: [2, 2]", r"line 5, settings\.fastv\.layer\[1\]: 2 is given twice"),
    "device that is none": ("limit: 5", "device: gpu", r"line 8, device: unknown device 'gpu'; write cpu, cuda, cuda:0"),
    "key that is no text": ("limit: 5", "3: 5", r"1 mistake;(?s:.*)line 8, 3: a key must be text, got 3; put it in quotes"),
    "key that is no text inside": ("{keep: [192, 64]}", "{keep: 64, no: 3}", r"line 3, budgets\.no: a key must be text, got no"),
    "alias of itself": ("limit: 5", "limit: &a [*a]", r"has an alias \(\*name\) inside what it stands for; write it out"),
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


def test_an_unknown_model_is_one_mistake(tmp_path):
    with pytest.raises(SweepError, match="1 mistake;.*\n.*unknown name 'tiny-lava'"):
        load_sweep(write(tmp_path, GOOD.replace("tiny-llava", "tiny-lava")))


def test_a_list_that_is_missing_does_not_hide_other_mistakes(tmp_path):
    with pytest.raises(SweepError, match="2 mistakes;(?s:.*)'tasks' is missing(?s:.*)unknown setting 'layr'"):
        load_sweep(write(tmp_path, GOOD.replace("tasks: shapes\n", "").replace("layer", "layr")))


def test_every_wrong_setting_of_one_method_is_named(tmp_path):
    text = GOOD.replace("{fastv: {layer: [2, 3]}}", "{expedit: {window: 4, grid: [[30, 30]], alpha: 9}}").replace("fastv]", "expedit]")
    with pytest.raises(SweepError, match="3 mistakes") as caught:
        load_sweep(write(tmp_path, text))
    for message in (
        r"expedit\.window: .*must be odd, got 4",
        r"expedit\.grid: .*larger than the token grid",
        r"expedit\.alpha: .*alpha=9 must",
    ):
        assert caught.match(rf"(?s:.*)line 5, settings\.{message}")


def test_a_place_in_a_list_that_lost_an_entry_is_the_list(tmp_path):
    text = GOOD.replace("[full, random, fastv]", "[nope, full, random, random]").replace("{fastv: {layer: [2, 3]}}", "{}")
    with pytest.raises(SweepError, match="line 2, methods: random is given twice") as caught:
        load_sweep(write(tmp_path, text.replace("limit: 5", "plans: [[nope, fastv], [{divprune: {keep: 64}}, {fastv: {keep: 128}}]]")))
    assert (
        caught.match(r"(?s:.*)line 2, methods\[0\]: unknown(?s:.*)line 8, plans: divprune\+fastv.*removes nothing")
        and len(caught.value.mistakes) == 4
    )


def test_a_device_of_another_machine_is_refused_only_where_it_is_to_run(tmp_path):
    file = write(tmp_path, GOOD.replace("models: tiny-llava", "models: [{model: tiny-llava, device: 'cuda:99'}]"))
    assert len((sweep := load_sweep(file)).jobs) == 9
    assert sweep.elsewhere[0].startswith("'cuda:99' does not exist on this machine; here are cpu")
    with pytest.raises(SweepError, match=r"line 1, models\[0\]\.device: 'cuda:99' does not exist on this machine"):
        load_sweep(file, here=True)


def test_a_seed_among_the_settings_picks_one_and_null_is_no_budget(tmp_path):
    text = GOOD.replace("[full, random, fastv]", "[random, prumerge]").replace("[192, 64]", "[64]")
    jobs = load_sweep(write(tmp_path, text.replace("{fastv: {layer: [2, 3]}}", "{random: {seed: 1}, prumerge: {keep: [null]}}"))).jobs
    assert [(job.cell.name, job.cell.seed, job.cell.settings["keep"]) for job in jobs] == [("random", 1, 64), ("prumerge", None, None)]


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
