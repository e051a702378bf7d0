"""The pieces of a LLaMA layer that reference vectors need: RMSNorm, projection into heads, rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns `hidden (..., D)` divided by its root mean square, times `weight (D,)`."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * weight


def project(hidden: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, heads: int) -> Tensor:
    """Returns `(B, S, heads, d)` of the normed `hidden (B, S, D)`; `weight` in torch's Linear layout."""
    return (rms_norm(hidden, norm_weight, eps) @ weight.T).unflatten(-1, (heads, -1))


def rope(states: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Returns the rotary embedding, half-rotation layout, of `states (B, S, H, d)` at `positions (B, S)`."""
    half = states.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = (positions[..., None].float() * frequency)[:, :, None]  # (B, S, 1, half)
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
