"""From messages, texts and visuals to a prompt with images."""

import numpy as np
import pytest
from PIL import Image

from vtr.data.frames import Video
from vtr.eval.lmms.prompts import Shown, chat_prompt, plain_prompt, read_visual
from vtr.types import VtrError

RED, GREEN = Image.new("RGB", (8, 6), "red"), Image.new("L", (8, 6))


class Template:
    """Stands in for a processor: writes roles and the order of the parts."""

    chat_template = "yes"

    def apply_chat_template(self, messages, add_generation_prompt):
        assert add_generation_prompt
        return " / ".join(f"{m['role']} " + "|".join(part.get("text", part["type"].upper()) for part in m["content"]) for m in messages)


AS_IMAGES = Shown(8)


def image(value):
    return {"type": "image", "url": value}


def text(value):
    return {"type": "text", "text": value}


def frames(count):
    return [Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(count)]


def reds(images):
    return [one.getpixel((0, 0))[0] for one in images]


def test_parts_keep_their_order_over_turns():
    messages = [
        {"role": "system", "content": [text("Be short.")]},
        {"role": "user", "content": [text("Left"), image(RED), text("right"), image(GREEN)]},
    ]
    prompt = chat_prompt(Template(), messages, AS_IMAGES)
    assert prompt.text == "system Be short. / user Left|IMAGE|right|IMAGE"
    assert [one.mode for one in prompt.images] == ["RGB", "RGB"]
    assert prompt.images[0].getpixel((0, 0)) == (255, 0, 0)


def test_marks_in_the_text_say_where_images_go():
    message = {"role": "user", "content": [image(RED), image(GREEN), text("Is <image> left of <image>?")]}
    assert chat_prompt(Template(), [message], AS_IMAGES).text == "user Is|IMAGE|left of|IMAGE|?"
    assert plain_prompt(Template(), "Is <image> red?", [RED], AS_IMAGES).text == "user Is|IMAGE|red?"
    with pytest.raises(ValueError, match=r"question: has 1 x <image> but 2 image"):
        plain_prompt(Template(), "Is <image> red?", [RED, RED], AS_IMAGES)


def test_no_visuals_and_plain_content():
    assert plain_prompt(Template(), "What?", None, AS_IMAGES).text == "user What?"
    assert chat_prompt(Template(), [{"role": "user", "content": "What?"}], AS_IMAGES).images == ()


@pytest.mark.parametrize("video", [frames(9), np.stack([np.asarray(one) for one in frames(9)])], ids=["images", "array"])
def test_frames_become_images_spread_evenly(video):
    prompt = chat_prompt(Template(), [{"role": "user", "content": [{"type": "video", "url": video}, text("What?")]}], Shown(3))
    assert prompt.text == "user IMAGE|IMAGE|IMAGE|What?"
    assert reds(prompt.images) == [0, 4, 8] and not prompt.videos


def test_a_model_with_videos_gets_them_whole():
    whole = Shown(3, whole=True)
    prompt = chat_prompt(Template(), [{"role": "user", "content": [{"type": "video", "url": frames(9)}, image(RED), text("What?")]}], whole)
    assert prompt.text == "user VIDEO|IMAGE|What?"
    assert len(prompt.images) == 1
    (video,) = prompt.videos
    assert reds(video.frames) == [0, 4, 8] and video.indices == (0, 4, 8) and video.total == 9
    marked = plain_prompt(Template(), "Is <video> longer than <video>?", [frames(2), frames(4)], whole)
    assert marked.text == "user Is|VIDEO|longer than|VIDEO|?"
    assert [len(video.frames) for video in marked.videos] == [2, 3]
    with pytest.raises(
        ValueError, match=r"question: has 1 x <video> but 2 video\(s\) were given; give one video for each, or leave <video> out"
    ):
        plain_prompt(Template(), "Is <video> red?", [frames(2), frames(2)], whole)


def test_files_are_opened(tmp_path):
    RED.save(tmp_path / "red.png")
    assert read_visual(str(tmp_path / "red.png"), 8).size == (8, 6)
    assert read_visual({"type": "image", "path": str(tmp_path / "red.png")}, 8).size == (8, 6)
    video = read_visual({"type": "video", "path": str(tmp_path)}, 8)
    assert isinstance(video, Video) and video.frames[0].size == (8, 6)


def test_a_video_file_is_decoded(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "brighter.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for index in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * index, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    seen = reds(read_visual(str(path), 4).frames)
    assert len(seen) == 4
    assert seen[0] < 15 < seen[1] < seen[2] < 175 < seen[3]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio", "url": "a.wav"}, "shows images and whole videos to the model, got audio as str"),
        ({"type": "video", "url": {"path": "a.mp4", "video_start": 1.0}}, "shows images and whole videos to the model, got video as dict"),
        ({"type": "video", "url": "gone.mp4"}, r"video: no file or folder 'gone\.mp4'; check the path"),
        (image(None), "shows images and whole videos to the model, got image as NoneType"),
    ],
)
def test_what_cannot_be_shown_is_refused(part, message):
    with pytest.raises((ValueError, VtrError), match=message):
        chat_prompt(Template(), [{"role": "user", "content": [part]}], AS_IMAGES)
