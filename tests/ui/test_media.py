"""Uploads: pictures, videos as files and as frames, and a sentence for everything else."""

import sys

import numpy as np
import pytest
from PIL import Image

import vtr
from vtr.types.errors import WrongValue
from vtr.ui.media import Limits, open_media


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Good and bad files by what they are."""
    tmp_path = tmp_path_factory.mktemp("files")
    noise = Image.effect_noise((64, 48), 90).convert("RGB")
    made = {
        name: tmp_path / f"{name}.{end}"
        for name, end in (("good", "png"), ("cut", "png"), ("text", "png"), ("notes", "txt"), ("empty", "jpg"))
    }
    noise.save(made["good"])
    made["cut"].write_bytes(made["good"].read_bytes()[:900])
    made["text"].write_text("not a picture")
    made["notes"].write_text("not a picture")
    made["empty"].touch()
    made["huge"] = tmp_path / "huge.png"
    Image.new("1", (9000, 9000)).save(made["huge"])
    made["clip"] = tmp_path / "broken.mp4"
    made["clip"].write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    made["moving"] = tmp_path / "moving.gif"
    frames = [Image.new("L", (32, 24), 20 * n) for n in range(8)]
    frames[0].save(made["moving"], save_all=True, append_images=frames[1:], duration=100)
    return made


@pytest.fixture
def room(tmp_path):
    folder = tmp_path / "room"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "upload: needs a picture or a video, got no file"),
        (["cut"], r"image: 'cut.png' is damaged"),
        (["text"], "image: 'text.png' is not an image that Pillow can read"),
        (["notes"], "image: 'notes.txt' is not an image that Pillow can read"),
        (["empty"], "upload: 'empty.jpg' is empty; choose another file"),
        (["huge"], r"image: 'huge.png' has too many pixels \(9000 x 9000\), at most 40000000; make it smaller first"),
        (["clip"], "video: (reading )?'broken.mp4' "),
        (["good", "moving"], "video: frames must have one size, got 64 x 48 and 32 x 24 .* in folder 'frames'"),
        (["good", "notes"], "several files must be pictures, the frames of a video, got 'notes.txt'"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_bad_files_get_a_sentence_without_folders(files, room, names, said):
    with pytest.raises((WrongValue, vtr.VtrError), match=f"^{said}" if said[0] in "uiv" else said) as caught:
        open_media([files[name] for name in names], room)
    assert str(room.parent) not in str(caught.value)


def test_limits_are_kept(files, room):
    with pytest.raises(WrongValue, match="upload: has 0.0 MiB, at most 0; make it smaller first"):
        open_media([files["good"]], room, limits=Limits(mib=0))
    with pytest.raises(WrongValue, match="a frame of 'moving.gif' has 32 x 24 pixels, at most 700"):
        open_media([files["moving"]], room, limits=Limits(pixels=700))
    with pytest.raises(WrongValue, match="frames must be from 1 to 32, got 33"):
        open_media([files["moving"]], room, 33)
    assert str(Limits()) == "at most 50 MiB, 40 megapixels a picture or frame, 32 frames read of a video"


def test_a_video_file_without_pyav_says_what_to_install(files, room, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(vtr.VtrError, match="reading 'broken.mp4' needs PyAV"):
        open_media([files["clip"]], room)


def test_pictures_and_videos(files, room, tmp_path):
    picture = open_media([files["good"]], room)
    assert (picture.kind, picture.path, picture.described) == ("image", files["good"], "picture good.png: 64 x 48 pixels")
    video = open_media([files["moving"]], room, 4)
    assert (video.kind, len(video.video.frames), video.described) == ("video", 4, "video moving.gif: 4 of 8 frames, 32 x 24 pixels")
    own = []
    for number in (10, 9, 1):  # sorted as people count
        own.append(tmp_path / f"{number}.png")
        Image.new("L", (16, 16), number).save(own[-1])
    frames = open_media(own, room)
    assert frames.path == room / "frames" and [int(np.asarray(one)[0, 0, 0]) for one in frames.video.frames] == [1, 9, 10]
