"""Questions about videos: what the processor is told, what is counted and recorded, and what is forecast."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from tests.clips import FRAMES, Clip, clips_task, noise
from tests.embedded import random_checkpoint, random_internvl, random_next_video, random_onevision, random_qwen, shared_model
from vtr.data.frames import video_of
from vtr.eval.run.asking import build_prompt, encode, placeholders, seen_of, visuals_of
from vtr.eval.run.cells import Cell
from vtr.eval.run.compare import compare
from vtr.eval.run.forecast import forecast, misfits
from vtr.eval.run.runner import Runner
from vtr.eval.run.setup import Setup
from vtr.eval.run.workers import describe
from vtr.eval.tasks import get_task
from vtr.hosts._protocol import host_of
from vtr.models.pixels import PixelLimits
from vtr.registry import create_method, method_class
from vtr.types import VtrError

TOKENS = {"qwen": 3 * 24, "next-video": FRAMES * 9, "onevision": FRAMES * 9}  # Qwen-VL joins two frames of 96 x 64
NEWLINES = {"qwen": 0, "next-video": 0, "onevision": 1}
FOLDERS = {"qwen": random_qwen, "next-video": random_next_video, "onevision": random_onevision}


CLIPS = clips_task()


@pytest.fixture(scope="module", params=list(FOLDERS))
def loaded(request):
    return request.param, *shared_model(str(FOLDERS[request.param]()))


def test_videos_come_first_or_where_they_are_marked():
    template = SimpleNamespace(
        chat_template="yes", apply_chat_template=lambda turns, **_: "|".join(part.get("text", part["type"]) for part in turns[0]["content"])
    )
    assert build_prompt(template, "What?", 0, 2) == "video|video|What?"
    assert build_prompt(template, "What?", 1, 1) == "image|video|What?"
    assert build_prompt(template, "Is <video> longer than <video>?", 0, 2) == "Is|video|longer than|video|?"
    assert build_prompt(template, "Is <image> in <video>?", 1, 1) == "Is|image|in|video|?"
    assert build_prompt(template, "Is <image> in it?", 1, 1) == "video|Is|image|in it?"
    with pytest.raises(
        ValueError, match=r"question: has 1 x <video> but 0 video\(s\) were given; give one video for each, or leave <video> out"
    ):
        build_prompt(template, "<video>?", 1, 0)


def test_the_processor_neither_samples_again_nor_guesses_times(loaded, monkeypatch):
    _, _, processor = loaded
    given = {}
    monkeypatch.setattr(type(processor), "__call__", lambda self, **arguments: given.update(arguments))
    video = video_of(noise(12), 4, fps=8)
    encode(processor, ["what?"], [[]], [[video]])
    assert given["do_sample_frames"] is False and given["videos"] == [list(video.frames)] and given["images"] is None
    (metadata,) = given["video_metadata"]
    assert (metadata["frames_indices"], metadata["total_num_frames"], metadata["fps"]) == ([0, 3, 7, 11], 12, 8)
    given.clear()
    encode(processor, ["what?"], [[noise(1)[0]]])
    assert not {"videos", "do_sample_frames", "video_metadata"} & set(given)


def test_seconds_of_qwen_are_those_of_the_video():
    _, processor = shared_model(str(random_qwen()))
    inputs = encode(processor, ["what?", "what?"], [[], []], [[video_of(noise(8), 4, fps=1)], [video_of(noise(4), fps=2)]])
    assert inputs["second_per_grid_ts"].tolist() == [4, 1], "two frames of one in two seconds; two of two in one"
    assert inputs["video_grid_thw"][:, 0].tolist() == [2, 2]


def test_placeholders_of_both_kinds_are_counted(loaded):
    name, model, processor = loaded
    inputs = encode(processor, ["what?", "what?"], [[], noise(1)], [[video_of(noise())], [video_of(noise())]])
    video, image = TOKENS[name] + NEWLINES[name], placeholders(model, encode(processor, ["?"], [noise(1)]))[0]
    assert placeholders(model, inputs) == [video, video + image]
    kinds = [layout.kind for layout in visuals_of(host_of(model), inputs)]
    assert kinds == ["image", "video", "video"]


def test_a_template_that_leaves_videos_out_is_refused():
    _, processor = shared_model(str(random_internvl()))
    with pytest.raises(
        VtrError, match=r"processor: its chat template has places for 0 video\(s\) in this prompt, got 1; give frames as images"
    ):
        encode(processor, ["what?"], [[]], [[video_of(noise())]])


def test_what_a_sample_shows():
    picture, video = noise(1)[0], video_of(noise(3))
    images, videos = seen_of(Clip("0"), whole=True)
    assert images == [] and [len(one.frames) for one in videos] == [FRAMES]
    images, videos = seen_of(Clip("0"), whole=False)
    assert len(images) == FRAMES and videos == []
    assert seen_of(SimpleNamespace(image=picture), whole=True) == ([picture], [])
    assert seen_of(SimpleNamespace(image=picture, images=[picture, picture]), whole=True) == ([picture] * 2, [])
    mixed = SimpleNamespace(visuals=[picture, video], image=picture)
    assert seen_of(mixed, whole=True) == ([picture], [video])
    assert seen_of(mixed, whole=False) == ([picture, *video.frames], [])


def runner(model, processor, **settings):
    return Runner(model, processor, {"name": "m", "sha256": "0"}, "sdpa", "cpu", **{"batch_size": 2, **settings})


@pytest.mark.parametrize("share", [False, True])
def test_rows_count_what_a_video_came_to(loaded, share):
    name, model, processor = loaded
    asked = runner(model, processor, share_tower=share)
    for method, left in (
        (None, TOKENS[name]),
        (create_method("divprune", keep=12), 12),
        (create_method("uniform", keep_ratio=1 / 3), TOKENS[name] // 3),
    ):
        rows = asked.answer(Cell(method, CLIPS))
        assert len(rows) == 3
        for row in rows:
            assert (row["frames"], row["visual_tokens"], row["retained"]) == (FRAMES, [TOKENS[name]], [left])
            assert row["average_tokens"] == left and row["newlines"][0] == NEWLINES[name]


def test_batches_change_no_answer(loaded):
    _, model, processor = loaded
    cell = Cell(
        create_method("divprune", keep=12),
        replace(CLIPS, samples=lambda limit: [Clip(str(i), 2 + 2 * i) for i in range(3)]),
        max_new_tokens=3,
    )
    several, single = (runner(model, processor, batch_size=size).answer(cell) for size in (3, 1))
    assert [row["prediction"] for row in several] == [row["prediction"] for row in single]
    assert [row["frames"] for row in several] == [2, 4, 6]
    assert [row["retained"] for row in several] == [row["retained"] for row in single]


def test_videos_of_different_lengths_in_one_prompt(loaded):
    name, _, processor = loaded
    asked = (processor, ["which?"], [[]], [[video_of(noise(2)), video_of(noise(4))]])
    if name == "qwen":
        assert encode(*asked)["video_grid_thw"][:, 0].tolist() == [1, 2]
    else:
        with pytest.raises(
            VtrError, match="processor: takes videos of one number of frames at a time, got 2 and 4; show 2 frames of each, or ask"
        ):
            encode(*asked)


def test_a_model_without_videos_is_shown_frames_as_images():
    asked = runner(*shared_model(str(random_checkpoint())), visuals="each")
    (row,) = asked.answer(Cell(create_method("divprune", keep=12), CLIPS, limit=1))
    assert (row["frames"], row["visual_tokens"], row["retained"]) == (FRAMES, [576] * FRAMES, [12] * FRAMES)
    (row,) = asked.answer(Cell(None, CLIPS, limit=1))
    assert row["visual_tokens"] == [576] * FRAMES


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("folder", "tokens"), [(random_checkpoint, 576), (random_internvl, 9)], ids=["llava", "internvl"])
def test_unless_told_its_frames_are_one_video(folder, tokens, share):
    asked = runner(*shared_model(str(folder())), share_tower=share)
    for method, left in ((None, FRAMES * tokens), (create_method("vcast", keep=12), 12), (create_method("divprune", keep=7), 7)):
        rows = asked.answer(Cell(method, CLIPS, limit=2))
        assert len(rows) == 2
        for row in rows:
            assert (row["frames"], row["visual_tokens"], row["retained"]) == (FRAMES, [FRAMES * tokens], [left])


def test_a_setting_of_frames_is_part_of_the_experiment():
    model, processor = shared_model(str(random_checkpoint()))
    video, still = Cell(create_method("divprune", keep=12), CLIPS), Cell(create_method("divprune", keep=12), replace(CLIPS, frames=None))
    for visuals, noted in ((None, "prompt"), ("prompt", "prompt"), ("each", "each")):
        asked = runner(model, processor, visuals=visuals)
        assert asked.fingerprint(video)["visuals"] == noted and "visuals" not in asked.fingerprint(still)
        around = describe(Setup(str(random_checkpoint()), device="cpu", visuals=visuals))
        assert around.fingerprint(video)["visuals"] == noted and "visuals" not in around.fingerprint(still)
    assert "visuals" not in runner(*shared_model(folder("next-video"))).fingerprint(video)


def test_a_forecast_of_frames_that_are_one_video():
    for folder in (random_checkpoint, random_internvl):
        for method in (None, create_method("vcast", keep=12), create_method("fastv", keep=8)):
            made = forecast(Setup(str(folder())), Cell(method, CLIPS))
            (row,) = runner(*shared_model(str(folder()))).answer(Cell(method, CLIPS, limit=1))
            assert [made.retained] == row["retained"] and made.average == pytest.approx(row["average_tokens"])
    alone, video = (forecast(Setup("internvl3-1b", visuals=visuals), Cell(None, REMOTE)) for visuals in ("each", None))
    assert (alone.retained, video.retained) == (FRAMES * 3328, FRAMES * 256), "thirteen tiles, or one"


def test_a_model_of_several_views_is_shown_frames_as_images():
    setup = Setup(str(random_checkpoint(next_=True)))
    asked = runner(*shared_model(setup.model))
    assert asked.fingerprint(Cell(None, CLIPS))["visuals"] == "each"
    ((_, error),) = misfits(setup, [Cell(create_method("vcast", keep=12), CLIPS)])
    assert "acts on the frames of videos, but 'llava_next' takes images only; let the images of a prompt be frames" in str(error)


def test_what_cannot_be_one_video():
    picture, video = noise(1)[0], video_of(noise(3))
    task = replace(
        CLIPS, samples=lambda limit: [SimpleNamespace(id="0", family="moves", question="?", answer="", visuals=[picture, video])]
    )
    with pytest.raises(
        VtrError, match=r"makes one video of all images of a prompt on 'llava', got 1 video\(s\) and 1 image\(s\); ask with"
    ):
        runner(*shared_model(str(random_checkpoint()))).answer(Cell(None, task))


def test_what_a_method_sees_of_a_video_is_recorded(monkeypatch):
    monkeypatch.setattr(method_class("vispruner"), "frames_unless_told", "each")
    shapes = replace(CLIPS, frames=None)
    method = create_method("divprune", keep=12)
    assert Cell(method, CLIPS).settings["frames"] == "all" and "frames" not in Cell(method, shapes).settings
    assert Cell(create_method("vispruner", keep=12), CLIPS).settings["frames"] == "each"
    asked = create_method("divprune", keep=12, frames="each")
    assert Cell(asked, CLIPS).settings["frames"] == Cell(asked, shapes).settings["frames"] == "each"
    assert Cell(method, CLIPS).label == "divprune keep=12" and Cell(asked, CLIPS).label == "divprune keep=12 frames=each"
    plan = Cell((method, create_method("fastv", keep=4)), CLIPS).settings["plan"]
    assert [member["frames"] for member in plan] == ["all", "all"]


def test_only_a_setting_that_was_changed_stands_in_a_table(loaded):
    from vtr.eval.summary import make_rows

    _, model, processor = loaded
    asked = runner(model, processor)
    methods = [create_method("divprune", keep=12), create_method("divprune", keep=12, frames="each")]
    usual, other = make_rows([asked.measure(Cell(method, CLIPS, limit=1)) for method in methods])
    assert [usual.changed_settings(), other.changed_settings()] in ([{}, {"frames": "each"}], [{"frames": "each"}, {}])


def test_a_comparison_of_a_video(loaded):
    name, model, processor = loaded
    found = compare(model, processor, [], "what moves?", create_method("divprune", keep=12), 3, repeats=1, videos=[video_of(noise())])
    assert found.visual_tokens == [TOKENS[name]] and found.reduced.retained == [12] and found.full.retained == [TOKENS[name]]
    (entry,) = found.report["images"]
    assert entry["kind"] == "video" and sum(entry["per_frame"]) == 12 and len(entry["per_frame"]) == entry["frames"] == len(found.views[0])
    with pytest.raises(
        ValueError, match=f"divprune: keep must be from 1 to the video's visual tokens, got 100; video 0 has {TOKENS[name]} visual"
    ):
        compare(model, processor, [], "what?", create_method("divprune", keep=100), 1, repeats=1, videos=[video_of(noise())])


@pytest.mark.parametrize(("name", "frames"), [("shapes-video", 8), ("shapes-video@16", 16)])
def test_shapes_video_is_asked_about_whole_clips(name, frames):
    task = get_task(name)
    assert (task.name, task.frames, task.families) == (name, frames, ("order", "motion", "events", "needle", "attribute"))
    rows = runner(*shared_model(folder("next-video"))).answer(Cell(create_method("uniform", keep=12), task, limit=1, max_new_tokens=2))
    assert [row["family"] for row in rows] == list(task.families)
    assert {(row["frames"], *row["visual_tokens"], *row["retained"]) for row in rows} == {(frames, 9 * frames, 12)}
    assert task.is_correct("Left.", "left") and not task.is_correct("left", "right")


def folder(name):
    return str(FOLDERS[name]())


REMOTE = replace(CLIPS, name="far:clips", remote=True, samples=lambda limit: pytest.fail("samples are downloaded"))


@pytest.mark.parametrize("name", list(FOLDERS))
def test_a_forecast_is_what_is_then_measured(name):
    for method in (None, create_method("divprune", keep_ratio=0.5), create_method("fastv", keep=8)):
        made = forecast(Setup(folder(name)), Cell(method, CLIPS))
        row = runner(*shared_model(folder(name))).answer(Cell(method, CLIPS, limit=1))[0]
        assert [made.retained] == row["retained"] and made.average == pytest.approx(row["average_tokens"]) and made.of is None


def test_of_videos_that_are_not_here_the_size_is_assumed_only_where_it_matters():
    pooled = forecast(Setup(folder("next-video")), Cell(None, replace(REMOTE, frames=10)))
    assert (pooled.retained, pooled.of) == (90, None)
    packed = forecast(Setup(folder("qwen")), Cell(None, replace(REMOTE, frames=10)))
    assert packed.of == (360, 640) and packed.retained == 5 * 18 and not packed.adaptive


RECIPES = {
    "llava-onevision-7b": (196, False),
    "llava-next-video-7b": (144, False),
    "qwen2.5-vl-7b": (149.5, True),
    "qwen3-vl-8b": (110, True),
}


@pytest.mark.parametrize(("model", "known"), RECIPES.items())
def test_forecasts_of_known_models_follow_from_their_recipes(model, known):
    per_frame, assumed = known
    for frames in (8, 32):
        task = replace(REMOTE, frames=frames)
        full = forecast(Setup(model), Cell(None, task))
        assert (full.retained, full.of) == (per_frame * frames, (360, 640) if assumed else None)
        quarter = forecast(Setup(model), Cell(create_method("uniform", keep_ratio=0.25), task))
        assert quarter.retained == round(per_frame * frames / 4) and quarter.tflops < full.tflops
    assert forecast(Setup(model), Cell(None, replace(REMOTE, frames=31))).retained == per_frame * (32 if assumed else 31)


def test_a_video_may_keep_more_than_an_image_has():
    cell = Cell(create_method("uniform", keep=4000), replace(REMOTE, frames=32))  # of 4608; an image has 2880 at most
    assert not misfits(Setup("llava-next-video-7b"), [cell])
    assert forecast(Setup("llava-next-video-7b"), cell).retained == 4000


def test_limits_of_a_recipe():
    whole = forecast(Setup("qwen3-vl-8b"), Cell(None, replace(REMOTE, frames=256)))
    assert whole.retained == 12288, "all frames share the pixels"
    for most, view in ((100 * 784, 7 * 13), (640 * 360, 12 * 22), (10**7, 13 * 23)):  # as the processor of Qwen2.5-VL makes of 640 x 360
        small = forecast(Setup("qwen2.5-vl-7b", pixels=PixelLimits(max_pixels=most)), Cell(None, REMOTE))
        assert small.retained == 3 * view
    for limits in (PixelLimits(700 * 784), PixelLimits(100 * 784, 150 * 784), PixelLimits(3, 10**7)):
        large = forecast(Setup("qwen2.5-vl-7b", pixels=limits), Cell(None, REMOTE))
        sides = smart_resize(360, 640, 28, limits.min_pixels, limits.max_pixels or 10**7)
        assert large.retained == 3 * sides[0] * sides[1] // 784


def test_frames_as_images_cost_as_much_as_images():
    one, six = (forecast(Setup("llava-1.5-7b", visuals="each"), Cell(None, replace(REMOTE, frames=frames))) for frames in (1, 6))
    assert (one.retained, six.retained) == (576, 6 * 576) and six.tflops > 6 * one.tflops


def test_limits_of_pixels_are_of_frames_or_refused():
    setup = Setup(folder("qwen"), pixels=PixelLimits(max_pixels=8 * 256))
    assert forecast(setup, Cell(None, CLIPS)).retained <= 3 * 8
    model, processor = shared_model(folder("qwen"), pixels=PixelLimits(max_pixels=8 * 256))
    (row,) = runner(model, processor).answer(Cell(None, CLIPS, limit=1))
    assert row["visual_tokens"] == [forecast(setup, Cell(None, CLIPS)).retained]
    ((_, error),) = misfits(Setup("qwen3-vl-8b", pixels=PixelLimits(max_pixels=99999)), [Cell(None, REMOTE)])
    assert "max_pixels: the processor of 'qwen3_vl' limits whole videos and no frames, got 99999; leave it out" in str(error)
    assert not misfits(Setup("qwen3-vl-8b", pixels=PixelLimits(max_pixels=99999)), [Cell(None, replace(REMOTE, frames=None))])
