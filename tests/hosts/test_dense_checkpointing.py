"""Gradient checkpointing on ViTs without an LLM: the gradients of the reduced model, or a refusal before anything is computed with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

import vtr
from tests import windowed_models
from tests.dense_models import MODELS, images
from tests.marks import quick_first
from vtr.hosts._protocol import host_of

REFUSED = r"gradient checkpointing runs layers twice.* switch it off"
COARSE = {"alpha": 2, "grid": (4, 4), "tau": 0.1, "neighbours": 4}
PLANS = {"expedit": COARSE, "tome": {"keep": 20}, "pool": {"alpha": 2, "grid": (4, 4)}}
WINDOWS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm Swin": (windowed_models.timm_swin, 5),
    "Swin": (windowed_models.hf_swin, 5),
    "Mask2Former": (windowed_models.mask2former, 5),
    "timm SAM": (windowed_models.timm_sam, 2),
    "SAM": (lambda: windowed_models.hf_sam("SamVisionModel"), 2),
}
INSIDE_LAYERS = "__call__" not in vars(GradientCheckpointingLayer)
"""transformers since 5.23 calls the checkpoint inside a layer, which gets tokens that are reduced already."""
ROTARY = ("DINOv3", "timm EVA02 rotary")
PLAIN = ("timm", "open_clip", "ViT", "DINOv2", "CLIP", *ROTARY)


def switched_on(model: nn.Module, reentrant: bool) -> None:
    """Checkpointing as the library of the model switches it on."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    else:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # renamed after 5.17
        enable({"use_reentrant": reentrant})


def plain(kind: str) -> nn.Module:
    return trained(MODELS[kind])


