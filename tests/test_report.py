"""One report for models with an LLM and for ViTs without one: the same words mean the same."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vtr
from tests import dense_models
from tests.tiny_models import ONE, batch_of, model_of
from tests.windowed_models import timm_sam

pytestmark = pytest.mark.usefixtures("no_gradients")

COMMON = ("methods", "images", "sequence_lengths", "tokens_per_block", "retained", "positions", "assignment", "average_keep", "choosing_ms")


def report_of(kind: str, method: str, **settings) -> vtr.Report:
    model = dense_models.model_of("timm") if kind == "timm" else model_of(kind)
    with vtr.reduced(model, method, **settings) as reduction:
        model(dense_models.images()) if kind == "timm" else model(**batch_of(kind, ONE).inputs)
    return reduction.report()


@pytest.mark.parametrize(
    ("kind", "method", "settings"),
    [("llava", "fastv", {"keep": 9}), ("llava", "tome", {"keep": 12}), ("timm", "tome", {"keep": 12}), ("timm", "expedit", {"alpha": 2})],
)
def test_every_field_is_there_with_and_without_an_llm(kind, method, settings):
    report = report_of(kind, method, **settings)
    assert type(report) is vtr.Report
    assert {name: type(getattr(report, name)) for name in COMMON}.items() >= {
        "images": list,
        "retained": int,
        "average_keep": float,
    }.items()
    assert vtr.method_from(report.methods[0]).name == method
    for image in report.images:
        assert len(image.tokens) == image.visual_tokens == 36 and set(image.retained) <= set(image.tokens)
        assert len(image.retained) == report.retained and image.per_layer == report.tokens_per_block
    json.dumps(report.to_dict())
    assert repr(report).startswith(f"Report({method}: ")


def test_images_of_a_vit_have_their_own_assignment():
    report = report_of("timm", "tome", keep=12)
    assert len(report.images) == report.to_dict()["images"] == 2 and report.grid == (6, 6) and report.prefix_tokens == 1
    for number, (image, row) in enumerate(zip(report.images, report.assignment, strict=True)):
        assert (image.row, image.image, image.views, image.patch_grid) == (number, 0, 1, (6, 6))
        assert image.assignment == row and set(row) == set(image.retained) == set(report.positions[number])
    with pytest.raises(vtr.VtrError, match=r"Report\.labels: gathers labels of a prompt, and this model has no LLM"):
        report.labels(torch.zeros(2, 37))


def test_windows_of_a_vit_are_views_of_its_images():
    model = timm_sam()
    with vtr.reduced(model, "expedit", alpha=2, grid=0.75) as reduction:
        model(torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1)))
    report = reduction.report()
    for number, image in enumerate(report.images):
        area = image.patch_grid[0] * image.patch_grid[1]
        rows = report.assignment[number * image.views : (number + 1) * image.views]
        assert len(image.retained) == report.retained and len(image.tokens) == image.views * area == image.visual_tokens
        assert image.assignment == [view * area + pivot for view, row in enumerate(rows) for pivot in row]
        assert set(image.assignment) <= set(image.retained)


def test_a_batch_without_a_reduced_block_keeps_everything():
    model = dense_models.timm_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    with vtr.reduced(model, "tome", keep=20) as reduction, pytest.warns(UserWarning, match="all its tokens stay"):
        model(dense_models.images(1, 64, 64))
    report = reduction.report()
    assert report.images[0].retained == list(range(16)) and report.images[0].assignment is None
    assert report.retained == 16 and report.tokens_per_block == [16] * 6 and report.assignment == []


# -- pictures


def picture(side: int = 60) -> Image.Image:
    return Image.fromarray(np.full((side, side, 3), 200, dtype=np.uint8))


def bright(drawn: Image.Image) -> list[int]:
    """Patches of the 6 x 6 grid that are not dimmed."""
    side = drawn.size[0] // 6
    pixels = np.asarray(drawn.convert("L"))
    return [n for n in range(36) if pixels[n // 6 * side + side // 2, n % 6 * side + side // 2] > 150]


@pytest.mark.parametrize("kind", ["llava", "timm"])
def test_a_report_is_drawn_on_the_image(kind):
    report = report_of(kind, "divprune", keep=9) if kind == "llava" else report_of(kind, "pool", alpha=2, grid=(3, 3))
    drawn = vtr.draw(picture(), report)
    if kind == "llava":
        assert bright(drawn) == report.images[0].retained
        assert bright(vtr.draw(picture(), json.loads(json.dumps(report.to_dict())))) == report.images[0].retained
    pixels = np.asarray(picture())[None]
    assert drawn.tobytes() == report.draw(picture()).tobytes() == report.draw(pixels).tobytes() == vtr.draw(pixels, report, 0).tobytes()


def test_smaller_images_are_drawn_smaller():
    report = report_of("llava", "resize", keep=9)
    assert report.resized and not report_of("llava", "fastv", keep=9).resized
    assert bright(vtr.draw(picture(), report)) == list(range(36)), "every token covers more than its patch"


class Processor:
    """Cuts the left half of an image off."""

    image_mean, image_std = [0.0] * 3, [1.0] * 3

    def __call__(self, images, return_tensors):
        half = images.crop((images.width // 2, 0, images.width, images.height)).resize((60, 60))
        return {"pixel_values": torch.from_numpy(np.asarray(half).copy()).permute(2, 0, 1)[None].float() / 255}


def test_a_processor_says_what_the_tower_saw():
    report, halves = report_of("llava", "divprune", keep=36), np.full((60, 60, 3), 200, dtype=np.uint8)
    halves[:, :30] = 0
    assert len(bright(vtr.draw(Image.fromarray(halves), report))) == 18
    assert len(bright(vtr.draw(Image.fromarray(halves), report, processor=Processor()))) == 36


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"picture": "cat.png"}, TypeError, "draw: picture must be a PIL image or an array of pixels, got str"),
        ({"number": 3}, ValueError, r"draw: number must be 0 to 0, the images of this report, got 3"),
        ({"report": {"images": 2}}, TypeError, r"draw: report must be what Reduction\.report\(\) returns, with its images, got dict"),
        ({"picture": Image.new("I;16", (60, 60))}, ValueError, "draw: picture must have 8 bits per channel, got mode 'I;16'"),
        (
            {"picture": np.zeros((60, 60, 3), dtype=np.uint8)},
            ValueError,
            r"draw: pixels must be \(V, H, W, 3\) uint8, got \(60, 60, 3\) uint8",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        vtr.draw(**{"picture": picture(), "report": report_of("llava", "divprune", keep=9), **arguments})


def test_a_picture_of_several_views_needs_a_processor():
    report = report_of("llava_next", "divprune", keep=9)
    with pytest.raises(
        ValueError, match=r"draw: this image was shown in \d views, got a picture; give processor=, or the pixels of the views"
    ):
        vtr.draw(picture(), report)
