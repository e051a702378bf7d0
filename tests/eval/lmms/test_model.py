"""The model inside lmms-eval: order, batches, measurements, and the same answers per sample as `vtr eval`."""

import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from PIL import Image

import vtr
from tests.embedded import random_checkpoint, random_internvl, random_next_video, random_qwen
from vtr.data import shapes
from vtr.eval.run.cells import Cell
from vtr.eval.run.runner import Runner, summarise
from vtr.eval.tasks import get_task
from vtr.models.loading import load_model
from vtr.registry import create_method
from vtr.types import VtrError

ROOT = Path(__file__).parents[3]
SAMPLES = [shapes.test_samples(family, limit=2)[i] for i in (0, 1) for family in ("text", "attribute", "relation")]
METHODS = {"full": {}, "random": {"keep": 64, "seed": 1}, "fastv": {"keep": 64}}


@pytest.fixture(scope="module")
def lmms():
    """The package with our classes; the tests that need it are skipped where lmms-eval is not installed."""
    pytest.importorskip("lmms_eval")
    from vtr.eval.lmms import model

    return model


@pytest.fixture(scope="module")
def reduced_model(lmms):
    model = lmms.Vtr(str(random_checkpoint()), method="uniform", keep=64, device="cpu", batch_size="4", max_new_tokens=3)
    model.task_dict = {"t": {"test": SAMPLES}}
    yield model
    model.clean()


def instance(lmms, kind, index, *arguments):
    return lmms.Instance(kind, (*arguments, index, "t", "test"), 0, {"task": "t", "doc_id": index, "repeats": 1})


def chat(lmms, index, images=1, **settings):
    def messages(sample):
        pictures = [{"type": "image", "url": sample.image}] * images
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": sample.question}]}]

    return instance(lmms, "generate_until", index, "", messages, settings)


def texts(answers):
    return [answer.text for answer in answers]


def test_answers_come_in_the_order_of_the_requests_whatever_the_batches(lmms, reduced_model):
    requests = [chat(lmms, index, max_new_tokens=2 + index % 2) for index in range(6)]
    batched = reduced_model.generate_until(requests)
    alone = [reduced_model.generate_until([request])[0] for request in requests]
    assert texts(batched) == texts(alone)
    assert len(set(texts(batched))) > 1, "answers that are all the same would show nothing"
    lengths = [answer.token_counts.output_tokens for answer in batched]
    assert all(lengths[index] <= 2 + index % 2 for index in range(6))


def test_a_simple_request_gets_the_same_answer_as_a_chat(lmms, reduced_model):
    simple = instance(lmms, "generate_until", 1, SAMPLES[1].question, {"max_new_tokens": 3}, lambda sample: [sample.image])
    assert texts(reduced_model.generate_until([simple])) == texts(reduced_model.generate_until([chat(lmms, 1, max_new_tokens=3)]))


def test_tokens_are_measured_per_sample(lmms, reduced_model):
    answers = reduced_model.generate_until([chat(lmms, 0), chat(lmms, 1, images=0), chat(lmms, 2, images=2)])
    logged = [answer.token_counts.to_dict() for answer in answers]
    assert [entry["visual_tokens"] for entry in logged] == [576, 0, 1152]
    assert [entry["retained_tokens"] for entry in logged] == [64, 0, 128]
    assert [entry["average_tokens"] for entry in logged] == [64, 0, 128]
    assert all(entry["latency_ms"] > 0 and entry["input_tokens"] > entry["visual_tokens"] for entry in logged)
    assert json.dumps(logged)


@pytest.mark.parametrize(
    ("folder", "pixels", "tokens"),
    [
        (random_checkpoint, {}, 576),
        (partial(random_checkpoint, True), {}, 2880),
        (random_qwen, {"max_pixels": "2304"}, 9),
        (random_internvl, {}, 45),
    ],
)
def test_the_full_model_keeps_what_is_counted_without_newlines(lmms, folder, pixels, tokens):
    model = lmms.Vtr(str(folder()), device="cpu", **pixels)
    model.task_dict = {"t": {"test": SAMPLES}}
    entry = model.generate_until([chat(lmms, 0, max_new_tokens=1)])[0].token_counts.measured
    assert entry["visual_tokens"] == entry["retained_tokens"] == tokens
    model.clean()
    assert not hasattr(model, "model")


class Clips:
    """Stands in for the documents of a task: clips of 2, 4 and 8 frames, and one picture."""

    def __getitem__(self, index):
        return (
            [Image.new("RGB", (64, 48), (20 * index, 20 * frame, 0)) for frame in range(2 << index)]
            if index < 3
            else Image.new("RGB", (64, 48))
        )


