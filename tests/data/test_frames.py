"""Frames of folders, animations and video files: the right ones, upright, and errors that say what to do."""

import logging
import struct
import sys
import wave

import numpy as np
import pytest
from PIL import Image

from vtr.data import frames
from vtr.data.frames import UNKNOWN_FPS, evenly, read_video, video_of
from vtr.types import VtrError

TOTAL = 20


def grays(video):
    return [int(np.asarray(frame).mean().round()) for frame in video.frames]


def gray(level, size=(24, 16)):
    return Image.new("RGB", size, (level,) * 3)


@pytest.fixture
def folder(tmp_path):
    """Frames 0 to 11, whose names sort differently as text."""
    place = tmp_path / "clip"
    place.mkdir()
    for index in range(12):
        gray(20 * index).save(place / f"frame{index}.png")
    (place / "notes.txt").write_text("no frame")
    (place / ".frame.png").write_bytes(b"no frame either")
    return place


@pytest.fixture
def encoded(tmp_path):
    """Writes a video of frames that get brighter by 10."""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'visual-token-reduction[video]'")

    def write(name="clip.mp4", codec="libx264", total=TOTAL, key_every=5):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, "yuv420p", key_every
            for index in range(total):
                container.mux(stream.encode(av.VideoFrame.from_image(gray(10 * index, (48, 32)))))
            container.mux(stream.encode())
        return tmp_path / name

    return write


def test_frames_are_spread_from_the_first_to_the_last():
    assert evenly(9, 3) == [0, 4, 8]
    assert evenly(20, 4) == [0, 6, 12, 19]
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(7, 1) == [0]
    for total in (5, 31, 300, 9001):
        for count in (2, 8, 31, 64):
            if count < total:
                assert evenly(total, count) == np.linspace(0, total - 1, count).round(9).astype(int).tolist()


def test_a_folder_is_sorted_as_people_count(folder):
    video = read_video(folder, 4)
    assert video.indices == (0, 3, 7, 11) and video.total == 12
    assert grays(video) == [0, 60, 140, 220]
    assert video.fps is None and video.metadata["fps"] == UNKNOWN_FPS and video.metadata["duration"] == 6
    assert video.metadata["frames_indices"] == [0, 3, 7, 11] and video.metadata["total_num_frames"] == 12


def test_of_a_folder_only_what_is_needed_is_opened(folder):
    (folder / "frame5.png").write_bytes(b"broken")
    assert grays(read_video(folder, 4)) == [0, 60, 140, 220]
    with pytest.raises(
        ValueError, match=r"video: folder .*frame5\.png.* is not an image that Pillow can read; replace or remove that file"
    ):
        read_video(folder, 12)


def test_pictures_of_a_folder_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    gray(9).save(tmp_path / "a.jpg", exif=exif)
    assert read_video(tmp_path, 1).frames[0].size == (16, 24)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animations(tmp_path, kind):
    first, *rest = [gray(40 * index) for index in range(6)]
    lossless = {"lossless": True} if kind == "webp" else {}
    first.save(tmp_path / f"x.{kind}", save_all=True, append_images=rest, duration=100, **lossless)
    video = read_video(tmp_path / f"x.{kind}", 3)
    assert (video.indices, video.total, video.fps) == ((0, 2, 5), 6, pytest.approx(10))
    assert grays(video) == [0, 80, 200]


def test_a_still_picture_is_a_video_of_one_frame(tmp_path, heard, monkeypatch):
    gray(7).save(tmp_path / "x.png")
    monkeypatch.setattr(logging.getLogger("vtr.data.frames"), "level", logging.INFO)
    video = read_video(tmp_path / "x.png", 8)
    assert (video.indices, video.total, grays(video)) == ((0,), 1, [7])
    (said,) = heard
    assert "x.png' has 1 frames, fewer than the 8 asked for; all are used" in said.getMessage()
    read_video(tmp_path / "x.png", 1)
    assert heard == [said]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "mpeg4"),
        ("jumps-inexactly.ts", "libx264"),
        ("no-times.h264", "libx264"),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 7, TOTAL, TOTAL + 1])
def test_video_files(encoded, name, codec, count):
    video = read_video(encoded(name, codec), count)
    assert video.total == TOTAL and list(video.indices) == evenly(TOTAL, count)
    assert np.abs(np.subtract(grays(video), [10 * index for index in video.indices])).max() <= 4
    assert video.fps == pytest.approx(25 if name.startswith("no-times") else 10)


