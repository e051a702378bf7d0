"""Cost of reduced dense ViTs: multiply-adds as torch counts them, and a table of what was timed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtr
from scripts.pages import dense_cost as dense

VARIANTS = [
    ("full", {}),
    ("expedit", {"alpha": 2, "grid": (5, 4), "tau": 0.1, "iterations": 3}),
    ("expedit", {"alpha": 1, "grid": (4, 4)}),
    ("tome", {"keep": 20}),
    ("tome", {"keep_ratio": 0.5}),
    ("tome", {}),
    ("tome", {"keep": 36}),
    ("pool", {"alpha": 2, "grid": (4, 3)}),
]


@pytest.fixture(scope="module")
def built():
    shape = dense.SHAPES["tiny"]
    model, pixels = dense.build(shape)
    for block in model.blocks:
        block.attn.fused_attn = False  # torch has no formula for every fused kernel
    return model, pixels


@pytest.mark.parametrize("variant", [*VARIANTS[:2], *(pytest.param(one, marks=pytest.mark.slow) for one in VARIANTS[2:])], ids=dense.label)
def test_multiply_adds_are_what_torch_counts(built, variant):
    model, pixels = built
    name, settings = variant
    with torch.no_grad():
        if name == "full":
            with FlopCounterMode(display=False) as counter:
                model(pixels)
            report = None
        else:
            with vtr.reduced(model, name, **settings) as reduction, FlopCounterMode(display=False) as counter:
                model(pixels)
            report = reduction.report()
    assert dense.flops(model, pixels, report) == counter.get_total_flops() / 2


def test_every_variant_is_timed_beside_the_full_model(built):
    model, pixels = built
    costs = dense.measure(model, pixels, VARIANTS[2:4], repeats=1)
    assert [cost.variant[0] for cost in costs] == ["full", "expedit", "tome"]
    full, expedit, tome = costs
    assert full.tokens == [] and expedit.tokens == [36, 16, 16, 16] and tome.tokens[0] == 36 > tome.tokens[-1] >= 20
    assert expedit.gflops < full.gflops and 0 < expedit.choosing_ms < expedit.ms and full.choosing_ms == 0
    assert all(cost.peak_bytes > 0 and cost.images_per_s > 0 for cost in costs)
    table = dense.markdown("tiny", costs, pixels.device, pixels.dtype)
    assert "| expedit alpha=1 grid=4x4 |" in table and len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_shown_clusters_are_the_nearest_of_all_tokens(built):
    model, pixels = built
    assert dense.cluster_labels(model, pixels, 2, (1, 1)).tolist() == [[0] * 36]
    labels = dense.cluster_labels(model, pixels, 2, (3, 3))
    assert labels.shape == (1, 36) and 1 < len(labels.unique()) <= 9 and int(labels.max()) < 9
    assert not any(block._forward_pre_hooks for block in model.blocks)