def video_chat(lmms, index):
    kind = "video" if index < 3 else "image"
    parts = [{"type": "text", "text": "what?"}]
    return instance(
        lmms, "generate_until", index, "", lambda clip: [{"role": "user", "content": [{"type": kind, "url": clip}, *parts]}], {}
    )


def test_videos_stay_videos_where_the_model_has_some(lmms):
    model = lmms.Vtr(str(random_next_video()), method="uniform", keep=9, device="cpu", batch_size=4, max_frames_num=4, max_new_tokens=2)
    model.task_dict = {"t": {"test": Clips()}}
    requests = [video_chat(lmms, index) for index in range(4)]
    answers = model.generate_until(requests)
    logged = [answer.token_counts.measured for answer in answers]
    assert [entry["visual_tokens"] for entry in logged[:3]] == [2 * 9, 4 * 9, 4 * 9], "at most four frames of nine tokens"
    assert logged[3]["visual_tokens"] > 36, "a picture is AnyRes"
    assert [entry["retained_tokens"] for entry in logged] == [9] * 4
    assert texts(answers) == [model.generate_until([request])[0].text for request in requests]
    simple = instance(lmms, "generate_until", 1, "what?", {}, lambda clip: [clip])
    assert texts(model.generate_until([simple])) == texts(answers[1:2])
    choices = [
        instance(lmms, "loglikelihood", index, "what?", answer, lambda clip: [clip]) for index in (0, 1) for answer in ("red", "blue")
    ]
    scored = model.loglikelihood(choices)
    assert [entry.token_counts.measured["visual_tokens"] for entry in scored] == [18, 18, 36, 36]
    alone = [model.loglikelihood([choice])[0].text for choice in choices]
    assert [entry.text[0] for entry in scored] == pytest.approx([loss for loss, _ in alone], abs=1e-4)
    model.clean()


def test_a_model_without_videos_gets_frames_as_images(lmms):
    model = lmms.Vtr(str(random_checkpoint()), method="uniform", keep=64, device="cpu", max_frames_num=2, max_new_tokens=1)
    model.task_dict = {"t": {"test": Clips()}}
    (answer,) = model.generate_until([video_chat(lmms, 2)])
    assert answer.token_counts.measured["visual_tokens"] == 2 * 576 and answer.token_counts.measured["retained_tokens"] == 2 * 64
    model.clean()


@pytest.mark.parametrize(("folder", "tokens"), [(random_checkpoint, 576), (random_internvl, 9)], ids=["llava", "internvl"])
def test_frames_as_one_video_where_it_is_asked_for(lmms, folder, tokens):
    settings = {"device": "cpu", "max_frames_num": 2, "max_new_tokens": 1, "batch_size": 3}
    model = lmms.Vtr(str(folder()), method="vcast", keep=7, visuals="prompt", **settings)
    model.task_dict = {"t": {"test": Clips()}}
    answers = model.generate_until([video_chat(lmms, index) for index in (2, 0, 3)])
    measured = [answer.token_counts.measured for answer in answers]
    assert [entry["visual_tokens"] for entry in measured] == [2 * tokens, 2 * tokens, tokens] and {
        e["retained_tokens"] for e in measured
    } == {7}
    model.clean()
    with pytest.raises(ValueError, match="visuals must be 'each' or 'prompt', got 'all'"):
        lmms.Vtr(str(folder()), visuals="all", **settings)
    with pytest.raises(VtrError, match="'llava_next_video' takes videos, got visuals='prompt'"):
        lmms.Vtr(str(random_next_video()), visuals="prompt", **settings)


@pytest.mark.parametrize(
    ("folder", "settings"), [(random_next_video, {}), (random_internvl, {"visuals": "prompt"})], ids=["video", "images"]
)
def test_a_second_model_scores_frames(lmms, folder, settings):
    settings |= {"device": "cpu", "max_frames_num": 4, "max_new_tokens": 2, "batch_size": 4}
    model = lmms.Vtr(str(folder()), method="quota", keep=9, frame_scores=str(random_checkpoint()), **settings)
    asked, first = [], model.scorer.scores

    def scores(videos, questions):
        asked.append(([len(getattr(one, "frames", one)) for one in videos], questions))
        return first(videos, questions)

    model.scorer.scores = scores
    model.task_dict = {"t": {"test": Clips()}}
    answers = model.generate_until([video_chat(lmms, index) for index in range(4)])
    image = [1] if settings.get("visuals") else []
    assert sorted(count for frames, _ in asked for count in frames) == sorted([2, 4, 4, *image])
    assert {question for _, questions in asked for question in questions} == {"what?"}
    measured = [answer.token_counts.measured for answer in answers]
    assert [entry["retained_tokens"] for entry in measured[:3]] == [9, 9, 9] and measured[0]["scorer_seconds"] > 0
    assert sum(entry["scorer_prompts"] for entry in measured) == pytest.approx(10 + len(image))
    choices = [instance(lmms, "loglikelihood", 1, "what?", answer, lambda clip: [clip]) for answer in ("red", "blue")]
    assert len(model.loglikelihood(choices)) == 2 and asked[-1] == ([4, 4], ["what?", "what?"])
    model.clean()
    with pytest.raises(ValueError, match="vtr: frame_scores is for methods that read scores of frames, got method=vcast; leave it out"):
        lmms.Vtr(str(folder()), method="vcast", keep=9, frame_scores="tiny-llava", **settings)


