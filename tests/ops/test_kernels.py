"""Kernels give what torch gives: in Triton's interpreter on any machine, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tests.ops.kernel_checks import CHECKS
from vtr.ops import fused
from vtr.ops.bipartite import merge_tokens


@pytest.mark.slow
def test_every_kernel_agrees_with_torch_in_the_interpreter():
    """In a process of its own: Triton decides at import whether it interprets."""
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of this Triton needs numpy below 2.4: it turns arrays of one element into integers")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(Path(__file__).with_name("kernel_checks.py"))]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == [check.__name__ for check in CHECKS]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_kernel_agrees_with_torch_on_a_gpu(check):
    check("cuda")


def test_torch_runs_unless_kernels_are_asked_for():
    assert not fused.fused()
    with fused.kernels(True):
        assert fused.fused()
        with fused.kernels(False):
            assert not fused.fused()
        assert fused.fused()
    assert not fused.fused()


def test_a_merge_that_needs_a_gradient_takes_torch():
    tokens = torch.ones(1, 4, 2, requires_grad=True)
    with fused.kernels(True):
        merged, _ = merge_tokens(tokens, torch.ones(1, 4), torch.tensor([[0, 0, 2, 3]]))
    merged.sum().backward()
    assert tokens.grad is not None and tokens.grad[0, :, 0].tolist() == [0.5, 1.5, 1, 1], "what was merged away is still in its row"
