"""Which cells a sweep has."""

from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from tests.embedded import random_qwen
from tests.eval.sweep.test_reading import GOOD, write
from vtr.eval.run.cells import plan_cells
from vtr.eval.run.forecast import forecast
from vtr.eval.sweep.grid import load_sweep
from vtr.eval.sweep.reading import SweepError
from vtr.eval.tasks import get_task
from vtr.registry import list_methods
from vtr.types import Budget

EVAL = Path(__file__).parents[3] / "eval"
FILES = sorted([*(EVAL / "sweeps").glob("*.yaml"), *(EVAL / "ablations").glob("*.yaml")])


def labels(sweep):
    return [job.cell.label for job in sweep.jobs]


def needs_lmms(path):
    return "lmms:" in path.read_text()


@pytest.mark.parametrize("path", [pytest.param(p, marks=[pytest.mark.slow] * needs_lmms(p), id=p.stem) for p in FILES])
def test_the_files_that_come_with_the_repository(path):
    if needs_lmms(path):
        pytest.importorskip("lmms_eval")
    sweep = load_sweep(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"vtr sweep {path.relative_to(EVAL.parent).as_posix()}" in line for line in header), "the command belongs into the header"
    assert any(f"vtr report {sweep.folder.as_posix()}" in line for line in header)
    assert sweep.file.limit, "runs on a laptop unless somebody asks for more"
    assert len(sweep.jobs) > 10
    assert {"full", "random"} <= {job.cell.name for job in sweep.jobs}
    prints = [(job.setup, job.cell.name, str(job.cell.settings), job.cell.seed, job.cell.task.name) for job in sweep.jobs]
    assert len(set(prints)) == len(prints), "no cell twice"


def test_all_is_every_method_that_fits_and_the_others_are_named(tmp_path):
    sweep = load_sweep(write(tmp_path, GOOD.replace("[full, random, fastv]", "all").replace("settings: {fastv: {layer: [2, 3]}}\n", "")))
    found = {job.cell.name for job in sweep.jobs}
    missing = set(list_methods()) - found
    assert "full" in found and len(found) > 20
    assert all(any(reason.startswith((f"{name} ", f"{name}:")) for reason in sweep.left_out) for name in missing)


def test_prefill_methods_get_the_budget_as_a_mean_over_the_layers(tmp_path):
    text = GOOD.replace("[192, 64]", "[320]").replace("[full, random, fastv]", "[divprune, todre, fastv]")
    text = text.replace("settings: {fastv: {layer: [2, 3]}}", "settings: {todre: {seed: 0}}")
    found = labels(load_sweep(write(tmp_path, text.replace("equalise: keep", "equalise: average_keep"))))
    assert found == ["divprune keep=320", "todre keep=320 seed 0", "fastv average_keep=320.0"]
    for default in (text, text.replace("equalise: keep\n", "")):
        assert labels(load_sweep(write(tmp_path, default))) == ["divprune keep=320", "todre keep=320 seed 0", "fastv keep=320"]


def test_a_sweep_reads_a_budget_as_eval_does(tmp_path):
    text = GOOD.replace("equalise: keep\n", "").replace("settings: {fastv: {layer: [2, 3]}}\n", "")
    swept = [job.cell for job in load_sweep(write(tmp_path, text)).jobs]
    asked = plan_cells(["full", "random", "fastv"], [Budget(keep=192), Budget(keep=64)], [get_task("shapes")], [0, 1], limit=5)
    assert [(cell.method, cell.seed, cell.limit) for cell in swept] == [(cell.method, cell.seed, cell.limit) for cell in asked]


MEAN = """\
models: tiny-llava
methods: random
plans: [[{divprune: {keep: KEEP}}, fastv]]
budgets: {average_keep: [MEAN]}
tasks: shapes
"""


def mean_of(keep, left, layers=6, before=2):
    """Tokens of a layer, on average, where `before` layers see `keep` of them and the others `left`."""
    return (before * keep + (layers - before) * left) / layers


@pytest.mark.parametrize("left", [1, 7, 8, 9])
def test_a_mean_is_never_met_with_fewer_than_eight_tokens_at_the_end(tmp_path, left):
    wanted = round(mean_of(168, left), 2)
    text = MEAN.replace("KEEP", "168").replace("MEAN", str(wanted))
    if left >= 8:
        (plan,) = [job for job in load_sweep(write(tmp_path, text)).jobs if isinstance(job.cell.method, tuple)]
        assert forecast(plan.setup, plan.cell).retained == left
        return
    message = rf"line 3, plans\[0\]: .*average_keep={wanted:g} .*this plan would leave {left} at the end, and goes down to 8, "
    with pytest.raises(SweepError, match=message + rf"an average of {mean_of(168, 8):.1f}; ask for more") as caught:
        load_sweep(write(tmp_path, text))
    assert "equalise" not in str(caught.value), "the budget is an average already"