def trained(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = build()
    return model.train().requires_grad_(True)


def output(model: nn.Module, pixels: Tensor) -> Tensor:
    made = model(pixels)
    if isinstance(made, dict):
        made = next(iter(value for value in made.values() if isinstance(value, Tensor)))
    return made[0] if isinstance(made, (tuple, list)) else made


def gradient(model: nn.Module, pixels: Tensor, call: Callable[[nn.Module, Tensor], Tensor], method: str, settings: dict) -> Tensor:
    """The gradient at the pixels; the reduction is removed before backward, as in `with vtr.reduced(...): loss = ...`."""
    pixels = pixels.clone().requires_grad_()
    with vtr.reduced(model, method, **settings):
        loss = call(model, pixels).float().square().mean()
    loss.backward()
    assert pixels.grad is not None
    return pixels.grad


@contextmanager
def refused() -> Iterator[None]:
    with pytest.raises(vtr.VtrError, match=REFUSED):
        yield


@pytest.mark.parametrize("reentrant", quick_first([False, True]), ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize(("kind", "method"), [(k, m) for k in PLAIN for m in PLANS if m != "tome" or k not in ROTARY])
def test_gradients_are_those_without_checkpointing_or_it_is_refused(kind, method, reentrant):
    model, pixels = plain(kind), images()
    if method == "tome" and host_of(model).merge_point is None:  # transformers 5.17 lays the block of DINOv2 out in an older way
        with pytest.raises(vtr.VtrError, match="does not know how its blocks merge"):
            vtr.apply(model, method, **PLANS[method])
        return
    wanted = gradient(model, pixels, output, method, PLANS[method])
    switched_on(model, reentrant)
    if hasattr(model, "config") and INSIDE_LAYERS and method != "tome":
        torch.testing.assert_close(gradient(model, pixels, output, method, PLANS[method]), wanted)
    else:
        with refused():
            gradient(model, pixels, output, method, PLANS[method])


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("name", WINDOWS)
def test_attention_windows_are_refused(name, reentrant):
    model = trained(WINDOWS[name][0])
    settings = {**COARSE, "alpha": WINDOWS[name][1], "grid": (3, 3)}
    pixels = torch.randn(1, 3, 128, 128)
    gradient(model, pixels, output, "expedit", settings)
    switched_on(model.model.pixel_level_module.encoder if name == "Mask2Former" else model, reentrant)
    with refused():
        gradient(model, pixels, output, "expedit", settings)


def around_a_call_of_one_block(model: nn.Module, pixels: Tensor, reentrant: bool) -> Tensor:
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
    for i, block in enumerate(model.blocks):
        x = checkpoint(block, x, use_reentrant=reentrant) if i == 4 else block(x)
    return model.norm(x)


def around_the_model(model: nn.Module, pixels: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(model, pixels, use_reentrant=reentrant)


def around_the_features(model: nn.Module, pixels: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(model.forward_features, pixels, use_reentrant=reentrant)


def around_a_larger_model(model: nn.Module, pixels: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(lambda x: model(x) * 2, pixels, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("method", PLANS)
@pytest.mark.parametrize("call", [around_a_call_of_one_block, around_the_model, around_the_features, around_a_larger_model])
def test_checkpoints_of_the_user_are_refused(call, method, reentrant):
    model = plain("timm")
    with refused():
        gradient(model, images(), lambda model, pixels: call(model, pixels, reentrant), method, PLANS[method])


class Recomputed(torch.autograd.Function):
    """Checkpointing that torch does not know of, as other libraries have it."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            made = ctx.function(x)
        torch.autograd.backward(made, gradient)
        return None, x.grad


class Around(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return Recomputed.apply(self.block, x)


@pytest.mark.parametrize("inside", [False, True], ids=["around the block", "inside"])
def test_checkpoints_of_other_libraries_are_refused_in_backward(inside):
    model, pixels = plain("timm"), images().requires_grad_()
    block = model.blocks[4]
    forward = block.forward
    with vtr.reduced(model, "tome", keep=20):
        if inside:
            block.forward = lambda x, **rest: Recomputed.apply(lambda y: forward(y, **rest), x)
        else:
            model.blocks[4] = Around(block)
        loss = output(model, pixels).sum()
        with refused():
            loss.backward()
    output(model, pixels).sum().backward()
    assert pixels.grad.isfinite().all()


def test_checkpoints_of_other_libraries_are_refused_where_blocks_are_read():
    model, pixels = plain("timm"), images().requires_grad_()
    with vtr.reduced(model, "tome", keep=20):
        model.blocks[4] = Around(model.blocks[4])
        with refused():
            model.forward_intermediates(pixels, indices=[4])


@pytest.mark.parametrize("kind", ["timm", "ViT", "open_clip"])
def test_it_may_be_on_where_no_gradients_are_wanted(kind):
    model, pixels = plain(kind), images()
    if kind != "ViT":
        model.eval()
    with torch.no_grad():
        with vtr.reduced(model, "tome", keep=20):
            wanted = output(model, pixels)
        switched_on(model, False)
        with vtr.reduced(model, "tome", keep=20):
            assert torch.equal(output(model, pixels), wanted)
    model.eval()
    if kind == "ViT":  # transformers checkpoints in training alone
        with vtr.reduced(model, "tome", keep=20):
            output(model, pixels).sum().backward()


def test_it_is_noticed_when_switched_on_after_the_reduction():
    model, pixels = plain("timm"), images()
    with vtr.reduced(model, "expedit", **COARSE):
        output(model, pixels).sum().backward()
        switched_on(model, False)
        with refused():
            output(model, pixels)
        model.set_grad_checkpointing(False)
        output(model, pixels).sum().backward()


@pytest.mark.parametrize("method", PLANS)
def test_gradients_are_the_slopes_of_the_reduced_model(method):
    model, pixels = plain("timm").double(), images().double()
    kept = {**PLANS[method], "neighbours": 1} if method == "expedit" else PLANS[method]
    step = torch.randn(pixels.shape, dtype=pixels.dtype, generator=torch.Generator().manual_seed(5))
    slope = (gradient(model, pixels, output, method, kept) * step).sum()

    def loss(at: float) -> Tensor:
        with torch.no_grad(), vtr.reduced(model, method, **kept):
            return output(model, pixels + at * step).float().square().mean()

    torch.testing.assert_close((loss(1e-3) - loss(-1e-3)) / 2e-3, slope.float(), rtol=1e-2, atol=1e-4)