def test_only_what_is_needed_is_decoded(encoded, monkeypatch):
    path, made = encoded(total=25, key_every=5), []
    monkeypatch.setattr(frames, "_decoded", lambda *_: pytest.fail("all frames are decoded"))
    monkeypatch.setattr(frames, "_upright", lambda frame, upright=frames._upright: made.append(frame.pts) or upright(frame))
    assert read_video(path, 3).indices == (0, 12, 24)
    assert len(made) == 3


def test_a_video_of_one_frame(encoded):
    video = read_video(encoded(total=1), 1)
    assert (video.indices, video.total) == ((0,), 1)
    assert video.metadata["duration"] > 0


def test_the_display_matrix_turns_frames(encoded):
    path = encoded()
    content = path.read_bytes()
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)  # a quarter clockwise, as phones write it
    header = content.index(b"tkhd")
    assert content.index(upright, header) < header + 100
    path.write_bytes(content[:header] + content[header:].replace(upright, turned, 1))
    assert read_video(path, 2).frames[0].size == (32, 48)


def test_a_quarter_clockwise_is_turned_clockwise():
    class Frame:
        rotation = -90  # counterclockwise, as PyAV tells it

        def to_image(self):
            picture = gray(0, (4, 2))
            picture.putpixel((0, 0), (255, 0, 0))
            return picture

    shown = frames._upright(Frame())
    assert shown.size == (2, 4) and shown.getpixel((1, 0)) == (255, 0, 0)


def test_pictures_in_memory():
    video = video_of([gray(level) for level in range(9)], 3, fps=4)
    assert (grays(video), video.indices, video.total, video.metadata["duration"]) == ([0, 4, 8], (0, 4, 8), 9, 9 / 4)
    assert len(video_of([gray(0)] * 5).frames) == 5
    with pytest.raises(ValueError, match="video: must have at least one frame, got none; give some"):
        video_of([])
    with pytest.raises(ValueError, match=r"video: frames must have one size, got 24 x 16 and 16 x 24 \(number 1\) in given frames; resize"):
        video_of([gray(0), gray(0, (16, 24))])


def test_frames_of_a_folder_must_have_one_size(folder):
    gray(1, (8, 8)).save(folder / "frame11.png")
    with pytest.raises(ValueError, match=r"video: frames must have one size, got 24 x 16 and 8 x 8 \(number 11\) in folder"):
        read_video(folder, 2)


def test_wrong_input(tmp_path, folder):
    with pytest.raises(ValueError, match=r"video: no file or folder '.*gone\.mp4'; check the path"):
        read_video(tmp_path / "gone.mp4", 2)
    with pytest.raises(ValueError, match="video: frames must be at least 1, got 0; ask for one or more"):
        read_video(folder, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"video: folder '.*empty' has no pictures .*, got none; give a folder of frames"):
        read_video(tmp_path / "empty", 2)
    (tmp_path / "text.gif").write_text("hello")
    with pytest.raises(ValueError, match="is not a picture or animation that Pillow can read; give another file"):
        read_video(tmp_path / "text.gif", 2)
    noise = [Image.effect_noise((64, 64), 90) for _ in range(4)]
    noise[0].save(tmp_path / "cut.gif", save_all=True, append_images=noise[1:])
    (tmp_path / "cut.gif").write_bytes((tmp_path / "cut.gif").read_bytes()[:-4000])
    with pytest.raises(ValueError, match=r"cut\.gif' is damaged or cannot be shown"):
        read_video(tmp_path / "cut.gif", 4)


def test_wrong_video_files(tmp_path, encoded):
    path = encoded()
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.mp4' cannot be decoded \(Invalid data .*\); give another file"):
        read_video(tmp_path / "text.mp4", 2)
    content = path.read_bytes()
    moved = content.index(b"mdat") - 4
    size = int.from_bytes(content[moved : moved + 4], "big")
    (tmp_path / "cut.mp4").write_bytes(content[: moved + size - 200] + content[moved + size :])
    with pytest.raises(ValueError, match=r"cut\.mp4'"):
        read_video(tmp_path / "cut.mp4", 2)
    with wave.open(str(tmp_path / "tone.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    with pytest.raises(ValueError, match=r"tone\.wav' has no video stream, got audio; give another file"):
        read_video(tmp_path / "tone.wav", 2)


def test_without_pyav(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "x.mp4").write_text("anything")
    with pytest.raises(VtrError, match=r"x\.mp4' needs PyAV, which is not installed; pip install '.*\[video\]', or give a folder"):
        read_video(tmp_path / "x.mp4", 2)
    assert len(read_video(folder, 2).frames) == 2
