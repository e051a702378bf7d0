"""What every registered method promises, on every host. A new method is under contract before anybody writes a test for it.

The checks are those of `vtr.testing.contract`, which `vtr check` runs, too. By default every method runs on one host, and one method per
mechanism on every host; the full product is marked slow.
"""

import re
from dataclasses import fields
from functools import cache

import pytest
import torch

import vtr
from tests import oracles, tiny_models
from tests.marks import slow
from vtr.registry import method_class
from vtr.testing.checking import TOLERANCE
from vtr.testing.contract import CONTRACT, FACTS
from vtr.testing.subject import TINY, Subject
from vtr.testing.subject import retained_of as retained_of
from vtr.testing.watching import removed_and_cached

NAMES = vtr.list_methods()
NEEDED = {"shortv": {"layers": (1, 3)}}
"""Settings without which a method refuses a model that it has no published list for."""
SEEDED = {"todre": {"pivot": "random"}}
"""Settings with which a method is random, where its default is not."""
LEAST = {"tome": 5, "resize": 1}
"""Fewest tokens per view that a method can leave with the tiny tower; fewer is refused (tested with the method)."""
UNMASKED = ("expedit", "resize")
"""Methods that masks cannot express: they give tokens back, or change the images."""


@cache
def subject_of(name: str) -> Subject:
    """The method with what it needs here; what several checks look at is computed once."""
    return Subject(name, NEEDED.get(name), SEEDED.get(name), LEAST.get(name, 0))


def method_of(name: str, keep: int | None = None, kind: str = "llava") -> vtr.Method:
    """The method with its defaults, or with a budget where it has one: `keep`, or the fewest that it can leave on that kind of host."""
    return subject_of(name).method(keep, kind)


def home(name: str) -> str:
    """The first kind of host that the method can run on."""
    return subject_of(name).home()


def mechanism(name: str) -> tuple:
    """What a method does where; methods that share it stress the same code of a host."""
    return tuple(sorted({(step.stage, step.action) for step in method_of(name).steps(TINY)}))


REPRESENTATIVES = {mechanism(name): name for name in reversed(NAMES)}.values()
OF_VIDEOS = {name for name in NAMES if method_class(name).card.needs_video}


def quick(name: str, kind: str) -> bool:
    """Whether the quick suite has the method on a kind: all at home, one per mechanism on one kind per mechanism of hosts; of videos that is one
    whose frames have a grid and a time of their own."""
    return kind == home(name) or (name in REPRESENTATIVES and kind in (*tiny_models.KINDS, "qwen3_vl_clips"))


PAIRS = [
    pytest.param(name, kind, id=f"{name}-{kind}", marks=() if quick(name, kind) else pytest.mark.slow)
    for name in NAMES
    for kind in (*tiny_models.ALL_KINDS, *(tiny_models.VIDEO_KINDS if name in OF_VIDEOS else ()))
    if subject_of(name).works_on(kind)
]
ABROAD = ("retained is what was asked for, keep=7", "neighbours and left padding change nothing")
"""What the quick suite asks of the method of a mechanism away from home."""
OF_THE_ENGINE = (
    "tokens are removed, not masked",
    "text tokens are untouched",
    "nothing is left behind",
    "a failed call does not disturb the next",
)
"""What the engine does for every method of a mechanism alike: the quick suite asks it of one, `make test-method` of any."""
TWICE = ("float16 runs", "neighbours and right padding change nothing")
"""What differs from another check only in a dtype or a side."""


def of_the_contract() -> list:
    """Every check of every method on every kind of host, slow but for all checks at home and a few abroad."""
    found = []
    for pair in PAIRS:
        name, kind = pair.values
        spared = TWICE if name in REPRESENTATIVES else (*TWICE, *OF_THE_ENGINE)
        slow = [check for check in CONTRACT if pair.marks or (check in spared if kind == home(name) else check not in ABROAD)]
        mark = (pytest.mark.slow, pytest.mark.home) if kind == home(name) else pytest.mark.slow
        marks = {check: mark if check in slow else () for check in CONTRACT}
        found += [pytest.param(check, name, kind, id=f"{check}-{pair.id}", marks=marks[check]) for check in CONTRACT]
    return found