@pytest.mark.parametrize("left", [7, 8])
def test_the_order_in_which_a_plan_is_written_does_not_matter(tmp_path, left):
    plan = f"plans: [[{{fastv: {{average_keep: {round(mean_of(168, left), 2)}}}}}, {{divprune: {{keep: 168}}}}]]"
    text = MEAN.replace("plans: [[{divprune: {keep: KEEP}}, fastv]]\nbudgets: {average_keep: [MEAN]}", plan)
    if left >= 8:
        assert load_sweep(write(tmp_path, text)).jobs[-1].cell.name == "fastv+divprune"
    else:
        with pytest.raises(SweepError, match=r"plans\[0\]: .*fastv\+divprune.*would leave 7 at the end, and goes down to 8"):
            load_sweep(write(tmp_path, text))


def test_a_keep_that_equalising_would_meet_with_almost_nothing_is_refused(tmp_path):
    text = MEAN.replace("KEEP", "190").replace("average_keep: [MEAN]", "keep: [64]")
    with pytest.raises(
        SweepError,
        match=r"average_keep=64 .*would leave 1 at the end, and goes down to 8, an average of 68\.7; .*; or write `equalise: keep`, which leaves",
    ):
        load_sweep(write(tmp_path, text + "equalise: average_keep\n"))
    plan = load_sweep(write(tmp_path, text)).jobs[-1].cell
    assert (plan.name, plan.settings["keep"]) == ("divprune+fastv", 64)


def test_fewer_than_eight_may_be_asked_for(tmp_path):
    text = MEAN.replace("KEEP", "6").replace("fastv", "cdpruner").replace("MEAN", "4")
    plan = load_sweep(write(tmp_path, text)).jobs[-1]
    assert forecast(plan.setup, plan.cell).retained == 4


def test_a_mean_that_the_largest_image_cannot_meet_is_a_mistake_and_no_crash(tmp_path):
    text = (
        GOOD.replace("tiny-llava", "tiny-llava-next")
        .replace("{keep: [192, 64]}", "{average_keep: 160}")
        .replace("{layer: [2, 3]}", "{layer: 2}")
    )
    with pytest.raises(SweepError, match="fastv average_keep=160.* on tiny-llava-next: average_keep=160 is out of reach for an image of"):
        load_sweep(write(tmp_path, text))


def test_grids_are_products_and_lists_of_grids_are_unions_without_repetition(tmp_path):
    text = GOOD.replace("[full, random, fastv]", "[fastv, uniform]").replace("[192, 64]", "[64]")
    grids = "settings: {all: {position_ids: [keep, renumber]}, fastv: [{layer: [2, 3]}, {layer: 3}]}"
    assert labels(load_sweep(write(tmp_path, text.replace("settings: {fastv: {layer: [2, 3]}}", grids)))) == [
        "fastv keep=64",
        "fastv keep=64 layer=3",
        "fastv keep=64 position_ids=renumber",
        "fastv keep=64 position_ids=renumber layer=3",
        "uniform keep=64",
        "uniform keep=64 position_ids=renumber",
    ]


def test_a_plan_ends_at_the_budget_and_takes_the_seeds(tmp_path):
    text = GOOD.replace("[full, random, fastv]", "[fastv]").replace("limit: 5", "plans: [[{random: {keep: 256}}, {fastv: {layer: 3}}]]")
    plans = [job.cell for job in load_sweep(write(tmp_path, text)).jobs if isinstance(job.cell.method, tuple)]
    assert [(cell.name, cell.settings["keep"], cell.seed) for cell in plans] == [
        ("random+fastv", 192, 0),
        ("random+fastv", 192, 1),
        ("random+fastv", 64, 0),
        ("random+fastv", 64, 1),
    ]
    assert [entry["method"] for entry in plans[0].settings["plan"]] == ["random", "fastv"]
    assert plans[0].settings["plan"][1]["layer"] == 3


def test_a_model_may_have_its_own_budgets_and_dtype(tmp_path):
    text = GOOD.replace("models: tiny-llava", "models: [tiny-llava, {model: tiny-llava-next, budgets: {keep: 640}, dtype: float16}]")
    jobs = load_sweep(write(tmp_path, text)).jobs
    assert {(job.setup.model, job.setup.dtype, job.cell.settings.get("keep")) for job in jobs if job.cell.methods} == {
        ("tiny-llava", "auto", 192),
        ("tiny-llava", "auto", 64),
        ("tiny-llava-next", "float16", 640),
    }


