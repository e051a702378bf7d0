"""Every plain dense host: restored at every output that is read, exact at the identity, and nothing left behind."""

import pytest
import torch
from torch import Tensor, nn

import vtr
from tests.dense_models import COARSE, MODELS, SHARP, images, model_of, outputs, timm_model
from tests.tiny_models import snapshot
from vtr.hosts._protocol import host_of

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


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_gives_the_same():
    model, pixels = model_of("timm"), images()
    with vtr.reduced(model, "expedit", **{**COARSE, "tau": 0.1}):
        eager = model.forward_features(pixels)
        compiled = torch.compile(model.forward_features, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixels), eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "method", "settings", "error", "message"),
    [
        ("timm", "fastv", {"keep": 9}, vtr.VtrError, "fastv: acts at stage 'prefill', but host 'timm:VisionTransformer' has no LLM"),
        ("timm", "flowcut", {"keep": 9}, vtr.VtrError, "flowcut: gives no token back that it removes.* use 'expedit', 'tome' or"),
        ("timm", "tome", {"average_keep": 9}, ValueError, "tome: average_keep is a mean over the layers of an LLM"),
        ("timm", "pool", {"average_keep": 9}, ValueError, "pool: average_keep is a mean over the layers of an LLM"),
        ("timm", "expedit", {"grid": (7, 6)}, ValueError, r"grid \(7, 6\) is larger than the token grid \(6, 6\)"),
        ("timm", "expedit", {"alpha": 6}, ValueError, "alpha=6 must be below the 6 blocks"),
        ("timm", "expedit", {"reconstruct": False}, vtr.VtrError, "hands clusters to an LLM"),
        (
            "timm EVA02 rotary",
            "tome",
            {"keep": 20},
            vtr.VtrError,
            "tome: the rotary positions of .* need tokens that form a grid.* use 'expedit'",
        ),
        ("DINOv3", "tome", {"keep": 20}, vtr.VtrError, "tome: the rotary positions of 'dinov3_vit' need tokens that form a grid"),
        ("DPT", "tome", {"keep": 20}, vtr.VtrError, "blocks of 'dpt' take no mask for proportional attention; set proportional=False"),
    ],
)
def test_what_a_dense_host_cannot_do_is_refused(kind, method, settings, error, message):
    with pytest.raises(error, match=message):
        vtr.apply(model_of(kind), method, **settings)


def test_a_vit_takes_one_method_at_a_time():
    with pytest.raises(vtr.VtrError, match="takes one method at a time, got tome, tome; leave one"):
        vtr.apply(model_of("timm"), [vtr.create_method("tome", keep=20), vtr.create_method("tome", keep=10)])


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
@torch.no_grad()
def test_a_method_fetched_before_the_reduction_gets_restored_tokens(kind):
    model, pixels = model_of(kind), images()
    fetched = model.forward_intermediates
    with vtr.reduced(model, "expedit", **COARSE) as reduction:
        wanted, got = model.forward_intermediates(pixels), fetched(pixels)
        assert reduction.report().tokens_per_block == [36, 36, 16, 16, 16, 16]
    assert isinstance(got, type(wanted))
    pairs = zip(got.values(), wanted.values(), strict=True) if isinstance(got, dict) else ((got[0], wanted[0]), (got[1], wanted[1]))
    for a, b in pairs:
        for one, other in zip(a, b, strict=True) if isinstance(a, list) else ((a, b),):
            assert torch.equal(one, other)


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


def test_a_mask_that_hides_nothing_is_left_out():
    host, mask = host_of(model_of("ViT")), torch.ones(2, 1, 37, 37, dtype=torch.bool)
    assert host.arguments(None, (mask,), {}) == ((None,), {}) and host.arguments(None, (), {"attention_mask": mask}) == (
        (),
        {"attention_mask": None},
    )
    mask[0, 0, 0, 0] = False
    with pytest.raises(vtr.VtrError, match="spans the full token grid"):
        host.arguments(None, (mask,), {})


@torch.no_grad()
def test_masks_and_dropped_patches_are_refused():
    model, pixels = model_of("timm"), images()
    with vtr.reduced(model, "expedit", **COARSE), pytest.raises(vtr.VtrError, match="attn_mask spans the full token grid"):
        model.forward_features(pixels, attn_mask=torch.zeros(1, 1, 37, 37))
    dropping = timm_model("vit_tiny_patch16_224", patch_drop_rate=0.5).train()
    with vtr.reduced(dropping, "expedit", **COARSE), pytest.raises(vtr.VtrError, match="a block should get 37 tokens"):
        dropping(pixels)


@everywhere
@torch.no_grad()
def test_the_model_may_be_run_in_the_middle_of_a_call(kind):
    """A hook of the user's that runs the model on other images: the outer call goes on as it was, also after an exception in the inner one."""
    model, pixels = model_of(kind), images()
    block, busy = host_of(model).blocks[3], []

    def again(*_args):
        if not busy:
            busy.append(True)
            outputs(model, pixels[:1] * 2)
            try:
                model(pixels[:, :1])
            except Exception:  # whatever this library says of one channel
                pass
            busy.clear()

    with vtr.reduced(model, "expedit", **COARSE):
        expected = outputs(model, pixels)
        handle = block.register_forward_hook(again)
        try:
            found = outputs(model, pixels)
        finally:
            handle.remove()
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)
