"""LLaVA-OneVision and LLaVA-NeXT-Video: layouts are the family's own packing, and a canvas that it interpolates closes the tower."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import vtr
from tests.oracles import Setup, against_masks
from tests.probes import EveryNth, Ragged, TowerTop
from tests.tiny_models import Shot, batch_of, model_of
from vtr.testing.families import SIDE
from vtr.testing.onevision import OneVision
from vtr.testing.tiny_models import FAMILIES, packing
from vtr.testing.watching import removed_and_cached
from vtr.viz.patches import draw_patches

SHOTS = (Shot(90, 40), Shot(96, 96), Shot(70, 31))


class OneView(OneVision):
    """Several images in one prompt, as the processor has them: one view each, closed by a newline."""

    def views(self, shot):
        return 1

    def grids(self, shot):
        return [(SIDE, SIDE)]

    def beside(self, shots):
        return {**super().beside(shots), "batch_num_images": torch.tensor([len(shots)])}


@pytest.fixture
def one_view(monkeypatch):
    monkeypatch.setitem(FAMILIES, "one_view", OneView())
    packing.cache_clear()
    return "one_view"


@pytest.mark.parametrize("kind", ["llava_next_video", "llava_onevision", "llava_onevision_max"])
@pytest.mark.parametrize("shot", SHOTS)
def test_a_layout_is_what_the_family_packs(kind, shot):
    (layout,) = vtr.host_of(model_of(kind)).layouts("image", {"image_sizes": torch.tensor([shot])})
    expected = packing(kind, shot)
    assert torch.equal(layout.patch < 0, expected[:, 3] == 1)
    token = layout.patch >= 0
    assert torch.equal(layout.cells[layout.patch[token]], expected[token, :3])
    assert list(layout.grids) == FAMILIES[kind].grids(shot)
    assert (layout.inputs or layout.views) == len(FAMILIES["llava_onevision"].grids(shot))
    assert layout.tokens <= vtr.host_of(model_of(kind)).most_tokens


def test_images_beside_others_have_one_view_and_one_newline(one_view):
    setup = Setup(one_view, dtype=torch.float64)
    batch = setup.batch()
    assert batch.counts() == [SIDE * SIDE] * 3 and int(batch.visual.sum()) == 3 * (SIDE * SIDE + 1)
    assert against_masks(setup, [Ragged(), EveryNth(stage="prefill", layer=2)], batch) < 1e-6
    assert against_masks(setup, [TowerTop(), EveryNth(stride=2)], batch) < 1e-6
    for newlines in ("all", "none"):
        assert against_masks(setup, [replace(EveryNth(stride=5), newlines=newlines)], batch, newlines=newlines) < 1e-6


@pytest.mark.parametrize("name", ["visionzip", "globalcom2", "fastv"])
def test_methods_leave_what_the_masked_model_sees(name):
    removed, cached = removed_and_cached(vtr.create_method(name, keep=5), "llava_onevision")
    assert removed < 1e-6 and cached < 1e-6


def test_an_interpolated_canvas_closes_the_tower():
    model, batch = model_of("llava_onevision_max"), batch_of("llava_onevision_max")
    for name in ("visionzip", "flowcut", "tome", "resize", "expedit"):
        settings = {} if name == "expedit" else {"keep": 20}
        with (
            vtr.reduced(model, name, **settings),
            pytest.raises(vtr.VtrError, match=f"{name}: reads or shortens the vision tower.* 90 x 40"),
        ):
            model(**batch.inputs)
    with vtr.reduced(model, "globalcom2", keep=20), pytest.raises(vtr.VtrError, match="different grids"):
        model(**batch.inputs)


def test_the_aspect_ratio_of_a_call_counts():
    model, batch = model_of("llava_onevision"), batch_of("llava_onevision", ((Shot(96, 96), 4),))
    host = vtr.host_of(model)
    arguments = {"image_sizes": batch.inputs["image_sizes"], "vision_aspect_ratio": "anyres_max_1"}
    (layout,) = host.layouts("image", arguments)
    assert layout.grids == ((SIDE, SIDE), (SIDE, SIDE)) and layout.inputs == 5
    assert host.layouts("image", {**arguments, "vision_aspect_ratio": None})[0].inputs is None


def test_a_picture_shows_an_interpolated_canvas_in_its_own_shape():
    model, batch = model_of("llava_onevision_max"), batch_of("llava_onevision_max", ((Shot(90, 40), 4),))
    with vtr.reduced(model, EveryNth(stride=2)) as reduction, torch.no_grad():
        model(**batch.inputs)
    image = reduction.report().to_dict()["images"][0]
    assert image["grids"] == [[6, 6], [8, 4]] and image["crop_grid"] == [1, 1]
    picture = draw_patches(np.full((3, 48, 48, 3), 200, dtype=np.uint8), image, view_px=120)
    assert picture.size == (120 * 3 + 12, 540)
    pixels = np.asarray(picture)[..., 0]
    for patch in range(6 * 6 + 8 * 4):
        row, col = divmod(patch, 6) if patch < 36 else divmod(patch - 36, 4)
        y, x = (row * 20 + 10, col * 20 + 10) if patch < 36 else (row * 540 // 8 + 30, 132 + col * 60 + 30)
        assert (pixels[y, x] > 150) == (patch in image["retained"]), patch
