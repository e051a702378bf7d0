"""The `shapes` benchmark: fixed bytes, balanced answers, right answers, disjoint splits."""

import hashlib

import numpy as np
import pytest

from vtr.data import shapes
from vtr.data.glyphs import ALPHABET, glyph
from vtr.data.questions import MOST_COUNTED, PRINTED, compose, direction
from vtr.data.scenes import CANVAS, CELL, COLORS, SHAPES, Dice, Item, Scene, draw, mask


def test_the_first_samples_are_the_published_ones():
    """As they were when the whole split was; all of it is hashed by the slow test below."""
    assert shapes.test_digest(limit=10) == "9377a87ecddb617526f6da51ecdcb444c85d67cf29943e0897237090e9f79368"


@pytest.mark.slow
def test_the_test_split_is_the_published_one():
    assert shapes.test_digest() == shapes.TEST_SHA256


def test_every_family_has_500_questions_with_distinct_ids():
    samples = shapes.test_samples()
    assert [sample.family for sample in samples] == [family for family in shapes.FAMILIES for _ in range(500)]
    assert len({sample.id for sample in samples}) == len(samples)
    assert samples[-1].id == "shapes-v1/text/499"


def test_limit_takes_the_first_of_each_family():
    assert [s.id for s in shapes.test_samples(limit=2)] == [f"shapes-v1/{f}/00{n}" for f in shapes.FAMILIES for n in (0, 1)]
    assert shapes.test_samples("text", limit=3) == shapes.test_samples("text")[:3]


@pytest.mark.parametrize("family", shapes.FAMILIES)
def test_no_constant_answer_is_good(family: str):
    assert shapes.constant_accuracy(family) < (55 if family == "existence" else 35)


def test_images_are_rgb_of_384_pixels():
    image = shapes.test_samples(limit=1)[0].image
    assert (image.mode, image.size) == ("RGB", (CANVAS, CANVAS))


def test_print_is_at_least_8_pixels_high_for_the_model():
    assert CELL * 7 * 192 / CANVAS >= 8


@pytest.mark.slow
def test_splits_share_no_picture():
    def digests(split: str) -> set[str]:
        return {hashlib.sha256(draw(sample.scene).tobytes()).hexdigest() for sample in shapes.split_samples(split, limit=40)}

    splits = [digests(split) for split in shapes.STREAMS]
    assert len(set().union(*splits)) == sum(map(len, splits)) == 200 * len(splits)


def test_training_scenes_are_not_test_scenes():
    from scripts.tiny.batches import Batches

    known = {(s.scene.items, s.scene.signs) for s in shapes.test_samples()}
    seeds = {s.scene.seed for s in shapes.test_samples()}
    stream = Batches(None, 1, 1, CANVAS).stream
    scenes = [compose(Dice(stream, n), CANVAS, free=True) for n in range(3000)]
    assert not known & {(scene.items, scene.signs) for scene in scenes}
    assert not seeds & {scene.seed for scene in scenes}


def test_answers_are_true():
    """Recounted from the scene, in words of the question, without the askers."""
    for s in shapes.test_samples(limit=100):
        words = s.question.rstrip("?").split()
        color = [w for w in words if w in COLORS]
        named = [i for i in s.scene.items if i.color in color[:1] and i.shape in words]
        if s.family == "existence":
            assert (s.answer == "yes") == bool(named)
        elif s.family == "attribute":
            (item,) = [i for i in s.scene.items if i.size in words and (i.shape in words or i.color in words)]
            assert s.answer == (item.color if "color" in words else item.shape)
        elif s.family == "counting":
            kinds = {"crosses": "cross", **{shape + "s": shape for shape in SHAPES}}
            assert int(s.answer) == sum(i.color in words or any(kinds.get(w) == i.shape for w in words) for i in s.scene.items)
            assert 1 <= int(s.answer) <= MOST_COUNTED
        elif s.family == "relation":
            spots = {f"{i.color} {i.shape}": (i.x, i.y) for i in s.scene.items}
            spots["sign"] = ((s.scene.signs[0].box[0] + s.scene.signs[0].box[2]) // 2, s.scene.signs[0].top + 16)
            a, b = (spots[part] for part in s.question.removesuffix("?").removeprefix("where is the ").split(" seen from the "))
            ahead = {"left": b[0] - a[0], "right": a[0] - b[0], "above": b[1] - a[1], "below": a[1] - b[1]}
            assert max(ahead, key=ahead.get) == s.answer
        else:
            assert s.answer.upper() in [sign.text for sign in s.scene.signs]


def test_absent_objects_share_color_and_shape_with_present_ones():
    for s in shapes.test_samples("existence", limit=100):
        words = s.question.rstrip("?").split()
        assert any(i.color == words[3] for i in s.scene.items) and any(i.shape == words[4] for i in s.scene.items)


def test_objects_do_not_overlap_and_stay_inside():
    for s in shapes.test_samples(limit=20):
        boxes = [o.box for o in (*s.scene.items, *s.scene.signs)]
        assert all(left >= 0 and top >= 0 and right <= CANVAS and bottom <= CANVAS for left, top, right, bottom in boxes)
        for n, (left, top, right, bottom) in enumerate(boxes):
            assert all(right <= a or c <= left or bottom <= b or d <= top for a, b, c, d in boxes[:n])


def test_an_item_shows_its_color():
    scene = Scene(192, (1, 2), (Item("square", "red", "large", 96, 96, 30),))
    middle = draw(scene)[90:100, 90:100].reshape(-1, 3).mean(0)
    assert np.abs(middle - COLORS["red"]).max() < 20


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_and_fill_their_box(shape: str):
    ink = mask(shape, 17)
    assert ink.any(0).sum() >= 29 and ink.any(1).sum() >= 29
    assert all((ink != mask(other, 17)).mean() > 0.05 for other in SHAPES if other != shape)


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="unknown shape 'heart'"):
        mask("heart", 10)


def test_glyphs_differ_in_two_cells_or_more():
    letters, digits = [c for c in ALPHABET if c.isalpha()], [c for c in ALPHABET if c.isdigit()]
    for group in (letters, digits):  # a sign has one kind only
        assert all((glyph(a) != glyph(b)).sum() >= 2 for a in group for b in group if a != b)
    assert all(set(word) <= set(letters) for word in PRINTED)


def test_direction_is_none_between_the_axes():
    assert direction((10, 50), (100, 60)) == "left" and direction((10, 50), (20, 100)) == "above"
    assert direction((10, 10), (60, 50)) is None


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [("Yes.", "yes", True), (" red ", "red", True), ("red circle", "red", False), ("", "no", False), ("12", "1", False)],
)
def test_score_is_exact_match(prediction: str, answer: str, right: bool):
    assert shapes.is_correct(prediction, answer) is right


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown family 'colour'; choose from existence"):
        shapes.test_samples("colour")
    with pytest.raises(ValueError, match="limit must be from 1 to 500, got 0"):
        shapes.test_samples(limit=0)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        shapes.split_samples("dev")
