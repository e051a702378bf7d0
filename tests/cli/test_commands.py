"""The commands end to end on a checkpoint with random weights."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.command_line import CliRunner
from tests.embedded import random_checkpoint, random_gemma4, random_internvl, random_qwen
from tests.marks import quick_first, quick_only
from vtr.cli import app
from vtr.eval import examples
from vtr.eval.run import results
from vtr.registry import list_methods

ROOT = Path(__file__).parents[2]


def vtr(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "scene.png"
    Image.effect_noise((300, 200), 90).convert("RGB").save(path)
    return path


def run(scene, *arguments, code=0, next_=False):
    place = ("--out", scene.parent / "pictures", "--model", random_checkpoint(next_))
    return vtr("run", *place, "--image", scene, "--question", "what is this?", "--max-new-tokens", 3, *arguments, code=code)


def test_list_shows_every_method_and_filters():
    shown = vtr("list").stdout
    assert all(name in shown for name in list_methods())
    assert [row["name"] for row in json.loads(vtr("list", "--stage", "prefill", "--json").stdout)] == list_methods(stage="prefill")
    assert [row["name"] for row in json.loads(vtr("list", "fast*", "--json").stdout)] == list_methods("fast*")
    assert "unknown stage 'later'; one of input, tower, boundary, prefill, decode" in vtr("list", "--stage", "later", code=2).output
    table = vtr("list", "--markdown").stdout.strip().splitlines()
    assert len(table) == 2 + len(list_methods())
    assert all(line.startswith("| ") and line.endswith(" |") for line in table[2:])


def test_a_command_that_finds_no_memory_says_so_without_a_traceback(monkeypatch):
    monkeypatch.setattr("vtr.cli.list_.list_methods", lambda *a, **k: torch.empty(10**15))
    assert "error:" in (said := vtr("list", code=1).stderr) and "can't allocate memory" in said


@pytest.mark.parametrize("name", quick_only(("fastv", "flowcut", "vcast"), list_methods()))
def test_info_explains_every_setting(name):
    from vtr.cli.info import SHARED
    from vtr.registry import method_class
    from vtr.types.settings import default_settings

    shown = vtr("info", name).stdout
    cls = method_class(name)
    settings = set(default_settings(cls)) - {"keep", "keep_ratio", "average_keep"}
    assert all(setting in shown for setting in settings)
    assert settings <= set(SHARED) | set(cls.card.settings), "a setting without a meaning"
    assert all(stage in shown for stage in cls.stages)


def test_methods_for_videos_say_so():
    rows = {row["name"]: row for row in json.loads(vtr("list", "--json").stdout)}
    assert "video" in rows["vcast"]["needs"] and "video" not in rows["divprune"]["needs"]
    shown = vtr("info", "vcast").stdout
    assert "a video" in shown and "vtr run --model tiny-llava-video --video FILE" in shown
    assert "vtr run --model tiny-llava --image FILE" in vtr("info", "divprune").stdout


def test_models_lists_recipes(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "llava-hf/llava-v1.6-vicuna-13b-hf" in vtr("models").stdout
    rows = {line.split()[0]: " ".join(line.split()) for line in vtr("models").stdout.splitlines()}
    assert "apache-2.0 15.4 any 4 to 16384 32 x 149.5 (640x360)" in rows["qwen2.5-vl-7b"]
    assert rows["internvl3-8b"].endswith("16 x 16 <= 3328 (13 views) -") and rows["llava-onevision-7b"].endswith(
        "<= 8667 (37 views) 32 x 196"
    )
    listed = json.loads(vtr("models", "--json").stdout)
    assert {"name", "hub_id", "licence", "memory_gib", "tokens", "prompt"} <= set(listed[0])


def test_version():
    assert vtr("--version").stdout.startswith("vtr 0.")


def test_run_prints_both_sides_and_draws(scene):
    shown = run(scene, "--method", "divprune", "--keep", 64).stdout
    assert "full" in shown
    assert "576" in shown
    assert "64" in shown
    picture = scene.parent / "pictures" / "scene-0-divprune-64.png"
    assert str(picture) in shown
    assert "KV MiB (float32)" in shown
    assert Image.open(picture).size == (480, 480)


def test_run_gives_json(scene):
    found = json.loads(run(scene, "--method", "fastv", "--keep", 64, "--set", "layer=1", "--json").stdout)
    assert found["visual_tokens"] == [576]
    assert found["reduced"]["retained"] == [64]
    assert found["report"]["images"][0]["per_layer"] == [576, 64, 64]
    assert found["full"]["average_tokens"] == 576
    assert found["reduced"]["tflops"] < found["full"]["tflops"]
    assert len(found["full"]["prefill_runs_ms"]) == 3


@pytest.mark.usefixtures("quick_answers")
@pytest.mark.parametrize(("method", "left"), quick_first([("none", 0), ("resize", 64), ("pool", 64), ("random", 64), ("uniform", 64)], 2))
def test_run_with_every_kind_of_method(scene, method, left):
    budget = () if method == "none" else ("--keep", 64)
    found = json.loads(run(scene, "--method", method, *budget, "--json").stdout)
    assert found["reduced"]["retained"] == [left]
    assert Path(found["pictures"][0]).is_file()


@pytest.mark.usefixtures("quick_answers")
def test_run_with_several_images_and_marks(scene):
    found = json.loads(
        vtr(
            *("run", "--model", random_checkpoint(), "--out", scene.parent / "pictures", "--image", scene, "--image", scene),
            *("--question", "<image> and <image>: same?", "--method", "uniform", "--keep-ratio", 0.25, "--max-new-tokens", 2, "--json"),
        ).stdout
    )
    assert found["reduced"]["retained"] == [144, 144]
    assert len(set(found["pictures"])) == 2


@pytest.mark.usefixtures("quick_answers")
def test_run_on_anyres(scene):
    found = json.loads(run(scene, "--method", "random", "--keep", 100, "--seed", 3, "--json", next_=True).stdout)
    entry = found["report"]["images"][0]
    assert found["reduced"]["retained"] == [100]
    assert entry["views"] > 1
    assert found["report"]["methods"][0]["seed"] == 3


def cells(folder):
    return {path.name.rsplit(".", 2)[0]: path for path in folder.glob("*.json")}


def evaluate(folder, *arguments, code=0):
    return vtr("eval", "--model", random_checkpoint(), "--out", folder, "--limit", 1, "--max-new-tokens", 2, *arguments, code=code)


def test_eval_writes_one_file_per_cell_and_never_runs_one_twice(tmp_path):
    shown = evaluate(tmp_path, "--methods", "full,none,random,fastv", "--keep", "192,64", "--seeds", "0,1").stdout
    assert "macro" in shown
    assert "2 seeds" in shown
    written = cells(tmp_path)
    assert set(written) == {
        "random.full.shapes",
        "random.none.shapes",
        "random.fastv.keep-192.shapes",
        "random.fastv.keep-64.shapes",
        *(f"random.random.keep-{keep}.shapes.seed-{seed}" for keep in (192, 64) for seed in (0, 1)),
    }
    cell = results.read_cell(written["random.fastv.keep-64.shapes"])
    assert [s["family"] for s in cell["samples"]] == ["existence", "attribute", "counting", "relation", "text"]
    assert {tuple(s["retained"]) for s in cell["samples"]} == {(64,)}
    assert cell["samples"][0]["per_layer"] == [576, 576, 64]
    assert cell["summary"]["average_tokens"] == pytest.approx((576 * 2 + 64) / 3)
    full = results.read_cell(written["random.full.shapes"])
    assert full["summary"]["retained"] == 576
    assert full["summary"]["tflops"] > cell["summary"]["tflops"] > 0

    before = {path: path.stat().st_mtime_ns for path in written.values()}
    evaluate(tmp_path, "--methods", "full,random", "--keep", "64,16", "--seeds", "1")
    after = cells(tmp_path)
    assert set(after) - set(written) == {"random.random.keep-16.shapes.seed-1"}
    assert {path: path.stat().st_mtime_ns for path in written.values()} == before


def test_eval_answers_do_not_depend_on_the_batch(tmp_path):
    outcomes = []
    for size in (1, 3):
        folder = tmp_path / str(size)
        evaluate(folder, "--methods", "full,divprune", "--keep", 64, "--batch-size", size)
        outcomes.append(
            [
                [{k: v for k, v in s.items() if k != "latency_ms"} for s in results.read_cell(path)["samples"]]
                for _, path in sorted(cells(folder).items())
            ]
        )
    assert outcomes[0] == outcomes[1]


def test_eval_with_a_shared_tower_answers_the_same_and_tells_no_milliseconds(tmp_path):
    found = []
    for name, options in (("own", ()), ("shared", ("--share-tower",))):
        shown = evaluate(tmp_path / name, "--methods", "full,fastv", "--keep", 64, *options).stdout
        rows = [line.split() for line in shown.splitlines() if line.startswith(("full", "fastv"))]
        assert len(rows) == 2 and all((row[-1] == "-") == (name == "shared") for row in rows)
        found.append([[s["prediction"] for s in results.read_cell(path)["samples"]] for _, path in sorted(cells(tmp_path / name).items())])
    assert found[0] == found[1]


def test_eval_reports_what_it_does_not_trust_and_runs_it_again(tmp_path):
    evaluate(tmp_path, "--methods", "full")
    path = cells(tmp_path)["random.full.shapes"]
    whole = path.read_text()
    path.write_text(whole[:1000])
    (tmp_path / "foreign.json").write_text("{}")
    again = evaluate(tmp_path, "--methods", "full")
    assert f"ignored: {path.name}: not complete JSON" in again.stderr
    assert "ignored: foreign.json: not a result of vtr eval" in again.stderr
    assert results.read_cell(path)["summary"]["samples"] == 5
    assert (tmp_path / "foreign.json").read_text() == "{}"


def test_eval_counts_anyres_tokens_without_newlines(tmp_path):
    vtr("eval", "--model", random_checkpoint(True), "--out", tmp_path, "--methods", "full", "--limit", 1, "--max-new-tokens", 1)
    sample = results.read_cell(next(iter(cells(tmp_path).values())))["samples"][0]
    assert sample["retained"] == [2880]
    assert sample["newlines"] == [48, 48]


def test_demo_draws_a_contact_sheet(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shipped = examples.load_examples()
    monkeypatch.setattr(examples, "load_examples", lambda: shipped[:2])
    shown = vtr("demo", "--model", random_checkpoint(), "--out", tmp_path / "demo.png", "--methods", "random,fastv", "--keep", 64).stdout
    assert "correct" in shown and "of 2" in shown
    assert "prefill ms" in shown
    assert Image.open(tmp_path / "demo.png").width > 900


def test_frozen_layers_are_counted_as_what_they_cost(scene, tmp_path):
    found = json.loads(run(scene, "--method", "shortv", "--set", "layers=[1]", "--json").stdout)
    assert found["reduced"]["retained"] == [576]
    assert found["reduced"]["kv_mib"] == found["full"]["kv_mib"]
    assert 0.6 * found["full"]["tflops"] < found["reduced"]["tflops"] < 0.95 * found["full"]["tflops"]
    evaluate(tmp_path, "--methods", "full,shortv", "--set", "shortv.layers=[1]")
    full, shortv = (results.read_cell(cells(tmp_path)[f"random.{name}.shapes"])["summary"] for name in ("full", "shortv"))
    assert shortv["frozen_layers"] == [1]
    assert 0.6 * full["tflops"] < shortv["tflops"] < 0.95 * full["tflops"]


def test_info_says_when_each_image_decides():
    for name, said in (("corematching", "none: each image decides"), ("fastv", "keep_ratio="), ("none", "none: the method has no budget")):
        shown = CliRunner().invoke(app, ["info", name])
        assert shown.exit_code == 0 and said in " ".join(shown.stdout.split()), shown.output


@pytest.mark.usefixtures("quick_answers")
@pytest.mark.parametrize(
    ("folder", "arguments", "before", "kept"),
    quick_first(
        [
            (random_qwen, ("--max-pixels", 48 * 48), 6, 5),
            (random_internvl, (), 45, 7),
            (random_qwen, (), 24, 7),
            (random_gemma4, (), 260, 7),
            (random_gemma4, ("--max-pixels", 70 * 16 * 16), 60, 7),
        ],
        2,
    ),
)
def test_run_on_images_of_any_size(scene, folder, arguments, before, kept):
    place = ("--out", scene.parent / "pictures", "--model", folder(), "--image", scene, "--question", "what is this?")
    said = json.loads(vtr("run", *place, "--method", "divprune", "--keep", kept, "--max-new-tokens", 2, *arguments, "--json").stdout)
    assert said["visual_tokens"] == [before] and said["reduced"]["retained"] == [kept]
    assert {f"--{name.replace('_', '-')}": said[name] for name in ("max_pixels",) if name in said} == dict(
        zip(arguments[::2], arguments[1::2], strict=True)
    )
    assert Image.open(said["pictures"][0]).width >= 480


def test_limits_of_pixels_are_recorded_and_refused_where_there_are_none(tmp_path):
    arguments = ("--methods", "full,uniform", "--keep", 5, "--limit", 1, "--max-new-tokens", 2, "--max-pixels", 48 * 48)
    vtr("eval", "--model", random_qwen(), "--out", tmp_path, *arguments)
    written = [results.read_cell(path) for path in cells(tmp_path).values()]
    assert [content["fingerprint"]["max_pixels"] for content in written] == [48 * 48] * 2
    assert {sample["visual_tokens"][0] for content in written for sample in content["samples"]} == {9}
    refused = vtr("eval", "--model", random_checkpoint(), "--out", tmp_path, *arguments, code=2)
    assert "max_pixels: the processor of 'llava' has no such limit, got 2304; leave it out" in refused.output
    image = ("--image", ROOT / "eval/examples/text-0.png", "--question", "?")
    smaller = vtr("run", "--model", random_qwen(), *image, "--out", tmp_path, "--method", "resize", "--keep", 5, code=1)
    assert "its processor makes images smaller: give --max-pixels" in " ".join(smaller.output.split())
