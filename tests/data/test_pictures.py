"""A picture is shown with the brightness that a viewer gives it, whatever its bit depth."""

import numpy as np
import pytest
from PIL import Image

from vtr.data.pictures import as_shown, open_image
from vtr.eval.lmms.prompts import read_visual
from vtr.types import VtrError

GRAY = np.linspace(0, 255, 48 * 64).reshape(48, 64).round().astype(np.uint8)
DARK = (GRAY // 4).astype(np.uint8)  # the darkest quarter of the range

SAME = {
    "16 bits": GRAY.astype(np.uint16) * 257,
    "32-bit integers, 8-bit values": GRAY.astype(np.int32),
    "32-bit integers, 16-bit values": GRAY.astype(np.int32) * 257,
    "32-bit integers, signed": (GRAY.astype(np.int32) - 128) * 2**23,
    "floats from 0 to 1": GRAY.astype(np.float32) / 255,
    "floats from 0 to 255": GRAY.astype(np.float32),
    "floats from 0 to 65535": GRAY.astype(np.float32) * 257,
    "floats from -1 to 1": GRAY.astype(np.float32) / 127.5 - 1,
    "floats far above": GRAY.astype(np.float32) * 1e6 + 7e6,
}


def apart(image, gray):
    """Largest difference of any channel to 8-bit gray values."""
    assert image.mode == "RGB"
    return int(abs(np.asarray(image).astype(int) - gray.astype(int)[..., None]).max())


@pytest.mark.parametrize("values", SAME.values(), ids=SAME)
@pytest.mark.parametrize("way", ["file", "memory", "lmms-eval"])
def test_it_equals_the_8_bit_picture(values, way, tmp_path):
    image = Image.fromarray(values)
    if way == "file":
        path = tmp_path / ("x.png" if values.dtype == np.uint16 else "x.tiff")
        image.save(path)
        assert apart(open_image(path), GRAY) <= 1
    else:
        assert apart(as_shown(image) if way == "memory" else read_visual(image, 8), GRAY) <= 1


def test_16_bits_keep_their_own_scale(tmp_path):
    twelve = (DARK.astype(np.uint16) * 257).clip(0, 4095)  # as a camera's 12 bits in a 16-bit file: dark in every viewer
    for name, mode in (("x.png", "I;16"), ("x.tiff", "I;16"), ("y.tiff", "I;16B")):
        Image.fromarray(twelve.astype(">u2") if mode == "I;16B" else twelve).save(tmp_path / name)
        opened = Image.open(tmp_path / name)
        assert opened.mode == mode
        assert apart(open_image(tmp_path / name), (twelve / 257).round()) == 0


@pytest.mark.parametrize("scale", [1, 255], ids=["to 1", "to 255"])
def test_dark_floats_are_not_brightened_and_an_overshoot_is_clipped(scale):
    dark = DARK.astype(np.float32) / 255 * scale
    dark[0, 0] = scale * 0.9  # what says that 1 is not black
    shown = np.asarray(as_shown(Image.fromarray(dark)))[..., 0].astype(int)
    assert abs(shown - dark / scale * 255).max() <= 0.5
    ringing = GRAY.astype(np.float32) / 255 * scale
    ringing[0, :3], ringing[-1, -3:] = -0.04 * scale, 1.05 * scale
    assert apart(as_shown(Image.fromarray(ringing)), GRAY) <= 2


def test_a_pgm_with_16_bits_keeps_its_scale(tmp_path):
    values = DARK[:4, :4].astype(np.uint16)  # all below 256: as 8-bit levels it would be a bright picture
    (tmp_path / "x.pgm").write_bytes(b"P5 4 4 65535\n" + values.astype(">u2").tobytes())
    assert apart(open_image(tmp_path / "x.pgm"), values // 257) == 0


def test_16_bit_color(tmp_path):
    import struct
    import zlib

    color = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], -1)
    raw = b"".join(b"\0" + row.tobytes() for row in (color.astype(np.uint16) * 257).astype(">u2"))
    head = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks)
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    assert abs(np.asarray(open_image(tmp_path / "x.png")).astype(int) - color).max() <= 1


