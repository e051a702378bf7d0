"""ToMe and pooling on dense hosts: fewer tokens inside, all of them back outside."""

from operator import attrgetter

import pytest
import torch
from torch import Tensor, nn

import vtr
from tests.dense_models import images, model_of, outputs, timm_model
from vtr.hosts._protocol import host_of
from vtr.methods.pool import pooled_grid
from vtr.ops.clusters import cell_means


@pytest.mark.parametrize("kind", ["timm", "ViT", "DINOv2 registers", "CLIP", "SigLIP", "open_clip", "DPT"])
@pytest.mark.parametrize("settings", [{"keep": 16}, {"keep": 12, "proportional": False}, {"keep_ratio": 0.5}])
@torch.no_grad()
def test_tome_merges_and_unmerges(kind, settings):
    model, pixels = model_of(kind), images()
    if host_of(model).merge_point is None:
        pytest.skip("this transformers lays the block out in an older way, which is refused")

    def run(pixels: Tensor) -> Tensor:
        """What comes out of the last block."""
        seen: list[Tensor] = []
        handle = host_of(model).blocks[-1].register_forward_hook(lambda _block, _args, out: seen.append(out))
        outputs(model, pixels)
        handle.remove()
        return seen[-1]

    if kind == "DPT":
        settings = {**settings, "proportional": False}

    full = run(pixels)
    with vtr.reduced(model, "tome", keep=36, proportional=kind != "DPT"):
        assert torch.equal(run(pixels), full)
    with vtr.reduced(model, "tome", **settings) as reduction:
        made = run(pixels)
        report, alone = reduction.report(), run(pixels[1:])
    prefix = report.prefix_tokens
    assert made.shape == full.shape
    torch.testing.assert_close(alone, made[1:], atol=1e-5, rtol=1e-4)
    keep = settings.get("keep", 18)
    for row, pivots in enumerate(report.assignment):
        assert len(set(pivots)) == keep
        for token, pivot in enumerate(pivots):
            assert torch.equal(made[row, prefix + token], made[row, prefix + pivot])
    assert torch.equal(run(pixels), full)


@pytest.mark.parametrize("kind", ["timm", "timm EVA02 rotary", "ViT", "DPT", "open_clip"])
@torch.no_grad()
def test_pool_averages_and_interpolates(kind):
    model, pixels = model_of(kind), images()
    full = outputs(model, pixels)
    with vtr.reduced(model, "pool", alpha=2, keep=36):
        assert all(torch.equal(got, wanted) for got, wanted in zip(outputs(model, pixels), full, strict=True))
    with vtr.reduced(model, "pool", alpha=2, grid=(3, 4)) as reduction:
        made = outputs(model, pixels)
        assert reduction.report().tokens_per_block == [36, 36, 12, 12, 12, 12]
    assert [got.shape for got in made] == [wanted.shape for wanted in full]
    with vtr.reduced(model, "pool", alpha=5, keep=17) as reduction:
        outputs(model, pixels)
        assert reduction.report().small_grid == (4, 4)


def test_pooled_cells_are_what_torch_pools():
    grid = torch.randn(2, 8, 6, 6)
    means = cell_means(grid.flatten(2).mT, (6, 6), (4, 4)).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(means, nn.functional.adaptive_avg_pool2d(grid, 4))
    assert [pooled_grid((40, 40), keep) for keep in (784, 400, 1)] == [(28, 28), (20, 20), (1, 1)]
    assert pooled_grid((24, 48), 300) == (12, 25) and pooled_grid((24, 24), 10**6) == (24, 24)


@pytest.mark.parametrize("kind", ["timm", "ViT", "CLIP", "open_clip"])
@torch.no_grad()
def test_sizes_weigh_in_the_attention(kind):
    """Merging equal tokens with proportional attention changes nothing: they count as often as they were."""
    model = model_of(kind)
    pixels = images(1, 96, 96)[..., :16, :16].repeat(1, 1, 6, 6)  # all patches alike
    places = {"timm": "pos_embed", "open_clip": "positional_embedding", "ViT": "embeddings.position_embeddings"}
    embedding = attrgetter(places.get(kind, "embeddings.position_embedding.weight"))(model)
    kept = embedding.data.clone()
    try:
        embedding.data[..., host_of(model).prefix_tokens :, :] = 0.1
        full = outputs(model, pixels)[0]
        with vtr.reduced(model, "tome", keep=9):
            torch.testing.assert_close(outputs(model, pixels)[0], full, atol=1e-4, rtol=1e-4)
        with vtr.reduced(model, "tome", keep=9, proportional=False):
            assert not torch.allclose(outputs(model, pixels)[0], full, atol=1e-3)
    finally:
        embedding.data.copy_(kept)


@torch.no_grad()
def test_the_last_merge_counts_although_it_is_inside_the_last_block():
    with vtr.reduced(model_of("timm"), "tome", keep=20) as reduction:
        model_of("timm")(images())
        report = reduction.report()
    assert report.tokens_per_block[-1] == 22 and report.retained == report.to_dict()["retained"] == 20
    assert "36 tokens, 20 at the fewest" in repr(report)
    with vtr.reduced(model_of("timm"), "pool", alpha=2, grid=(3, 4)) as reduction:
        model_of("timm")(images())
        assert reduction.report().retained == 12


@pytest.mark.parametrize("method", ["tome", "pool"])
@pytest.mark.parametrize("kind", ["timm dynamic", "ViT"])
@torch.no_grad()
def test_an_image_with_fewer_tokens_than_keep_stays_as_it_is(kind, method):
    """`keep` lies between the tokens of one image and those of another; the model's own size has 36."""
    model = timm_model("vit_tiny_patch16_224", dynamic_img_size=True).eval() if kind == "timm dynamic" else model_of(kind)
    more = {"interpolate_pos_encoding": True} if kind == "ViT" else {}

    def run(side: int) -> Tensor:
        made = model(images(1, side, side), **more)
        return made if isinstance(made, Tensor) else made.last_hidden_state

    small, own = run(64), run(96)
    with vtr.reduced(model, method, keep=49) as reduction:
        with pytest.warns(
            UserWarning, match=f"{method}: keep=49 is more than the 36 visual tokens of an image; all its tokens stay"
        ) as seen:
            assert torch.equal(run(96), own)
            assert reduction.report().retained == 36 and reduction.report().tokens_per_block == [36] * 6
            assert reduction.report().methods[0]["keep"] == 49
            assert torch.equal(run(64), small)
            assert reduction.report().retained == 16
        assert len(seen) == 1
        run(160)
        assert reduction.report().retained == 49
    with pytest.raises(ValueError, match="keep=49 is above the 36 visual tokens that an image can have with this checkpoint"):
        vtr.apply(model_of("timm"), method, keep=49)
