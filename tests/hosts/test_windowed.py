"""What every host with attention windows must keep, on tiny models of the real classes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import vtr
from tests import windowed_models as models
from tests import windowed_reference as reference
from tests.marks import slow
from vtr.types import VtrError

SHARP = 1e5
SETTINGS: dict[str, Any] = {"grid": (3, 3), "tau": 0.02, "neighbours": 4}


class Case(NamedTuple):
    """A model, how it is called, and an alpha: for Swin in its third stage."""

    build: Callable[..., Any]
    call: Callable[[Any, Tensor], Tensor]
    alpha: int
    full: list[int]
    short: list[int]


SWIN_FULL = [1024, 1024, 256, 256, 64, 64, 64, 64, 64, 64, 16, 16]
SWIN_SHORT = [1024, 1024, 256, 256, 64, 36, 36, 36, 36, 36, 16, 16]
SAM_FULL, SAM_SHORT = [256] * 6, [256, 256, 144, 144, 144, 144]
CASES = {
    "timm_swin": Case(models.timm_swin, lambda model, x: model(x), 5, SWIN_FULL, SWIN_SHORT),
    "hf_swin": Case(models.hf_swin, lambda model, x: model(x).last_hidden_state, 5, SWIN_FULL, SWIN_SHORT),
    "mask2former": Case(models.mask2former, lambda model, x: model(x).masks_queries_logits, 5, SWIN_FULL, SWIN_SHORT),
    "timm_sam": Case(models.timm_sam, lambda model, x: model.forward_features(x), 2, SAM_FULL, SAM_SHORT),
    "hf_sam": Case(models.hf_sam, lambda model, x: model.get_image_embeddings(x), 2, SAM_FULL, SAM_SHORT),
}
EVERY = pytest.mark.parametrize("name", list(CASES))


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def run(name: str, model: Any, x: Tensor, **settings: Any) -> tuple[Tensor, list[int]]:
    case = CASES[name]
    with vtr.reduced(model, "expedit", alpha=case.alpha, **{**SETTINGS, **settings}) as reduction:
        return case.call(model, x), reduction.report().tokens_per_block


def state_of(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module by identity, and how many hooks it has."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        kept = {**own, **module._parameters, **module._buffers}
        found[name] = (
            {key: value if isinstance(value, (int, tuple)) else id(value) for key, value in kept.items()},
            [len(getattr(module, hook, ())) for hook in hooks],
        )
    return found


@EVERY
def test_a_cluster_per_token_equals_the_full_model(name: str) -> None:
    model, x = CASES[name].build(), pixels(2, 3, 128, 128)
    full = CASES[name].call(model, x)
    same, counts = run(name, model, x, grid=(4, 4), tau=SHARP)
    assert (same - full).abs().max() < 1e-4
    assert counts == CASES[name].full
    short, counts = run(name, model, x)
    assert (short - full).abs().max() > 1e-2 * full.std()
    assert counts == CASES[name].short


@EVERY
def test_removal_restores_outputs_attributes_and_hooks_also_after_an_exception(name: str) -> None:
    case = CASES[name]
    model, x = case.build(), pixels(1, 3, 128, 128)
    full, before = case.call(model, x), None  # transformers adds hooks of its own at the first call
    before = state_of(model)
    with vtr.reduced(model, "expedit", alpha=case.alpha, **SETTINGS) as reduction:
        good = case.call(model, x)
        assert state_of(model) != before
        broken = reduction.host.blocks[case.alpha + 1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            case.call(model, x)
        broken.remove()
        assert torch.equal(case.call(model, x), good)
    assert state_of(model) == before
    assert torch.equal(case.call(model, x), full)


@EVERY
def test_a_batch_equals_single_images_in_any_company(name: str) -> None:
    model, x = CASES[name].build(), pixels(3, 3, 128, 128)
    together, _ = run(name, model, x, tau="auto")
    alone = torch.cat([run(name, model, image, tau="auto")[0] for image in x.split(1)])
    assert (together - alone).abs().max() < 1e-4 * together.abs().max().clamp_min(1)


@EVERY
def test_bf16_runs_close_to_float32(name: str) -> None:
    model, x = CASES[name].build(), pixels(1, 3, 128, 128)
    exact, _ = run(name, model, x)
    rounded, counts = run(name, model.bfloat16(), x.bfloat16())
    assert counts == CASES[name].short
    assert rounded.isfinite().all()
    assert (rounded.float() - exact).norm() < 0.25 * exact.norm()


@pytest.mark.parametrize("name", ["timm_swin", "hf_swin", "timm_sam", "hf_sam"])
def test_it_equals_a_second_model_whose_windows_are_small(name: str) -> None:
    case, x = CASES[name], pixels(2, 3, 128, 128)
    model = case.build()
    expected = getattr(reference, name)(model, x, case.alpha, 3, SETTINGS["tau"], SETTINGS["neighbours"])
    got, _ = run(name, model, x)
    assert (got - (expected[-1] if isinstance(expected, list) else expected)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["timm_swin", "hf_swin", "timm_sam"])
def test_inputs_that_are_not_square_and_need_padding(name: str) -> None:
    case, x = CASES[name], pixels(2, 3, 128, 160 if "swin" in name else 104)
    model = case.build(**({"img_size": (128, 160)} if name == "timm_swin" else {}))
    expected = getattr(reference, name)(model, x, case.alpha, 3, SETTINGS["tau"], SETTINGS["neighbours"])
    got, counts = run(name, model, x)
    assert counts[case.alpha] == (54 if "swin" in name else 144)  # 8 x 10 and 16 x 13 tokens in 2 x 3 and 4 x 4 windows
    assert (got - (expected[-1] if isinstance(expected, list) else expected)).abs().max() < 1e-4


def test_two_threads_do_not_disturb_each_other() -> None:
    model, images = models.timm_swin(), [pixels(1, 3, 128, 128), pixels(2, 3, 128, 128)]
    with vtr.reduced(model, "expedit", alpha=5, **SETTINGS):
        expected, got = [model(x) for x in images], [None, None]

        def work(i: int) -> None:
            for _ in range(5):
                got[i] = model(images[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


SHALLOW = {
    "timm_swin": {"depths": (1, 1, 2, 1)},
    "hf_swin": {"depths": [1, 1, 2, 1]},
    "timm_sam": {"depth": 3, "global_attn_indexes": [1]},
    "hf_sam": {"num_hidden_layers": 3, "global_attn_indexes": [1]},
}


@pytest.mark.parametrize("name", [slow(name) for name in SHALLOW])
def test_it_compiles_to_one_graph(name: str) -> None:
    x, model = pixels(1, 3, 128, 128), CASES[name].build(**SHALLOW[name])
    model = model.vision_encoder if name == "hf_sam" else model
    call = (lambda m: m(x).last_hidden_state) if name.startswith("hf") else (lambda m: m(x))
    torch._dynamo.reset()
    with vtr.reduced(model, "expedit", alpha=3 if "swin" in name else 1, **SETTINGS):
        eager = call(model)
        assert (call(torch.compile(model, backend="eager", fullgraph=True)) - eager).abs().max() < 1e-4
    torch._dynamo.reset()


@EVERY
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": (5, 5)}, r"grid \(5, 5\) is larger than"),
        ({"grid": (3, 2)}, "grid must be square"),
        ({"window": 4}, "window must be odd"),
        ({"alpha": 40}, "alpha=40 must be"),
    ],
)
def test_settings_that_do_not_fit_the_windows(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtr.apply(CASES[name].build(), "expedit", **{"alpha": CASES[name].alpha, **settings})


@pytest.mark.parametrize("name", ["timm_swin", "hf_sam"])
def test_pooling_by_window_is_a_baseline(name: str) -> None:
    case, x = CASES[name], pixels(1, 3, 128, 128)
    model = case.build()
    full = case.call(model, x)
    with vtr.reduced(model, "pool", alpha=case.alpha, grid=(4, 4)):
        assert (case.call(model, x) - full).abs().max() < 1e-4
    with vtr.reduced(model, "pool", alpha=case.alpha, grid=(3, 3)) as reduction:
        assert (case.call(model, x) - full).abs().max() > 1e-2 * full.std()
    assert reduction.report().tokens_per_block == case.short
    with pytest.raises(ValueError, match=r"grid \(5, 5\) is larger"):
        vtr.apply(model, "pool", alpha=case.alpha, grid=(5, 5))
    with pytest.raises(VtrError, match=r"pool: .* got a count of tokens; use 'pool' with grid=\(k, k\), or 'expedit'"):
        vtr.apply(model, "pool", alpha=case.alpha, keep=9)


def test_merging_inside_blocks_is_refused() -> None:
    with pytest.raises(VtrError, match="tome"):
        vtr.apply(models.timm_swin(), "tome", keep=8)
