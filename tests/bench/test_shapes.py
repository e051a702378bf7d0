"""Shapes are the real architectures, and what does not fit is refused before it is made."""

import pytest
import torch

from vtr.bench import shapes
from vtr.models.recipes import find_recipe


@pytest.mark.parametrize(("name", "parameters"), [("llava-1.5-7b", 7_063_427_072), ("llava-next-7b", 7_063_431_168)])
def test_a_shape_has_the_parameters_and_tokens_of_its_recipe(name, parameters):
    shape, recipe = shapes.find_shape(name), find_recipe(name)
    assert sum(p.numel() for p in shapes.build(shape, torch.float16, "meta").parameters()) == parameters
    assert shape.tokens == recipe.tokens["most"]
    assert 2 * parameters / shapes.GIB == pytest.approx(recipe.memory_gib, abs=0.06)
    assert shapes.needed_gib(shape, torch.float16, 1, 1) > recipe.memory_gib


@pytest.mark.parametrize("name", ["llava-tiny", "llava-next-tiny"])
def test_prompts_differ_in_image_and_text(name):
    shape = shapes.find_shape(name)
    model = shapes.build(shape, torch.float32)
    one, two = shapes.prompts(shape, torch.float32, "cpu", 2, 2)
    for key in ("pixel_values", "input_ids"):
        assert not torch.equal(one[key], two[key]) and not torch.equal(one[key][0], one[key][1])
    assert int((one["input_ids"][0] == model.config.image_token_id).sum()) == shape.placeholders
    with torch.no_grad():
        assert model(**one, logits_to_keep=1).logits.shape == (2, 1, shape.vocabulary)


def test_what_does_not_fit_is_refused_with_the_memory_it_needs(monkeypatch):
    monkeypatch.setattr(shapes, "free_gib", lambda device: 8.0)
    with pytest.raises(ValueError, match=r"llava-1.5-7b at batch 8 in float16 needs about 1[67]\.\d GiB, 8.0 GiB are free on cuda"):
        shapes.check_fits(shapes.find_shape("llava-1.5-7b"), torch.float16, "cuda", 8, 64)
    shapes.check_fits(shapes.find_shape("llava-tiny"), torch.float32, "cpu", 8, 64)


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match=r"bench: unknown shape 'llava-med'; did you mean .*'llava-mid'"):
        shapes.find_shape("llava-med")
