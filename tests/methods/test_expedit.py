"""Settings, their errors, and what the clusters are in a LLaVA."""

import math

import pytest
import torch

import vtr
from tests.tiny_models import batch_of, model_of
from vtr.methods.expedit import Expedit, read_tau

DENSE = vtr.Geometry(
    host="timm:VisionTransformer", tower_layers=24, feature_layer=23, prefix_tokens=1, has_cls=True, patch_grid=(40, 40), llm_layers=0,
    most_tokens=1600,
)  # fmt: skip


def test_default_is_the_published_row_of_vit_l():
    merge, restore = Expedit().steps(DENSE)
    assert (merge.layer, restore.layer) == (10, 24)
    assert Expedit().clusters((40, 40)) == (28, 28)
    assert Expedit().clusters((76, 22)) == (53, 15)  # proportional to the token grid


def test_blocks_ends_the_reduction_earlier():
    assert [step.layer for step in Expedit(alpha=6, blocks=10).steps(DENSE)] == [6, 16]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 4}, "window must be odd, got 4"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"grid": (28,)}, r"grid must be \(rows, cols\), both at least 1"),
        ({"grid": (0, 3)}, "both at least 1"),
        ({"grid": 1.5}, r"share of each side in \(0, 1\], got 1.5"),
        ({"alpha": -1}, "alpha must be at least 0, got -1"),
        ({"iterations": -1}, "iterations must be at least 0"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"neighbours": 0}, "neighbours must be at least 1, or negative"),
        ({"tau": 0}, "tau must be above 0 and finite"),
        ({"tau": math.inf}, "tau must be above 0 and finite"),
        ({"reconstruct": "soft"}, "reconstruct must be true, false or 'naive'"),
        ({"compat": "code"}, "compat must be None or 'authors'"),
        ({"keep": 9}, "expedit: has no budget"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Expedit(**settings)


@pytest.mark.parametrize(("name", "value"), [("alpha", 2.0), ("window", "5"), ("neighbours", 3.5), ("tau", True), ("tau", None)])
def test_settings_of_another_kind_are_refused(name, value):
    with pytest.raises(TypeError, match=f"expedit: {name} must be"):
        Expedit(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 24}, "alpha=24 must be below the 24 blocks"),
        ({"alpha": 20, "blocks": 5}, "alpha=20 and blocks=5 are more than the 24 blocks"),
        ({"grid": (41, 40)}, r"grid \(41, 40\) is larger than the token grid \(40, 40\)"),
    ],
)
def test_what_the_encoder_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Expedit(**settings).steps(DENSE)


def test_tau_comes_from_a_file(tmp_path):
    for number, text in enumerate(("tau: 0.02", "settings:\n  expedit:\n    tau: 0.02\n    alpha: 10")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        assert read_tau(str(file)) == 0.02
    for text, message in (("tau: -1", "no positive number"), ("- 1", "no positive number"), ("a: b: c", "not a readable YAML file")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_tau(str(file))
    with pytest.raises(ValueError, match="neither a number, 'auto' nor a file"):
        Expedit(tau="0.02").steps(DENSE)


@pytest.mark.parametrize("kind", ["llava", "llava_siglip", "llava_next"])
@torch.no_grad()
def test_the_llm_sees_all_tokens_or_the_clusters(kind):
    model, batch = model_of(kind), batch_of(kind)
    with vtr.reduced(model, "expedit", alpha=1, grid=(4, 3)) as reduction:
        model(**batch.inputs)
        images = reduction.report().images
    assert [len(image.retained) for image in images] == batch.counts() and images[0].assignment is None
    with vtr.reduced(model, "expedit", alpha=1, grid=(4, 3), reconstruct=False) as reduction:
        model(**batch.inputs)
        images = reduction.report().images
    for image, count in zip(images, batch.counts(), strict=True):
        if count == 36:
            assert len(image.retained) == 12
        elif count == 36 * image.views:
            assert len(image.retained) == 12 * image.views
        else:  # cells that unpadding cuts off are gone
            assert 12 < len(image.retained) < 12 * image.views
        assert set(image.assignment) <= set(image.retained)


@torch.no_grad()
def test_nothing_may_act_between_clustering_and_restoring():
    model = model_of("llava")
    tome = vtr.create_method("tome", keep=20)
    with pytest.raises(vtr.VtrError, match="tome: acts at tower layer 1, where expedit has put tokens together"):
        vtr.apply(model, [vtr.create_method("expedit", alpha=1, grid=(4, 4)), tome])
    with pytest.raises(vtr.VtrError, match="fastervlm: reads cls_row of tower layer 2, where expedit"):
        vtr.apply(model, [vtr.create_method("expedit", alpha=1, grid=(4, 4)), vtr.create_method("fastervlm", keep=9)])
    batch = batch_of("llava")
    with vtr.reduced(model, [vtr.create_method("expedit", alpha=2, grid=(4, 4)), vtr.create_method("divprune", keep=9)]) as reduction:
        model(**batch.inputs)
    assert {len(image.retained) for image in reduction.report().images} == {9}