@pytest.mark.parametrize(("check", "name", "kind"), of_the_contract())
@pytest.mark.filterwarnings("ignore:.*keep.*")  # AnyRes: some images have fewer tokens than the most that one can have
def test_contract(check, name, kind):
    CONTRACT[check](subject_of(name), kind)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", FACTS)
def test_facts(check, name):
    FACTS[check](subject_of(name))


def test_some_methods_have_a_seed():
    assert {"random", "todre"} <= {name for name in NAMES if "seed" in {f.name for f in fields(method_class(name))}}


@pytest.mark.parametrize(("name", "kind"), [pair if pair.values[1] == home(pair.values[0]) else slow(pair.values) for pair in PAIRS])
def test_removed_equals_masked_and_cached_equals_recomputed(name, kind):
    if name in UNMASKED:
        with pytest.raises(NotImplementedError, match=name):
            removed_and_cached(method_of(name, 7, kind), kind)
        return
    removed, cached = removed_and_cached(method_of(name, 7, kind), kind)
    assert removed <= TOLERANCE and cached <= TOLERANCE


IMAGE_METHODS = [name for name in NAMES if name not in OF_VIDEOS]
ELSEWHERE = [pytest.param(name, kind, marks=pytest.mark.slow) for name in IMAGE_METHODS for kind in tiny_models.OTHER_KINDS]
REFUSED_IMAGES = "which mix patches|the views of an image have different grids"
"""What is known when an image comes; what is known of a model is listed in docs/models.md, which a test compares."""


@pytest.mark.parametrize(("name", "kind"), ELSEWHERE)
def test_methods_on_other_families_leave_the_budget_as_masks_do_or_are_refused(name, kind):
    cls, dtype = method_class(name), torch.float32 if kind.endswith("moe") else torch.float64
    method = cls(**NEEDED.get(name, {}), **({"keep": 5 if name == "resize" else 3} if cls.takes_budget else {}))
    model, batch = tiny_models.model_of(kind, "sdpa", dtype), tiny_models.batch_of(kind, dtype=dtype)
    try:
        vtr.plan(model, method, question="")
    except (vtr.VtrError, ValueError):
        return
    try:
        with vtr.reduced(model, method, question="") as reduction, torch.no_grad():
            model(**batch.inputs, position_ids=batch.positions)
    except vtr.VtrError as refusal:
        assert re.search(REFUSED_IMAGES, str(refusal)), refusal
        return
    images = reduction.report().to_dict()["images"]
    assert [image["visual_tokens"] for image in images] == batch.counts()
    if cls.takes_budget and cls.card.exact:
        assert all(min(method.keep, image["visual_tokens"]) in (len(image["retained"]), *image["per_layer"]) for image in images)
    if name not in UNMASKED:
        removed, cached = removed_and_cached(method, kind, dtype=dtype)
        assert max(removed, cached) <= oracles.tolerance("O3", dtype, kind)


QUICK_ON_VIDEOS = (("qwen3_vl_clips", "all"),)
ON_VIDEOS = [
    pytest.param(
        name,
        kind,
        frames,
        marks=() if name in REPRESENTATIVES and (kind, frames) in QUICK_ON_VIDEOS else pytest.mark.slow,
    )
    for name in IMAGE_METHODS
    if name not in UNMASKED
    for kind in ("llava_next_video_clips", "llava_onevision_clips", "qwen2_5_vl_clips", "qwen3_vl_clips")
    for frames in ("each", "all")
]
REFUSED_ON_VIDEOS = "|".join(
    [
        *(
            "needs the CLS token",
            "shortens the vision tower",
            "one picture only",
            "give keep_ratio",
            "out of reach",
        ),
        *("stage 'input'", "gives merged patches back"),
    ]
)


@pytest.mark.parametrize(("name", "kind", "frames"), ON_VIDEOS)
def test_methods_for_images_see_videos_both_ways_or_say_why_not(name, kind, frames):
    cls = method_class(name)
    try:
        method = cls(**NEEDED.get(name, {}), **({"keep": 9} if cls.takes_budget else {}), frames=frames)
        removed, cached = removed_and_cached(method, kind)
    except (vtr.VtrError, ValueError) as refusal:
        assert re.search(REFUSED_ON_VIDEOS, str(refusal)), refusal
        return
    assert removed <= TOLERANCE and cached <= TOLERANCE