def test_clean_removes_the_reduction(lmms):
    model = lmms.Vtr(str(random_checkpoint()), method="fastv", keep=64, device="cpu")
    inner = model.model
    model.clean()
    vtr.apply(inner, "uniform", keep=64).remove()  # refused on a model that is reduced already


def test_stop_strings_of_the_task_cut_the_answer(lmms):
    assert lmms._cut("one two three", ["three", "two"]) == "one"
    assert lmms._cut("one two three", "two") == "one"
    assert lmms._cut("one\n\ntwo", ["\n\n"]) == "one\n\ntwo", "added by lmms-eval, not by the task"
    assert lmms._cut(" one ", None) == "one"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, {"num_beams": 1, "do_sample": False}),
        ({"temperature": 0.7, "top_p": 0.9, "image_aspect_ratio": "pad"}, {"temperature": 0.7, "top_p": 0.9, "do_sample": True}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False}),
        ({}, {"do_sample": False}),
    ],
)
def test_sampling_only_where_it_is_asked_for(lmms, settings, expected):
    assert lmms._sampling(settings) == expected


def test_choices_are_scored_in_order(lmms, reduced_model):
    def choice(index, text):
        return instance(lmms, "loglikelihood", index, SAMPLES[index].question, text, lambda sample: [sample.image])

    alone = lmms.Instance("loglikelihood", ("", " red"), 0, {"task": "t", "doc_id": 0, "repeats": 1})
    requests = [*(choice(index, text) for index in (1, 2) for text in (" red", " dog", lambda sample: f" {sample.family}")), alone]
    found = texts(reduced_model.loglikelihood(requests))
    single = texts(reduced_model.loglikelihood([request])[0] for request in requests)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in single], abs=1e-4)
    assert len({loss for loss, _ in found}) == len(found)
    assert all(type(greedy) is bool for _, greedy in found)


def test_several_rounds_are_refused(reduced_model):
    with pytest.raises(VtrError, match="tasks with several rounds are not supported"):
        reduced_model.generate_until_multi_round([])


def test_bad_arguments_are_refused_before_a_model_is_loaded(lmms):
    with pytest.raises(ValueError, match="vtr: model_args need pretrained="):
        lmms.Vtr(method="fastv")
    with pytest.raises(ValueError, match="vtr: batch_size must be a whole number from 1 on, got 'auto'"):
        lmms.Vtr("nowhere/nothing", batch_size="auto")
    with pytest.raises(ValueError, match="model: unknown name 'tiny-lava'; did you mean 'tiny-llava'"):
        lmms.Vtr("tiny-lava", device="cpu")


def test_the_entry_point_leads_to_both_classes(lmms):
    if "vtr" not in {point.name for point in entry_points(group="lmms_eval.models")}:
        pytest.skip("vtr is not installed in this environment")
    from lmms_eval.models import get_model

    assert get_model("vtr") is lmms.Vtr
    assert get_model("vtr", force_simple=True) is lmms.SimpleVtr


@pytest.fixture(scope="module")
def embedded():
    return load_model("tiny-llava", device="cpu")


def refuse(*_arguments):
    raise AssertionError("reached for the network")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "fastv" else pytest.mark.slow) for name in METHODS])
