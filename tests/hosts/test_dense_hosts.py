"""Every plain dense host: restored at every output that is read, exact at the identity, and nothing left behind.

The models are random, six blocks wide 32, with 6 x 6 patches unless the input says otherwise.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import vtr
from tests.tiny_models import snapshot
from vtr.methods.pool import pooled_grid
from vtr.ops.clusters import cell_means

SMALL = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 96, "patch_size": 16}
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
SHARP = {"alpha": 2, "grid": (6, 6), "tau": 1e6, "neighbours": 1}
COARSE = {"alpha": 2, "grid": (4, 4)}


def timm_model(name: str, **settings) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, embed_dim=32, num_heads=4, depth=6, img_size=96, patch_size=16, **settings)


def hf_model(name: str, **settings) -> nn.Module:
    import transformers

    return getattr(transformers, name)(getattr(transformers, name.removesuffix("Model") + "Config")(**SMALL, **settings))


def clip_model() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    tower = open_clip.transformer.VisionTransformer(96, 16, 32, 6, 4, 2.0, output_dim=16, output_tokens=True)
    return tower


def depth_model(hybrid: bool) -> nn.Module:
    from transformers import DPTConfig, DPTForDepthEstimation

    settings = {"is_hybrid": True, "readout_type": "project"} if hybrid else {"is_hybrid": False}
    return DPTForDepthEstimation(DPTConfig(**SMALL, **NECK, backbone_out_indices=[1, 2, 4, 5], **settings))


def depth_anything() -> nn.Module:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    inner = Dinov2Config(**SMALL, out_indices=[2, 3, 5, 6], reshape_hidden_states=False)
    return DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=inner, **NECK, reassemble_hidden_size=32, patch_size=16))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm_model("vit_tiny_patch16_224"),
    "timm no CLS": lambda: timm_model("vit_tiny_patch16_224", class_token=False, global_pool="avg"),
    "timm DINOv2 registers": lambda: timm_model("vit_small_patch14_reg4_dinov2", init_values=0.5),
    "timm EVA02 rotary": lambda: timm_model("eva02_tiny_patch14_224"),
    "timm DINOv3 rotary": lambda: timm_model("vit_small_patch16_dinov3"),
    "timm features_only": lambda: timm_model("vit_tiny_patch16_224", features_only=True, out_indices=(1, 3, 5)),
    "open_clip": clip_model,
    "ViT": lambda: hf_model("ViTModel"),
    "DeiT": lambda: hf_model("DeiTModel"),
    "DINOv2": lambda: hf_model("Dinov2Model"),
    "DINOv2 registers": lambda: hf_model("Dinov2WithRegistersModel", num_register_tokens=4),
    "DINOv3": lambda: hf_model("DINOv3ViTModel", num_register_tokens=4),
    "CLIP": lambda: hf_model("CLIPVisionModel"),
    "SigLIP": lambda: hf_model("SiglipVisionModel"),
    "DPT": lambda: depth_model(False),
    "Depth Anything": depth_anything,
}


@cache
def model_of(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MODELS[kind]()
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.15)
    return model.eval().requires_grad_(False)


def images(count: int = 2, height: int = 96, width: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(7)).to(dtype)


def outputs(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """All tensors that a call returns."""
    made = model(pixels)
    made = list(made.values()) if isinstance(made, dict) else [made] if isinstance(made, Tensor) else list(made)
    return [value for value in made if isinstance(value, Tensor)]


everywhere = pytest.mark.parametrize("kind", MODELS)


@everywhere
@torch.no_grad()
def test_as_many_clusters_as_tokens_and_a_sharp_tau_give_the_full_model(kind):
    model, pixels = model_of(kind), images()
    full, before = outputs(model, pixels), snapshot(model)
    with vtr.reduced(model, "expedit", **SHARP):
        for got, wanted in zip(outputs(model, pixels), full, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    assert snapshot(model) == before
    assert all(torch.equal(got, wanted) for got, wanted in zip(outputs(model, pixels), full, strict=True))


@everywhere
@torch.no_grad()
def test_blocks_run_on_clusters_and_outputs_are_full_length(kind):
    model, pixels = model_of(kind), images()
    full = outputs(model, pixels)
    with vtr.reduced(model, "expedit", **COARSE) as reduction:
        short = outputs(model, pixels)
        report = reduction.report()
        alone = outputs(model, pixels[1:])
    assert report.tokens_per_block == [36, 36, 16, 16, 16, 16] and report.small_grid == (4, 4)
    for got, wanted, single in zip(short, full, alone, strict=True):
        assert got.shape == wanted.shape and got.isfinite().all()
        torch.testing.assert_close(single, got[1:], atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(got, wanted, atol=1e-3) for got, wanted in zip(short, full, strict=True))


@pytest.mark.parametrize("kind", ["ViT", "DINOv2", "DPT"])
@torch.no_grad()
def test_every_hidden_state_asked_for_is_full_length(kind):
    model, pixels = model_of(kind), images()
    full = model(pixels, output_hidden_states=True).hidden_states
    with vtr.reduced(model, "expedit", **SHARP):
        sharp = model(pixels, output_hidden_states=True).hidden_states
    with vtr.reduced(model, "expedit", **COARSE):
        coarse = model(pixels, output_hidden_states=True).hidden_states
    for i, (wanted, same, other) in enumerate(zip(full, sharp, coarse, strict=True)):
        torch.testing.assert_close(same, wanted, atol=1e-4, rtol=0)
        assert other.shape == wanted.shape and torch.equal(other, wanted) == (i <= 2)


@torch.no_grad()
def test_intermediates_are_restored_and_the_inside_stays_short():
    model, pixels = model_of("timm"), images()
    final, full = model.forward_intermediates(pixels, indices=[1, 3, 5])
    with vtr.reduced(model, "expedit", **COARSE) as reduction:
        tapped, maps = model.forward_intermediates(pixels, indices=[1, 3, 5])
        assert reduction.report().tokens_per_block == [36, 36, 16, 16, 16, 16]
        torch.testing.assert_close(tapped, model.forward_features(pixels))  # reading blocks on the way changes nothing
        early = model.forward_intermediates(pixels, indices=[3], intermediates_only=True, stop_early=True)
        torch.testing.assert_close(early[0], maps[1])
        again = model.forward_intermediates(pixels, indices=[1, 3, 5])
        assert torch.equal(again[0], tapped)
    assert torch.equal(maps[0], full[0]) and not torch.allclose(maps[1], full[1], atol=1e-3) and tapped.shape == final.shape


@torch.no_grad()
def test_inputs_may_have_other_shapes_and_batches():
    model = timm_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    with vtr.reduced(model, "expedit", alpha=1, grid=0.5) as reduction:
        for height, width, small in ((96, 96, (3, 3)), (64, 160, (2, 5)), (160, 48, (5, 2))):
            assert model.forward_features(images(3, height, width)).shape[1] == 1 + height * width // 256
            assert reduction.report().small_grid == small
    with (
        vtr.reduced(model, "expedit", alpha=1, grid=(5, 5)),
        pytest.raises(ValueError, match=r"\(5, 5\) is larger than the token grid \(4, 4\)"),
    ):
        model(images(1, 64, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_runs(dtype):
    model = timm_model("vit_tiny_patch16_224").eval().to(dtype)
    with vtr.reduced(model, "expedit", **COARSE):
        made = model.forward_features(images(dtype=dtype))
    assert made.dtype == dtype and made.isfinite().all()


@torch.no_grad()
def test_a_module_around_one_vit_is_reduced_inside():
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = model_of("timm"), nn.Linear(32, 4)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.head(self.encoder.forward_features(pixels)[:, 1:])

    model, pixels = Segmenter(), images()
    full = model(pixels)
    with vtr.reduced(model, "expedit", **COARSE) as reduction:
        assert model(pixels).shape == full.shape
        assert reduction.host.name == "timm:VisionTransformer"
    assert torch.equal(model(pixels), full)
    model.second = model_of("timm no CLS")
    with pytest.raises(vtr.VtrError, match="holds 2 models with a host"):
        vtr.apply(model, "expedit")


@torch.no_grad()
def test_a_failed_call_leaves_no_state():
    model, pixels = model_of("timm"), images()
    with vtr.reduced(model, "expedit", **COARSE):
        expected = model.forward_features(pixels)
        handle = model.blocks[4].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            model(pixels)
        handle.remove()
        assert torch.equal(model.forward_features(pixels), expected)


def test_gradients_flow_as_they_did():
    model, pixels = model_of("timm"), images().requires_grad_()
    with vtr.reduced(model, "expedit", **COARSE):
        model(pixels).sum().backward()
    assert pixels.grad is not None and pixels.grad.isfinite().all()


@torch.no_grad()
def test_a_compiled_model_gives_the_same():
    model, pixels = model_of("timm"), images()
    with vtr.reduced(model, "expedit", **{**COARSE, "tau": 0.1}):
        eager = model.forward_features(pixels)
        compiled = torch.compile(model.forward_features, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixels), eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["timm", "ViT", "DINOv2 registers"])
@pytest.mark.parametrize("settings", [{"keep": 16}, {"keep": 12, "proportional": False}, {"keep_ratio": 0.5}])
@torch.no_grad()
def test_tome_merges_and_unmerges(kind, settings):
    model, pixels = model_of(kind), images()

    def run(pixels: Tensor) -> Tensor:
        return model.forward_features(pixels) if kind == "timm" else model(pixels).last_hidden_state

    full = run(pixels)
    with vtr.reduced(model, "tome", keep=36):
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


@pytest.mark.parametrize(
    ("kind", "method", "settings", "error", "message"),
    [
        ("timm", "fastv", {"keep": 9}, vtr.VtrError, "fastv: acts at stage 'prefill', but host 'timm:VisionTransformer' has no LLM"),
        ("timm", "flowcut", {"keep": 9}, vtr.VtrError, "flowcut: .*'timm:VisionTransformer'"),
        ("timm", "expedit", {"grid": (7, 6)}, ValueError, r"grid \(7, 6\) is larger than the token grid \(6, 6\)"),
        ("timm", "expedit", {"alpha": 6}, ValueError, "alpha=6 must be below the 6 blocks"),
        ("timm", "expedit", {"reconstruct": False}, vtr.VtrError, "hands clusters to an LLM"),
        ("timm EVA02 rotary", "tome", {"keep": 20}, vtr.VtrError, "does not know how its blocks merge"),
        ("CLIP", "tome", {"keep": 20}, vtr.VtrError, "does not know how its blocks merge"),
    ],
)
def test_what_a_dense_host_cannot_do_is_refused(kind, method, settings, error, message):
    with pytest.raises(error, match=message):
        vtr.apply(model_of(kind), method, **settings)


def test_models_without_a_token_grid_are_refused():
    with pytest.raises(vtr.VtrError, match="no host for 'Sequential'"):
        vtr.apply(nn.Sequential(nn.Linear(2, 2)), "expedit")
    timm = pytest.importorskip("timm")
    with pytest.raises(vtr.VtrError, match="no host for 'ResNet'"):
        vtr.apply(timm.create_model("resnet18"), "expedit")
    model = timm_model("vit_tiny_patch16_224")
    model.patch_embed.proj = nn.Sequential(model.patch_embed.proj, nn.Flatten(2))
    with vtr.reduced(model, "expedit", alpha=1, grid=(3, 3)), pytest.raises(vtr.VtrError, match="has no token grid: its patches come as"):
        model(images())


@torch.no_grad()
def test_masks_and_dropped_patches_are_refused():
    model, pixels = model_of("timm"), images()
    with vtr.reduced(model, "expedit", **COARSE), pytest.raises(vtr.VtrError, match="attn_mask spans the full token grid"):
        model.forward_features(pixels, attn_mask=torch.zeros(1, 1, 37, 37))
    dropping = timm_model("vit_tiny_patch16_224", patch_drop_rate=0.5).train()
    with vtr.reduced(dropping, "expedit", **COARSE), pytest.raises(vtr.VtrError, match="a block should get 37 tokens"):
        dropping(pixels)


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


@pytest.mark.parametrize("kind", ["timm", "ViT"])
@torch.no_grad()
def test_sizes_weigh_in_the_attention(kind):
    """Merging equal tokens with proportional attention changes nothing: they count as often as they were."""
    model = model_of(kind)
    pixels = images(1, 96, 96)[..., :16, :16].repeat(1, 1, 6, 6)  # all patches alike
    embedding = model.pos_embed if kind == "timm" else model.embeddings.position_embeddings
    kept = embedding.data.clone()
    try:
        embedding.data[:, 1:] = 0.1
        full = outputs(model, pixels)[0]
        with vtr.reduced(model, "tome", keep=9):
            torch.testing.assert_close(outputs(model, pixels)[0], full, atol=1e-4, rtol=1e-4)
        with vtr.reduced(model, "tome", keep=9, proportional=False):
            assert not torch.allclose(outputs(model, pixels)[0], full, atol=1e-3)
    finally:
        embedding.data.copy_(kept)
