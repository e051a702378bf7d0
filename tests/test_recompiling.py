"""Code compiled without a reduction must not outlive its coming, nor code compiled under it its going; of a LLaVA see test_compile.py."""

import time

import pytest
import torch

import vtr
from tests import dense_models
from vtr.engine.compiled import forget_compiled

frames = pytest.importorskip("torch._dynamo.convert_frame")
EXPEDIT = {**dense_models.COARSE, "tau": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm", "ViT", "open_clip"])
@torch.no_grad()
def test_a_vit_compiled_before_is_reduced_and_whole_again_after(kind):
    model, pixels = dense_models.model_of(kind), dense_models.images()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    full = dense_models.outputs(compiled, pixels)
    with vtr.reduced(model, "expedit", **EXPEDIT):
        wanted, got = dense_models.outputs(model, pixels), dense_models.outputs(compiled, pixels)
    after = dense_models.outputs(compiled, pixels)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(got, full, strict=True)), "the full model's"
    for a, b in (*zip(got, wanted, strict=True), *zip(after, full, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


def test_only_compiled_code_is_dropped(monkeypatch):
    """Nothing compiled: nothing to do. A second `remove()` is not another going."""
    calls = []
    torch.compiler.reset()
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append(time.perf_counter()))
    forget_compiled()
    reduction = vtr.apply(dense_models.model_of("timm"), "expedit", **EXPEDIT)
    assert not calls
    torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.zeros(1, 2))
    reduction.remove()
    assert len(calls) == 1
    reduction.remove()
    assert len(calls) == 1