def covered(mode):
    """A picture whose left half is transparent over black, and whose right half is opaque: gray 60, or red in color."""
    color = (60, 60, 60) if mode in ("LA", "L") else (200, 0, 0)
    image = Image.new("RGBA", (8, 4), (*color, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 4))
    if mode == "P":
        palette = Image.new("P", (8, 4), 1)
        palette.putpalette([0, 0, 0, *color])
        palette.paste(0, (0, 0, 4, 4))
        palette.info["transparency"] = 0
        return palette, color
    if mode in ("L", "RGB"):  # a PNG whose header names the transparent value
        flat = image.convert(mode)
        flat.info["transparency"] = 0 if mode == "L" else (0, 0, 0)
        return flat, color
    return image.convert(mode), color


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB", "RGBa"])
def test_white_is_behind_transparent_pixels(mode, tmp_path):
    image, color = covered("RGBA" if mode == "PA" else mode)
    if mode == "PA":
        image = covered("P")[0].convert("PA")
    found = [as_shown(image)]
    if mode not in ("PA", "RGBa"):  # PNG has neither
        image.save(tmp_path / "x.png", **({"transparency": image.info["transparency"]} if "transparency" in image.info else {}))
        found.append(open_image(tmp_path / "x.png"))
    for shown in found:
        assert shown.mode == "RGB" and shown.getpixel((0, 0)) == (255, 255, 255) and shown.getpixel((7, 3)) == color


def test_a_half_transparent_pixel_is_mixed_with_white():
    assert as_shown(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)
    assert as_shown(Image.new("La", (1, 1), (0, 128))).getpixel((0, 0)) == (127, 127, 127)


def test_16_bit_gray_with_a_transparent_value(tmp_path):
    values = GRAY.astype(np.uint16) * 257
    Image.fromarray(values).save(tmp_path / "x.png", transparency=0)
    assert apart(open_image(tmp_path / "x.png"), np.where(GRAY == 0, 255, GRAY)) <= 1


@pytest.mark.parametrize(
    ("mode", "color"), [("1", 1), ("CMYK", (0, 0, 0, 0)), ("YCbCr", (255, 128, 128)), ("HSV", (0, 0, 255)), ("L", 255)]
)
def test_other_modes_show_white_as_white(mode, color):
    assert as_shown(Image.new(mode, (2, 2), color)).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "a pixel of mode F is not a finite number"),
        (np.inf, "a pixel of mode F is not a finite number"),
        (-3.0, "all pixels of mode F are -3"),
    ],
)
def test_what_has_no_brightness_is_refused(value, message, tmp_path):
    image = Image.fromarray(np.full((4, 4), value, np.float32))
    with pytest.raises(VtrError, match=message):
        as_shown(image)
    image.save(tmp_path / "x.tiff")
    with pytest.raises(VtrError, match=rf"image: '.*x\.tiff': {message}"):
        open_image(tmp_path / "x.tiff")


@pytest.mark.parametrize("values", [GRAY, GRAY.astype(np.uint16) * 257, GRAY.astype(np.float32)], ids=["8 bits", "16 bits", "float"])
def test_a_tiff_in_which_zero_is_white(values, tmp_path):
    path = tmp_path / "x.tiff"
    Image.fromarray(values).save(path)
    black_is_zero = b"\x06\x01\x03\x00\x01\x00\x00\x00\x01\x00"  # tag 262, a short
    content = path.read_bytes()
    assert content.count(black_is_zero) == 1
    path.write_bytes(content.replace(black_is_zero, black_is_zero[:-2] + b"\x00\x00"))
    assert apart(open_image(path), 255 - GRAY) <= 1


def test_a_turned_16_bit_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "x.png", exif=exif)
    assert apart(open_image(tmp_path / "x.png"), GRAY[::-1].T) <= 1
