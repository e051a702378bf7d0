"""A plan beside a checkpoint: what `Plan.save` wrote, `vtr.load_plan` reads, from a folder, a file or the hub; anything else is one sentence."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

import vtr
from tests.embedded import random_checkpoint
from tests.tiny_models import ONE, batch_of, build, model_of
from vtr.hosts._protocol import host_of
from vtr.models.loading import load_model

pytestmark = pytest.mark.usefixtures("no_gradients")

METHODS = [vtr.DivPrune(keep=18), vtr.FastV(keep=9, layer=1)]


def told(plan: vtr.Plan) -> tuple[str, dict]:
    """What two plans have in common that do the same; the functions in their steps are made anew."""
    return str(plan), plan.to_dict()


def beside(folder: Path, **content: object) -> Path:
    """A folder with a plan file of that content, whose methods are one that exists if nothing else is said."""
    made = {"host": "llava", "methods": [{"name": "fastv", "keep": 9, "layer": 1}]} | content
    (folder / "vtr.json").write_text(json.dumps(made))
    return folder


def test_a_model_is_reduced_by_the_plan_beside_its_checkpoint(tmp_path):
    model, batch = model_of("llava"), batch_of("llava", ONE)
    plan = vtr.plan(model, METHODS)
    with vtr.reduced(model, plan):
        wanted = model(**batch.inputs).logits
    assert plan.save(tmp_path) == tmp_path / "vtr.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vtr.json"], "nothing half written is left"
    found = vtr.load_plan(model, tmp_path)
    assert told(found) == told(vtr.load_plan(model, str(tmp_path / "vtr.json"))) == told(plan)
    with vtr.reduced(model, found) as reduction:
        assert (model(**batch.inputs).logits == wanted).all()
    assert reduction.report().images[0].per_layer[-1] == 9


def test_without_a_place_it_lies_where_the_model_was_loaded_from(tmp_path):
    for file in random_checkpoint().iterdir():
        (tmp_path / file.name).symlink_to(file)
    model, _ = load_model(str(tmp_path), device="cpu")
    with pytest.raises(
        ValueError, match=r"^load_plan: .*/vtr\.json: No such file or directory; give a file that Plan\.save or vtr tune made$"
    ):
        vtr.load_plan(model)
    plan = vtr.plan(model, METHODS)
    plan.save(tmp_path)
    assert told(vtr.load_plan(model)) == told(plan)
    load_model(str(tmp_path), device="cpu")  # the file disturbs no loader


def test_a_plan_in_a_snapshot_of_the_hub_is_found_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit, model = "1f" * 20, build("llava")
    snapshot = tmp_path / "models--someone--reduced" / "snapshots" / commit
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    vtr.plan(model, METHODS).save(snapshot)
    wanted = told(vtr.plan(model, METHODS))
    assert told(vtr.load_plan(model, "someone/reduced")) == told(vtr.load_plan(model, "someone/reduced", revision=commit)) == wanted
    model.name_or_path = "someone/reduced"
    assert told(vtr.load_plan(model)) == wanted
    for name in ("someone/other", "a/b/c", "nowhere"):
        with pytest.raises(
            ValueError, match=rf"^load_plan: needs a folder or a repository .* with a vtr\.json, got '{name}' \([^\n]+; give"
        ):
            vtr.load_plan(model, name)


@pytest.mark.parametrize(
    ("message", "content"),
    [
        (r"not complete JSON \(Unterminated", '{"host": "llava", "meth'),
        (r"not complete JSON \('utf-8' codec", b"\xff\xfe"),
        ("has no methods; give a file that Plan.save or vtr tune made", "[1, 2]"),
        ("has no methods", '{"host": "llava", "methods": []}'),
        ("unknown method 'fastw'; did you mean 'fastv'", '{"host": "llava", "methods": [{"name": "fastw"}]}'),
        ("fastv: unknown setting 'layr'.*did you mean.*'layer'", '{"host": "llava", "methods": [{"name": "fastv", "layr": 2}]}'),
        ("must map 'name' to the name of a method", '{"host": "llava", "methods": [{"keep": 2}]}'),
        ("method must be", '{"host": "llava", "methods": "fastv"}'),
        ("must be made for a model of 'llava', got one for 'qwen2_vl'", '{"host": "qwen2_vl", "methods": [{"name": "fastv", "keep": 9}]}'),
    ],
)
def test_a_file_that_is_no_plan_for_the_model_is_refused_by_name(message, content, tmp_path):
    file = tmp_path / "vtr.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, TypeError), match=rf"^load_plan: \S*vtr\.json: [^\n]*{message}"):
        vtr.load_plan(model_of("llava"), tmp_path)


def test_a_plan_for_a_deeper_model_and_a_model_from_nowhere_are_refused(tmp_path):
    model = model_of("llava")
    with pytest.raises(ValueError, match=r"fastv: layer .*77"):
        vtr.load_plan(model, beside(tmp_path, methods=[{"name": "fastv", "keep": 9, "layer": 77}]))
    assert host_of(model).name == "llava" and not model.name_or_path
    with pytest.raises(ValueError, match=r"load_plan: this LlavaFor\w+ was not loaded from a checkpoint; say where its plan lies"):
        vtr.load_plan(model)


def test_a_file_without_a_host_is_taken_and_images_can_be_frames(tmp_path):
    file = beside(tmp_path, host=None, methods=[{"name": "evs", "keep": 9}])
    assert vtr.load_plan(model_of("llava"), file, visuals="prompt").methods[0].name == "evs"


@pytest.mark.parametrize("target", ["none/vtr.json", "plan.yaml", "missing"])
def test_save_wants_a_folder_or_a_json_file(target, tmp_path):
    plan = vtr.plan(model_of("llava"), METHODS)
    with pytest.raises(ValueError, match=r"^Plan\.save: must get a folder that exists or a \.json file in one, got '.*'; make the folder"):
        plan.save(tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_a_plan_that_cannot_be_written_down_leaves_the_old_file(tmp_path):
    plan = vtr.plan(model_of("llava"), METHODS)
    file = plan.save(tmp_path / "mine.json")
    before = file.read_bytes()
    with pytest.raises(ValueError, match="steps that Plan.map changed cannot be written down"):
        plan.map(lambda method, steps: steps).save(file)
    assert file.read_bytes() == before