def test_the_score_per_sample_is_that_of_vtr_eval_and_no_network_is_needed(lmms, embedded, name, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    method = create_method(name, **METHODS[name]) if name != "full" else None
    cell = Cell(method, get_task("shapes"), limit=1)
    ours = {sample["id"]: sample for sample in Runner(*embedded, {"name": "m"}, "sdpa", "cpu", batch_size=5).answer(cell)}

    model = lmms.Vtr("tiny-llava", method=name, device="cpu", batch_size=3, **METHODS[name])
    manager = TaskManager(include_path=str(ROOT / "eval" / "tasks"), include_defaults=False)
    found = simple_evaluate(model=model, tasks=["shapes"], limit=1, task_manager=manager, bootstrap_iters=0)

    theirs = {sample["doc"]["id"]: sample for samples in found["samples"].values() for sample in samples}
    assert theirs.keys() == ours.keys()
    for sample_id, sample in ours.items():
        assert theirs[sample_id]["filtered_resps"] == [sample["prediction"]], sample_id
        assert theirs[sample_id]["exact_match"] == float(sample["correct"]), sample_id
        assert theirs[sample_id]["token_counts"][0]["retained_tokens"] == sum(sample["retained"]), sample_id
        assert theirs[sample_id]["token_counts"][0]["average_tokens"] == pytest.approx(sample["average_tokens"])
    summary = summarise(list(ours.values()), shapes.FAMILIES, embedded[0].config)
    assert found["groups"]["shapes"]["exact_match,none"] == pytest.approx(summary["macro"]["value"])


def test_every_family_is_a_task_and_a_member_of_the_group(lmms):
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(ROOT / "eval" / "tasks"), include_defaults=False)
    (group, members), *others = manager.load_task_or_group("shapes", task_type="chat").items()
    assert not others
    assert group.group_name == "shapes"
    assert set(members) == {f"shapes_{family}" for family in shapes.FAMILIES}
    assert [members[f"shapes_{family}"].samples.keys() for family in shapes.FAMILIES] == [
        {sample.id: 0 for sample in shapes.test_samples(family)}.keys() for family in shapes.FAMILIES
    ]
    with pytest.raises(ValueError, match="mine: dataset_name must be one of existence, .*, got 'texts'"):
        type(members["shapes_text"])({"task": "mine", "dataset_path": "shapes", "dataset_name": "texts"})


@pytest.mark.slow
def test_the_choice_that_lmms_eval_picks_is_the_likeliest(lmms, embedded):
    from datasets import Dataset, DatasetDict
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.evaluator import simple_evaluate

    samples = {s.id: s for s in shapes.test_samples("existence", limit=4)}
    choices = ["yes", "no", "purple"]

    class Choices(ConfigurableTask):
        def download(self, dataset_kwargs=None):
            rows = [{"id": s.id, "question": s.question, "answer": s.answer} for s in samples.values()]
            self.dataset = self.dataset_no_image = DatasetDict({"test": Dataset.from_list(rows)})

    task = Choices(
        config={
            "task": "choices",
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_visual": lambda document: [samples[document["id"]].image],
            "doc_to_text": "question",
            "doc_to_target": "answer",
            "doc_to_choice": choices,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    model = lmms.SimpleVtr("tiny-llava", method="fastv", keep=64, device="cpu", batch_size=5)
    logged = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)["samples"]["choices"]
    cell = Cell(create_method("fastv", keep=64), get_task("shapes"), limit=4)
    answers = {s["id"]: s for s in Runner(*embedded, {"name": "m"}, "sdpa", "cpu").answer(cell) if s["family"] == "existence"}
    compared = 0
    for entry in logged:
        answer = answers[entry["doc"]["id"]]
        assert [counts["average_tokens"] for counts in entry["token_counts"]] == [answer["average_tokens"]] * 3
        if answer["prediction"] in choices:  # one token each in this tokenizer
            compared += 1
            losses, greedy = zip(*entry["filtered_resps"], strict=True)
            assert list(greedy) == [answer["prediction"] == choice for choice in choices]
            assert losses[choices.index(answer["prediction"])] == min(losses)
            assert entry["acc"] == float(answer["correct"])
    assert compared


def run(folder, processes, *launcher):
    """The documented command on eight questions of two families; answers by sample."""
    arguments = "pretrained=tiny-llava,method=random,keep=64,seed=3,device=cpu"
    options = "--include_path eval/tasks --tasks shapes_attribute,shapes_text --limit 8 --batch_size 3 --log_samples".split()
    command = [*launcher, "-m", "lmms_eval", "eval", "--model", "vtr", "--model_args", arguments, *options, "--output_path", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "Traceback" not in said, said[-3000:]  # lmms-eval prints an error and exits with 0
    ranks = set(re.findall(r"Running on rank (\d)", said))
    assert len(ranks) == processes, f"ran on ranks {ranks}"
    lines = [json.loads(line) for file in Path(folder).rglob("*_samples_*.jsonl") for line in file.read_text().splitlines()]
    return sorted((line["input"], line["doc_id"], line["filtered_resps"], line["token_counts"][0]["retained_tokens"]) for line in lines)


@pytest.mark.slow
def test_the_command_gives_the_same_with_two_processes(lmms, tmp_path):
    one = run(tmp_path / "one", 1, sys.executable)
    assert len(one) == 16
    two = run(tmp_path / "two", 2, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert two == one
    assert {retained for *_, retained in one} == {64}
