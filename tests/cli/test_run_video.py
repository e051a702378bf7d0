"""`vtr run --video` on checkpoints with random weights: answers, counts, pictures, and what is refused."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.command_line import CliRunner
from tests.embedded import random_checkpoint, random_internvl, random_next_video, random_onevision, random_qwen
from tests.marks import quick_first
from vtr.cli import app

pytestmark = pytest.mark.usefixtures("quick_answers")
SHOWN = {random_qwen: (3, 24), random_next_video: (6, 9), random_onevision: (6, 9)}


@pytest.fixture
def clip(tmp_path):
    """Twelve frames, each with a red bar further to the right."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for index in range(12):
        frame = Image.new("RGB", (96, 64), (40, 40, 40))
        frame.paste("red", (4 * index, 0, 4 * index + 48, 64))
        frame.save(folder / f"{index}.png")
    return folder


def vtr(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def run(clip, *arguments, model=random_next_video, code=0):
    place = ("--out", clip.parent / "pictures", "--model", model())
    return vtr("run", *place, "--question", "what moves?", "--max-new-tokens", 2, "--method", "uniform", *arguments, code=code)


@pytest.mark.parametrize("model", SHOWN, ids=lambda model: model.__name__)
def test_a_folder_of_frames(clip, model):
    views, tokens = SHOWN[model]
    result = json.loads(run(clip, "--video", clip, "--frames", 6, "--keep", 12, "--json", model=model).stdout)
    assert result["visual_tokens"] == [views * tokens] and result["reduced"]["retained"] == [12]
    assert result["videos"] == [{"file": str(clip), "frames": [0, 2, 4, 6, 8, 11], "of": 12, "fps": None}]
    (entry,) = result["report"]["images"]
    assert (entry["kind"], entry["frames"], sum(entry["per_frame"])) == ("video", views, 12)
    (picture,) = result["pictures"]
    assert picture.endswith("clip-0-uniform-12.png")
    shown = np.asarray(Image.open(picture)).astype(int)
    red = (shown[..., 0] > 200) & (shown[..., 1] < 60) & (shown[..., 2] < 60)
    assert red.any() and Image.open(picture).width == 3 * 240 + 2 * 12, "frames in rows of three"


def test_what_is_printed_and_fewer_frames_than_asked_for(clip):
    result = run(clip, "--video", clip, "--keep", 9)
    assert f"video: 12 of 12 frames of {clip}, 0 to 1 tokens left of each" in result.stdout
    assert "has 12 frames, fewer than --frames 16; all are used" in " ".join(result.stderr.split())
    assert "108" in result.stdout, "12 frames of 9 tokens"
    assert "fewer than" not in run(clip, "--video", clip, "--frames", 4, "--keep", 9).stderr


def test_several_videos_and_marks(clip):
    first, *rest = [Image.new("RGB", (48, 48), (20 * index,) * 3) for index in range(9)]
    first.save(clip.parent / "x.gif", save_all=True, append_images=rest, duration=500)
    asked = ("--video", clip, "--video", clip.parent / "x.gif", "--frames", 4, "--keep", 9, "--json")
    result = json.loads(run(clip, *asked).stdout)
    assert result["visual_tokens"] == [36, 36] and result["reduced"]["retained"] == [9, 9]
    assert [one["fps"] for one in result["videos"]] == [None, 2.0]
    assert [path.split("/")[-1] for path in result["pictures"]] == ["clip-0-uniform-9.png", "x-1-uniform-9.png"]
    vtr("run", "--out", clip.parent, "--model", random_next_video(), "--method", "uniform", "--question", "<video> or <video>?", *asked)
    few = ("--video", clip, "--frames", 4, "--keep", 9)
    told = vtr(
        "run",
        "--out",
        clip.parent,
        "--model",
        random_next_video(),
        "--method",
        "uniform",
        "--question",
        "<video> or <video>?",
        *few,
        code=2,
    )
    assert "question: has 2 x <video> but 1 video(s) were given" in " ".join(told.stderr.split())


def refused(clip, message, *arguments, code=2, model=random_next_video):
    told = " ".join(run(clip, *arguments, code=code, model=model).stderr.split())
    assert message in told, told
    assert "Traceback" not in told


def test_images_or_videos_and_not_both(clip):
    still = clip / "0.png"
    refused(clip, "run: give --image or --video, not both, got 1 and 2", "--image", still, "--video", clip, "--video", clip)
    refused(clip, "run: needs --image or --video, got neither; give a file")
    refused(clip, "run: --image does not use --frames; leave it out", "--image", still, "--frames", 4)


@pytest.mark.parametrize(("model", "tokens"), quick_first([(random_internvl, 9), (random_checkpoint, 576)]), ids=["internvl", "llava"])
def test_a_model_without_videos_is_shown_frames_as_one_video(clip, model, tokens):
    asked = ("--video", clip, "--frames", 4, "--keep", 12)
    result = json.loads(run(clip, *asked, "--json", model=model).stdout)
    (entry,) = result["report"]["images"]
    assert (entry["kind"], entry["frames"], sum(entry["per_frame"]), result["visuals"]) == ("video", 4, 12, "prompt")
    assert result["visual_tokens"] == [4 * tokens] and result["reduced"]["retained"] == [12]
    (picture,) = result["pictures"]
    assert picture.endswith("clip-0-uniform-12.png") and Image.open(picture).width == 4 * 240 + 3 * 12, "four frames in a row"
    said = run(clip, *asked, model=model).stdout
    assert f"4 of 12 frames of {clip}, 3 tokens left of each; shown as images that are one video to the method" in said


def test_a_method_for_videos_on_a_model_without_them(clip):
    place = ("--out", clip.parent / "pictures", "--model", random_checkpoint(), "--question", "<video> what moves?", "--max-new-tokens", 2)
    result = json.loads(vtr("run", *place, "--method", "vcast", "--keep", 40, "--video", clip, "--frames", 3, "--json").stdout)
    assert result["reduced"]["retained"] == [40] and result["visual_tokens"] == [3 * 576]


def test_frames_of_a_video_as_images(clip):
    asked = ("--video", clip, "--frames", 2, "--keep", 12, "--visuals", "each")
    result = json.loads(run(clip, *asked, "--json", model=random_checkpoint).stdout)
    assert result["visual_tokens"] == [576, 576] and result["reduced"]["retained"] == [12, 12] and result["visuals"] == "each"
    assert [path.split("/")[-1] for path in result["pictures"]] == ["clip-0-uniform-12.png", "clip-1-uniform-12.png"]
    said = run(clip, *asked, model=random_checkpoint).stdout
    assert "12 tokens left of each; shown as images, each with the whole budget" in said


def test_images_as_the_frames_of_a_video(clip):
    asked = ("--image", clip / "0.png", "--image", clip / "3.png", "--keep", 12, "--visuals", "prompt")
    result = json.loads(run(clip, *asked, "--json", model=random_checkpoint).stdout)
    assert result["visual_tokens"] == [2 * 576] and result["reduced"]["retained"] == [12] and result["visuals"] == "prompt"


def test_what_cannot_be_one_video(clip):
    twice = ("--video", clip, "--video", clip, "--frames", 2, "--keep", 9)
    message = "video: visuals='prompt' makes one video of all images of a prompt on 'llava', got 2 video(s) and 0 image(s); ask with visuals='each'"
    refused(clip, message, *twice, code=1, model=random_checkpoint)
    assert json.loads(run(clip, *twice, "--visuals", "each", "--json", model=random_checkpoint).stdout)["visual_tokens"] == [576] * 4
    refused(clip, "--visuals must be 'each' or 'prompt', got 'all'", *twice, "--visuals", "all", code=2)
    refused(clip, "'llava_next_video' takes videos, got visuals='prompt'", *twice, "--visuals", "prompt", code=1)
    asked = ("--video", clip, "--frames", 2, "--keep", 9, "--question", "<video> or <video>?")
    refused(clip, "question: has 2 x <video> but 1 video(s) were given", *asked, model=random_checkpoint)


def test_wrong_videos(clip, monkeypatch):
    refused(clip, f"video: no file or folder '{clip}.mp4'; check the path", "--video", f"{clip}.mp4")
    (clip.parent / "none").mkdir()
    refused(clip, "has no pictures", "--video", clip.parent / "none")
    (clip.parent / "x.mp4").write_text("no video")
    pytest.importorskip("av", reason="PyAV is not installed: pip install 'visual-token-reduction[video]'")
    refused(clip, "x.mp4' cannot be decoded", "--video", clip.parent / "x.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    refused(clip, "x.mp4' needs PyAV, which is not installed; pip install", "--video", clip.parent / "x.mp4", code=1)


def test_budgets_and_pixels_of_videos(clip):
    few = ("--video", clip, "--frames", 6)
    refused(clip, "uniform: keep must be from 1 to the video's visual tokens, got 100; video 0 has 54 visual tokens", *few, "--keep", 100)
    refused(clip, "max_pixels: the processor of 'llava_next_video' has no such limit", *few, "--max-pixels", 999)
    limited = json.loads(run(clip, *few, "--max-pixels", 8 * 256, "--keep", 4, "--json", model=random_qwen).stdout)
    assert limited["visual_tokens"] == [3 * 6] and limited["max_pixels"] == 8 * 256


def scored(clip, *arguments, model=random_next_video, code=0):
    asked = ("--method", "quota", "--frame-scores", random_checkpoint())
    place = ("--out", clip.parent / "pictures", "--model", model(), "--question", "what moves?", "--max-new-tokens", 2, "--keep", 12)
    return vtr("run", *place, *asked, "--frames", 4, *arguments, code=code)


@pytest.mark.parametrize("model", [random_next_video, random_qwen, random_internvl], ids=lambda model: model.__name__)
def test_frames_are_scored_by_a_second_model(clip, model):
    questions = ("--frame-question", "is there a red circle?", "--frame-question", "is there a red square?")
    result = json.loads(scored(clip, "--video", clip, *questions, "--json", model=model).stdout)
    assert result["reduced"]["retained"] == [12] and result["scorer"] == str(random_checkpoint())
    assert [len(row) for row in result["frame_scores"]] == [4] and all(0 < score < 1 for score in result["frame_scores"][0])
    assert (result["scorer_prompts"], result["scorer_visual_tokens"]) == (8, 8 * 576) and result["scorer_seconds"] > 0


def test_what_scoring_took_is_printed(clip):
    told = " ".join(scored(clip, "--video", clip).stdout.split())
    assert "scores of frames: 0.0" in told and f"by {random_checkpoint()}; 4 prompts of 576 visual tokens," in told


def test_images_that_are_frames_are_scored(clip):
    asked = ("--image", clip / "0.png", "--image", clip / "3.png", "--visuals", "prompt", "--json")
    place = (
        "--out",
        clip.parent / "pictures",
        "--model",
        random_internvl(),
        "--question",
        "what moves?",
        "--max-new-tokens",
        2,
        "--keep",
        9,
    )
    result = json.loads(vtr("run", *place, "--method", "quota", "--frame-scores", random_checkpoint(), *asked).stdout)
    assert [len(row) for row in result["frame_scores"]] == [2] and result["reduced"]["retained"] == [9]


def test_scores_that_nobody_gives_or_reads(clip):
    seen = ("--video", clip, "--frames", 2, "--keep", 9)
    refused(
        clip, "quota: needs to know how much every frame has to do with the question; give --frame-scores MODEL", *seen, "--method", "quota"
    )
    refused(clip, "--frame-scores: uniform reads no scores of frames; leave it out", *seen, "--frame-scores", "tiny-llava")
    told = ("--method", "quota", "--frame-scores", "tiny-lava")
    refused(clip, "--frame-scores: unknown name 'tiny-lava'; did you mean 'tiny-llava'", *seen, *told)
    refused(
        clip, "--frame-question: is asked of the model that scores frames, got 'red?' and none; give", *seen, "--frame-question", "red?"
    )
    still = ("--image", clip / "0.png", "--keep", 9, "--method", "quota", "--frame-scores", "tiny-llava")
    refused(clip, "--frame-scores: images are no frames of a video; leave it out", *still)