def test_a_model_may_stand_several_times_with_other_limits_of_pixels(tmp_path):
    folder = random_qwen()
    text = GOOD.replace("models: tiny-llava", f"max_pixels: 4096\nmodels: [{folder}, {{model: {folder}, max_pixels: 2304}}]").replace(
        "[192, 64]", "[5]"
    )
    jobs = load_sweep(write(tmp_path, text)).jobs
    assert {job.setup.pixels.max_pixels for job in jobs} == {4096, 2304}
    with pytest.raises(SweepError, match="max_pixels: the processor of 'llava' has no such limit, got 4096; leave it out"):
        load_sweep(write(tmp_path, "max_pixels: 4096\n" + GOOD))


def test_a_model_may_have_methods_of_its_own(tmp_path):
    text = GOOD.replace("models: tiny-llava", "models: [tiny-llava, {model: tiny-llava, methods: [full], limit: 2}]")
    jobs = load_sweep(write(tmp_path, text)).jobs
    assert {job.cell.name for job in jobs if job.cell.limit == 2} == {"full"}
    with pytest.raises(SweepError, match=r"models\[0\]\.methods\[1\]: full is given twice"):
        load_sweep(write(tmp_path, GOOD.replace("models: tiny-llava", "models: [{model: tiny-llava, methods: [full, full]}]")))
    with pytest.raises(SweepError, match=r"models\[0\].methods.*unknown method 'fast-v'"):
        load_sweep(write(tmp_path, GOOD.replace("models: tiny-llava", "models: [{model: tiny-llava, methods: [fast-v]}]")))


def test_a_model_without_videos_gets_methods_for_them_on_tasks_with_videos_only(tmp_path):
    text = "models: [tiny-llava]\ntasks: [shapes, shapes-video]\nmethods: all\nbudgets: {keep: 64}\nlimit: 1\n"
    sweep = load_sweep(write(tmp_path, text))
    pairs = {(job.cell.name, job.cell.task.name) for job in sweep.jobs}
    assert ("vcast", "shapes-video") in pairs and ("vcast", "shapes") not in pairs
    assert {("divprune", "shapes"), ("divprune", "shapes-video")} <= pairs
    assert any(text.startswith("vcast keep=64 on tiny-llava with images: acts on the frames of videos") for text in sweep.left_out)
    alone = load_sweep(write(tmp_path, text.replace("all", "[full, divprune]") + "visuals: each\n"))
    assert {job.setup.visuals for job in alone.jobs} == {"each"}
    with pytest.raises(SweepError, match="visuals: must be 'each' or 'prompt', got 'all'"):
        load_sweep(write(tmp_path, text + "visuals: all\n"))


SCORED = "models: [tiny-llava-video]\ntasks: [shapes-video]\nmethods: [full, quota]\nbudgets: {keep: 64}\nlimit: 1\n"


def test_a_sweep_says_who_scores_frames(tmp_path):
    jobs = load_sweep(write(tmp_path, SCORED + "frame_scores: tiny-llava\n")).jobs
    assert [job.cell.name for job in jobs] == ["full", "quota"] and {job.setup.frame_scores for job in jobs} == {"tiny-llava"}
    own = SCORED.replace("[tiny-llava-video]", "[{model: tiny-llava-video, frame_scores: tiny-llava-next}, tiny-llava-video]")
    scorers = {job.setup.frame_scores for job in load_sweep(write(tmp_path, own + "frame_scores: tiny-llava\n")).jobs}
    assert scorers == {"tiny-llava-next", "tiny-llava"}
    every = load_sweep(write(tmp_path, SCORED.replace("[full, quota]", "all")))
    assert any(text.startswith("quota keep=64 on tiny-llava-video: needs the relevance of every frame") for text in every.left_out)
    every = load_sweep(write(tmp_path, SCORED.replace("[full, quota]", "all") + "frame_scores: tiny-llava\n"))
    assert "quota" in {job.cell.name for job in every.jobs}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("quota keep=64 on tiny-llava-video: needs the relevance of every frame, got none; give frame_scores=", SCORED),
        ("frame_scores: no method of this sweep reads scores of frames", SCORED.replace("quota", "fastv") + "frame_scores: tiny-llava\n"),
        (
            r"models\[0\]\.frame_scores: no method of this sweep reads scores",
            SCORED.replace("[tiny-llava-video]", "[{model: tiny-llava-video, methods: full, frame_scores: tiny-llava}, tiny-llava-video]")
            + "frame_scores: tiny-llava-next\n",
        ),
        (
            "frame_scores: no method of this sweep reads scores of frames",
            SCORED.replace("[tiny-llava-video]", "[{model: tiny-llava-video, frame_scores: tiny-llava}]")
            + "frame_scores: tiny-llava-next\n",
        ),
        ("frame_scores: model: unknown name 'tiny-lava'; did you mean 'tiny-llava'", SCORED + "frame_scores: tiny-lava\n"),
    ],
)
def test_scores_of_frames_that_nobody_gives_or_reads(message, text, tmp_path):
    with pytest.raises(SweepError, match=message):
        load_sweep(write(tmp_path, text))
