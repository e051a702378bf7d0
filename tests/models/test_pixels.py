"""Limits of pixels: what the processor makes of an image follows them, and processors without any refuse them by name."""

import pytest
from PIL import Image

from tests.embedded import random_checkpoint, random_gemma4, random_internvl, random_qwen
from vtr.eval.run.asking import encode
from vtr.hosts._protocol import host_of
from vtr.models.encoders import is_encoder
from vtr.models.loading import load_model
from vtr.models.pixels import PixelLimits, pixels_of


@pytest.mark.parametrize(
    ("limits", "grid"),
    [(PixelLimits(), (4, 5)), (PixelLimits(max_pixels=48 * 48), (2, 3)), (PixelLimits(min_pixels=96 * 128, max_pixels=96 * 160), (7, 8))],
)
def test_an_image_has_the_tokens_that_its_pixels_give_it(limits, grid):
    model, processor = load_model(str(random_qwen()), pixels=limits)
    host = host_of(model)
    (layout,) = host.images_of(encode(processor, ["what is this?"], [[Image.new("RGB", (150, 130))]]))
    assert layout.grids == (grid,)
    least, most = pixels_of(host, processor)
    assert least <= layout.tokens * 16**2 <= most


@pytest.mark.parametrize(("most", "budget"), [(None, 280), (70 * 256, 70), (200 * 256, 140), (1120 * 256, 1120), (10**9, 1120)])
def test_gemma_4_has_a_few_budgets_and_takes_the_largest_within_the_limit(most, budget):
    """An image is brought to the size of the budget, whatever its own: 150 x 130 pixels make the largest grid of that shape."""
    model, processor = load_model(str(random_gemma4()), pixels=PixelLimits(max_pixels=most))
    host = host_of(model)
    (layout,) = host.images_of(encode(processor, ["what is this?"], [[Image.new("RGB", (150, 130))]]))
    rows, cols = layout.grids[0]
    assert layout.grids[0] == (int((budget * 130 / 150) ** 0.5), int((budget * 150 / 130) ** 0.5)) and rows * cols <= budget
    assert processor.image_processor.max_soft_tokens == budget


def test_limits_that_gemma_4_has_none_of_are_refused():
    with pytest.raises(ValueError, match=r"has budgets of its own, got 17919, below the smallest; give one of 17920 \(70 tokens\), 35840"):
        load_model(str(random_gemma4()), pixels=PixelLimits(max_pixels=17919))
    with pytest.raises(ValueError, match="min_pixels: the processor of 'gemma4' brings every image to the size of a budget, got 9; give max"):
        load_model(str(random_gemma4()), pixels=PixelLimits(9, 10**6))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (random_checkpoint, "max_pixels: the processor of 'llava' has no such limit, got 99; leave it out, or give the method 'resize' a budget"),
        (random_internvl, "max_pixels: the processor of 'internvl' has no such limit, got 99; leave it out"),
    ],
)
def test_processors_without_limits_refuse_them(folder, message):
    with pytest.raises(ValueError) as error:
        load_model(str(folder()), pixels=PixelLimits(max_pixels=99))
    assert str(error.value) == message


def test_impossible_limits_are_refused():
    with pytest.raises(ValueError, match="max_pixels: must be at least 1, got 0"):
        PixelLimits(max_pixels=0)
    with pytest.raises(ValueError, match="min_pixels: must be at most max_pixels, got 20 and 10"):
        PixelLimits(20, 10)
    with pytest.raises(ValueError, match=f"min_pixels: must be at most max_pixels, got {10**6} and {64 * 96}"):
        load_model(str(random_qwen()), pixels=PixelLimits(min_pixels=10**6))


def test_a_model_with_an_llm_is_no_encoder():
    assert not any(map(is_encoder, map(str, (random_checkpoint(), random_qwen(), random_internvl()))))
