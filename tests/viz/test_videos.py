"""Pictures of videos: frames in rows, what was retained under each, groups in one colour across time."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.embedded import random_qwen
from vtr.viz import draw, draw_patches, views_from_videos

SIDE, GAP, CAPTION = 100, 12, 22
STEP = (SIDE + GAP, SIDE + CAPTION + GAP)


def entry(frames, **changes):
    """A video of 2 x 2 patches a frame, of which the first of every frame was retained."""
    count = 4 * frames
    own = {"tokens": list(range(count)), "retained": list(range(0, count, 4)), "assignment": None}
    return {"kind": "video", "frames": frames, "views": frames, "patch_grid": [2, 2], "crop_grid": [0, 0], **own, **changes}


def views(frames):
    return np.full((frames, 32, 32, 3), 240, np.uint8)


def patch(picture, number, across):
    frame, cell = divmod(number, 4)
    x, y = frame % across * STEP[0], frame // across * STEP[1]
    return picture.getpixel((x + cell % 2 * 50 + 25, y + cell // 2 * 50 + 15))


@pytest.mark.parametrize(("frames", "across"), [(1, 1), (3, 3), (4, 4), (8, 4), (16, 4), (9, 3), (32, 8), (11, 4)])
def test_frames_stand_in_full_rows(frames, across):
    picture = draw_patches(views(frames), entry(frames), view_px=SIDE)
    rows = -(-frames // across)
    assert picture.size == (across * STEP[0] - GAP, rows * STEP[1] - GAP)
    shown = {number: patch(picture, number, across) for number in range(4 * frames)}
    assert {number for number, color in shown.items() if color == (240, 240, 240)} == set(range(0, 4 * frames, 4))
    assert {color for number, color in shown.items() if number % 4} == {(72, 72, 72)}


def test_frames_are_smaller_than_images_unless_told():
    assert draw_patches(views(1), entry(1)).width == 240
    assert draw_patches(views(1), {**entry(1), "kind": "image"}).width == 480


def test_a_group_has_one_colour_in_all_its_frames():
    assignment = [-1] * 12
    assignment[0], assignment[3] = 0, 3  # pivots of the first frame
    assignment[4], assignment[9] = 0, 0  # in the second and third
    assignment[7] = 3
    picture = draw_patches(views(3), entry(3, retained=[0, 3], assignment=assignment), view_px=SIDE)
    colors = [patch(picture, number, 3) for number in (4, 9, 7)]
    assert colors[0] == colors[1] != colors[2]
    assert patch(picture, 5, 3) == (72, 72, 72)
    gap = np.asarray(picture)[:SIDE, SIDE : SIDE + GAP]
    assert (gap == 255).all(), "no lines between frames"


def caption(picture, frame):
    return np.asarray(picture)[SIDE : SIDE + CAPTION, frame * STEP[0] : frame * STEP[0] + SIDE].astype(int)


def test_what_is_left_stands_under_every_frame():
    whole = entry(2, retained=[0, 1, 2])
    picture = draw_patches(views(2), whole, view_px=SIDE)
    first, second = caption(picture, 0), caption(picture, 1)
    assert (first.min(), np.ptp(first, axis=-1).max()) == (0, 0), "black"
    assert np.ptp(second, axis=-1).max() > 100, "red: nothing is left of this frame"
    merged = draw_patches(views(2), {**whole, "assignment": [0, 1, 2, -1, 0, -1, -1, -1]}, view_px=SIDE)
    assert np.ptp(caption(merged, 1), axis=-1).max() == 0, "something of it went into others"
    assert (caption(picture, 0) != caption(draw_patches(views(2), whole, view_px=SIDE, labels=["0.0 s", "0.5 s"]), 0)).any()


def report(frames, **changes):
    return {"images": [entry(frames, **changes)]}


def pictures(count):
    return [Image.new("RGB", (40, 40), (30 * index, 0, 0)) for index in range(count)]


def reds(picture, count):
    return [patch(picture, 4 * frame, count)[0] for frame in range(count)]


def test_frames_are_drawn_as_they_are_without_a_processor():
    assert reds(draw(pictures(4), report(4), view_px=SIDE), 4) == [0, 30, 60, 90]
    assert reds(draw(pictures(8), report(4), view_px=SIDE), 4) == [0, 60, 120, 180], "pairs of frames"
    assert reds(draw(pictures(7), report(4), view_px=SIDE), 4) == [0, 60, 120, 180]
    assert draw(views(4), report(4), view_px=SIDE).height == SIDE + CAPTION


def test_wrong_frames_are_refused():
    with pytest.raises(
        ValueError, match="the report is of a video of 4 frames, or of pairs, got 5; give the frames that the model was shown"
    ):
        draw(pictures(5), report(4))
    with pytest.raises(TypeError, match="of a video picture must be a list of PIL images, its frames, or an array of pixels, got Image"):
        draw(pictures(1)[0], report(4))
    with pytest.raises(TypeError, match="got 2 things"):
        draw([1, 2], report(4))
    with pytest.raises(ValueError, match="picture must have 8 bits per channel, got mode 'F'"):
        draw([Image.new("F", (4, 4))] * 4, report(4))


def test_packed_frames_are_put_together_again():
    """Frames of Qwen-VL go in pairs; the first of each is shown."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(random_qwen())
    frames = []
    for index in range(6):
        frames.append(Image.new("RGB", (64, 32), (40 * index, 0, 0)))
        frames[-1].paste((0, 0, 255), (48, 0, 64, 32))
    found = draw(frames, report(3, patch_grid=[2, 4], tokens=list(range(24)), retained=list(range(24))), processor=processor, view_px=SIDE)
    colors = [found.getpixel((frame * STEP[0] + x, 10)) for frame in range(3) for x in (10, 90)]
    assert np.abs(np.subtract(colors, [(80 * (n // 2), 0, 0) if n % 2 == 0 else (0, 0, 255) for n in range(6)])).max() <= 2


def test_frames_of_stacked_pixels():
    settings = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 4, 3, 8, 8)).astype(np.float32)
    first, second = views_from_videos({"pixel_values_videos": pixels}, settings, [4, 2], [pictures(4), pictures(2)])
    assert (first.shape, second.shape) == ((4, 8, 8, 3), (2, 8, 8, 3))
    assert np.abs(first / 127.5 - 1 - pixels[0].transpose(0, 2, 3, 1)).max() < 0.01
