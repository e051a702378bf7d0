"""Layer Contribution against torch's own KL divergence."""

import pytest
import torch
from torch.nn import functional as F

from vtr.calibrate.shortv import layer_contribution, layer_order


def test_it_is_the_kl_divergence_in_the_asked_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    full, frozen = torch.randn(3, 50, generator=generator), torch.randn(3, 4, 50, generator=generator)
    contribution = layer_contribution(full, frozen)
    other = layer_contribution(full, frozen, "full||frozen")
    for s in range(3):
        for layer in range(4):
            ordinary, changed = full[s].log_softmax(-1), frozen[s, layer].log_softmax(-1)
            torch.testing.assert_close(contribution[s, layer], F.kl_div(ordinary, changed, reduction="sum", log_target=True))
            torch.testing.assert_close(other[s, layer], F.kl_div(changed, ordinary, reduction="sum", log_target=True))


def test_no_change_is_zero_and_half_precision_is_computed_in_float32() -> None:
    full = torch.randn(2, 30).half()
    contribution = layer_contribution(full, full[:, None].expand(2, 3, 30))
    assert contribution.dtype == torch.float32 and contribution.abs().max() < 1e-6


def test_order_rises_by_mean_and_ties_go_to_the_lowest_layer() -> None:
    assert layer_order(torch.tensor([[3.0, 0.0, 1.0, 1.0], [3.0, 0.0, 1.0, 1.0]])).tolist() == [1, 2, 3, 0]


def test_shapes_and_directions_are_checked() -> None:
    with pytest.raises(ValueError, match=r"needs full \(S, V\) and frozen \(S, L, V\)"):
        layer_contribution(torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="direction must be"):
        layer_contribution(torch.zeros(2, 5), torch.zeros(2, 3, 5), "both")  # type: ignore[arg-type]
