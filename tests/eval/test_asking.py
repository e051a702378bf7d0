"""Images and prompts: what comes in is either usable or refused with a reason."""

import pytest
from PIL import Image, ImageFile

from vtr.eval.asking import build_prompt, open_image
from vtr.types import VtrError


class Template:
    """Stands in for a processor: writes the order of the parts."""

    chat_template = "yes"

    def apply_chat_template(self, messages, add_generation_prompt):
        assert add_generation_prompt
        return "|".join(part.get("text", "IMAGE") for part in messages[0]["content"])


def test_images_come_first_or_where_they_are_marked():
    assert build_prompt(Template(), "What?", 2) == "IMAGE|IMAGE|What?"
    assert build_prompt(Template(), "What?", 0) == "What?"
    assert build_prompt(Template(), "Left <image> or right <image>?", 2) == "Left|IMAGE|or right|IMAGE|?"


@pytest.mark.parametrize(("question", "images"), [("<image> and <image>", 1), ("<image>?", 2), ("<image>?", 0)])
def test_image_count_must_match_the_prompt(question, images):
    with pytest.raises(ValueError, match=rf"question: has {question.count('<image>')} x <image> but {images} image"):
        build_prompt(Template(), question, images)


def test_a_processor_without_template_is_refused():
    with pytest.raises(VtrError, match="has no chat template"):
        build_prompt(object(), "What?", 1)


def test_missing_image(tmp_path):
    with pytest.raises(ValueError, match=r"image: no file .*gone\.png"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="image: no file"):
        open_image(tmp_path)


def test_not_an_image(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(VtrError, match="is not an image that Pillow can read"):
        open_image(tmp_path / "text.png")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_image(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as importing lmms-eval leaves it
    path = tmp_path / f"cut.{suffix}"
    Image.effect_noise((200, 200), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(VtrError, match="is damaged"):
        open_image(path)


@pytest.mark.parametrize("factor", [1.5, 3])  # Pillow itself warns at the first and raises at the second
def test_decompression_bomb(tmp_path, monkeypatch, factor):
    Image.new("RGB", (40, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(40 * 30 / factor))
    with pytest.raises(ValueError, match=r"has too many pixels .* at most \d+; make it smaller first"):
        open_image(tmp_path / "bomb.png")


def test_images_are_turned_and_made_rgb(tmp_path):
    image = Image.new("LA", (40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # camera was held upright
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.mode == "RGB"
    assert opened.size == (30, 40)
