"""InternVL: tiles that stand side by side are one image, four patches are one token, and the tower is entered in the order of tokens."""

import pytest
import torch

import vtr
from tests.oracles import Setup, against_masks
from tests.probes import EveryNth, TowerTop
from tests.tiny_models import Shot, batch_of, build, generate, model_of
from vtr.testing.watching import removed_and_cached

TILES = ((4, Shot(96, 96), 2, Shot(40, 40), 6), (3, Shot(96, 40), 5))
"""An image of four tiles and one of one tile; an image of two tiles."""


def report_of(method, call, **settings):
    model, batch = model_of("internvl"), batch_of("internvl", TILES)
    with vtr.reduced(model, method, **settings) as reduction:
        call(model, batch)
    return reduction.report()


@pytest.mark.parametrize(
    "call", [lambda model, batch: model(**batch.inputs), lambda model, batch: generate(model, batch, 2)], ids=["forward", "generate"]
)
@pytest.mark.parametrize("method", ["divprune", "flowcut"])
def test_a_budget_is_that_of_an_image_in_every_stage(method, call):
    """`generate` encodes the tiles before the model has seen a prompt."""
    images = report_of(method, call, keep=6).images
    assert [(image.row, image.views, image.visual_tokens, len(image.retained)) for image in images] == [
        (0, 4, 36, 6),
        (0, 1, 9, 6),
        (1, 2, 18, 6),
    ]


@pytest.mark.parametrize("name", ["visionzip", "fastervlm", "prumerge", "tokencorr", "fastv", "tome"])
def test_methods_leave_what_the_masked_model_sees(name):
    removed, cached = removed_and_cached(vtr.create_method(name, keep=5), "internvl")
    assert removed < 1e-6 and cached < 1e-6


def test_patches_in_raster_order_would_be_found(monkeypatch):
    from vtr.hosts import hf_internvl

    setup, plan = Setup("internvl", dtype=torch.float64), [TowerTop(layer=1), EveryNth(stride=2)]
    assert against_masks(setup, plan, setup.batch()) < 1e-6
    right = hf_internvl.JoinedTower

    def raster(**facts):
        return right(**{**facts, "members": torch.arange(facts["members"].numel()).view_as(facts["members"])})

    monkeypatch.setattr(hf_internvl, "JoinedTower", raster)
    assert not against_masks(setup, plan, setup.batch()) < 0.01


def test_images_encoded_outside_are_one_per_tile():
    model, batch = model_of("internvl"), batch_of("internvl", ((4, Shot(96, 96), 6),))
    outputs = model.model.get_image_features(
        batch.inputs["pixel_values"], vision_feature_layer=-1, vision_feature_select_strategy="default"
    )
    embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
    embeds = embeds.masked_scatter(batch.visual[..., None], outputs.pooler_output)
    with vtr.reduced(model, "divprune", keep=2) as reduction:
        model(inputs_embeds=embeds, visual_positions=batch.visual)
    assert [image.visual_tokens for image in reduction.report().images] == [9, 9, 9, 9]


def test_what_it_cannot_do_is_refused_by_name():
    model = model_of("internvl")
    for name, reason in [
        ("globalcom2", "tiles"),
        ("hired", "tiles"),
        ("resize", "stage 'input'"),
    ]:
        with pytest.raises(vtr.VtrError, match=reason):
            vtr.plan(model, name, keep=5)
    with pytest.raises(vtr.VtrError, match="last tower layer without CLS"):
        vtr.host_of(build("internvl", vision_feature_layer=-2))
