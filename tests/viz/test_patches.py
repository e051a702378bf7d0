"""Pictures: retained patches as they were, removed ones dim, merged ones in the colour of their pivot."""

import numpy as np
import pytest
from PIL import Image

from tests.embedded import random_internvl, random_qwen
from vtr.viz import Tile, contact_sheet, draw, draw_patches, views_from_pixels


def entry(**changes):
    """A 4 x 4 image whose patches 5 and 10 were retained."""
    return {
        "views": 1,
        "patch_grid": [4, 4],
        "crop_grid": [0, 0],
        "tokens": list(range(16)),
        "retained": [5, 10],
        "assignment": None,
        **changes,
    }


def middle(picture, patch, side=100, origin=(0, 0)):
    row, col = divmod(patch, 4)
    return picture.getpixel((origin[0] + col * side + side // 2, origin[1] + row * side + side // 2))


WHITE = np.full((1, 32, 32, 3), 240, np.uint8)


def test_normalisation_is_undone():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.1]
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    pixels = (image / 255 - np.array(mean)) / np.array(std)
    assert (views_from_pixels(pixels.transpose(0, 3, 1, 2), mean, std) == image).all()
    assert views_from_pixels(pixels.transpose(0, 3, 1, 2)[0], mean, std).shape == (1, 8, 8, 3)


def test_retained_patches_are_bright_and_the_rest_is_dim():
    picture = draw_patches(WHITE, entry(), view_px=400)
    assert picture.size == (400, 400)
    for patch in range(16):
        assert middle(picture, patch) == ((240, 240, 240) if patch in (5, 10) else (72, 72, 72))


def test_without_a_report_nothing_is_changed():
    assert np.asarray(draw_patches(WHITE, view_px=64)).min() == 240


def test_merged_patches_have_the_colour_of_their_pivot_and_a_line_to_it():
    assignment = [-1] * 16
    assignment[5], assignment[10], assignment[4], assignment[6], assignment[11] = 5, 10, 5, 5, 10
    picture = draw_patches(WHITE, entry(assignment=assignment), view_px=400)
    corner = [picture.getpixel((col * 100 + 20, row * 100 + 20)) for row, col in ((1, 0), (1, 2), (2, 3))]
    assert corner[0] == corner[1] != corner[2]
    assert middle(picture, 0) == (72, 72, 72)
    assert picture.getpixel((100, 150)) not in {(240, 240, 240), corner[0]}, "the line from patch 4 to its pivot 5"


def test_patches_that_never_were_tokens_are_neither_retained_nor_removed():
    picture = draw_patches(WHITE, entry(tokens=list(range(4, 16))), view_px=400)
    assert middle(picture, 0) == (225, 225, 225)


def test_crops_stand_as_a_canvas_beside_the_thumbnail():
    views = np.stack([np.full((32, 32, 3), 40 * (v + 1), np.uint8) for v in range(5)])
    retained = [16 * v + 5 for v in range(5)]
    picture = draw_patches(views, entry(views=5, crop_grid=[2, 2], tokens=list(range(80)), retained=retained), view_px=400)
    assert picture.size == (400 + 12 + 800, 800)
    for view, origin in enumerate([(0, 0), (412, 0), (812, 0), (412, 400), (812, 400)]):
        assert middle(picture, 5, origin=origin) == (40 * (view + 1),) * 3
    wide = draw_patches(views[:3], entry(views=3, crop_grid=[1, 2], tokens=[], retained=[]), view_px=100)
    assert wide.size == (100 + 12 + 200, 100)


def test_tokens_of_a_smaller_view_are_drawn_as_large_as_what_they_cover():
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[0, :, 16:] = 240
    shrunk = entry(retained=[5, 7, 13, 15])  # a grid of 2 x 2; the centres (1, 1), (1, 3), (3, 1), (3, 3)
    picture = draw_patches(image, shrunk, view_px=400, resized=True)
    for patch in range(16):
        shown = middle(picture, patch)[0]
        assert abs(shown - (0 if patch % 4 < 2 else 240)) < 20, "nothing is dimmed; blurred only by the shrinking"
    outline = (255, 221, 0)
    edges = {x for x in range(400) if picture.getpixel((x, 50)) == outline}
    assert edges == {0, 199, 200, 399}, "four tokens, not sixteen"
    assert draw_patches(image, entry(retained=[]), view_px=40, resized=True).size == (40, 40)


def test_smaller_views_of_an_anyres_image_keep_what_unpadding_cut_off():
    views = np.full((3, 32, 32, 3), 240, np.uint8)
    tokens = [*range(16), *(16 * v + p for v in (1, 2) for p in range(4, 12))]  # the first and last row of the canvas are padding
    retained = [5, 7, 13, 15, *(16 * v + p for v in (1, 2) for p in (5, 7))]
    picture = draw_patches(views, entry(views=3, crop_grid=[1, 2], tokens=tokens, retained=retained), view_px=400, resized=True)
    assert {middle(picture, p) for p in range(16)} == {(240, 240, 240)}
    assert middle(picture, 5, origin=(412, 0)) == (240, 240, 240)
    assert middle(picture, 13, origin=(412, 0)) == (225, 225, 225)


def test_padding_views_are_not_drawn_and_missing_ones_are_refused():
    assert draw_patches(np.repeat(WHITE, 3, 0), entry(), view_px=100).size == (100, 100)
    with pytest.raises(ValueError, match="report has 5 views, got pixels of 1"):
        draw_patches(WHITE, entry(views=5))


def test_contact_sheet_holds_every_tile():
    red, blue = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (100, 50), "blue")
    rows = [("What is it?", [Tile(red, "red", True), Tile(blue, "a " * 500, False)]), ("Again?", [Tile(red, ""), Tile(red, "x")])]
    sheet = contact_sheet("A title " * 50, ["full", "random: 64 visual tokens"], rows, tile_px=200)
    colors = {color: count for count, color in sheet.getcolors(sheet.width * sheet.height)}
    assert colors[(255, 0, 0)] == 3 * 200 * 200
    assert colors[(0, 0, 255)] == 200 * 100
    with pytest.raises(ValueError, match="has 1 tiles for 2 columns"):
        contact_sheet("t", ["a", "b"], [("r", [Tile(red, "x")])])


@pytest.mark.parametrize(
    ("folder", "grids"), [(random_qwen, {"patch_grid": [4, 6]}), (random_internvl, {"patch_grid": [3, 3], "views": 3})]
)
def test_a_picture_is_drawn_as_the_processor_shows_it(folder, grids):
    """Packed patches and tiles are put together again: what is bright is where the image is."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder())
    picture = Image.new("RGB", (96, 64) if "views" not in grids else (96, 48), "black")
    picture.paste("white", (48, 0, 96, 64))
    count = grids["patch_grid"][0] * grids["patch_grid"][1] * grids.get("views", 1)
    shown = draw(picture, {"images": [entry(**grids, tokens=list(range(count)), retained=[])]}, processor=processor, view_px=96)
    places = [(12, 36), (84, 36)] if "views" not in grids else [(48, 48), (96 + 12 + 48, 48)]
    assert [shown.getpixel(place)[0] for place in places] == [0, 76]


def test_many_views_stand_in_rows():
    count = 7
    whole = entry(views=count, tokens=list(range(16 * count)), retained=list(range(16 * count)))
    picture = draw_patches(np.repeat(WHITE, count, 0), whole, view_px=32)
    assert picture.size == (3 * 32 + 2 * 12, 3 * 32 + 2 * 12)
    assert draw_patches(WHITE.repeat(4, 0), None, view_px=32).size == (4 * 32 + 3 * 12, 32)
