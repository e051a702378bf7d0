"""The unreduced model at full length, with hooks on its layers that hide, average or freeze tokens; knows nothing of a reduction."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Hidden:
    """What the layers of a model must not see.

    Args:
        keep: `(B, S)` bool, tokens that are seen from `layer` of the LLM on.
        layer: that layer; 0 hides them from the whole LLM.
        into: `(B, S)` int64, the position that each token is averaged into in front of the LLM; None = no averaging.
        frozen: layers of the LLM that leave the tokens `still (B, S)` as they are.
        patches: `(V, P)` bool, patches that are seen from layer `tower_layer` of the vision tower on; None = all.
    """

    keep: Tensor
    layer: int = 0
    into: Tensor | None = None
    frozen: tuple[int, ...] = ()
    still: Tensor | None = None
    patches: Tensor | None = None
    tower_layer: int = 0


def masked_logits(model: Any, layers: Any, tower_layers: Any, inputs: dict[str, Tensor], hidden: Hidden) -> Tensor:
    """Logits `(B, S, V)` of a model whose `layers` and `tower_layers` see only what `hidden` leaves."""
    valid = inputs["attention_mask"].bool()
    length = valid.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = torch.eye(length, dtype=torch.bool)  # no row without a key
    with ExitStack() as stack:

        def before(layer: nn.Module, hook: Any) -> None:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)

        for number, layer in enumerate(layers):
            seen = valid & hidden.keep if number >= hidden.layer else valid
            before(layer, _mask_hook((causal & seen[:, None, None]) | own))
            if number == 0 and hidden.into is not None:
                before(layer, _average_hook(hidden.into))
            if number in hidden.frozen:
                assert hidden.still is not None
                stack.callback(layer.register_forward_hook(_freeze_hook(hidden.still)).remove)
        for layer in list(tower_layers)[hidden.tower_layer :] if hidden.patches is not None else []:
            assert hidden.patches is not None
            visible = nn.functional.pad(hidden.patches, (1, 0), value=True)[:, None, None]  # the CLS token in front
            before(layer, _mask_hook(visible.expand(-1, 1, visible.shape[-1], -1)))
        places = (valid.long().cumsum(1) - 1).clamp_min(0)
        return model(**inputs, position_ids=places, use_cache=False).logits


def _mask_hook(mask: Tensor) -> Any:
    def hook(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args[:1], {**kwargs, "attention_mask": mask}  # some releases give the mask by position

    return hook


def _average_hook(into: Tensor) -> Any:
    def hook(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        index = into[..., None].expand_as(args[0])
        total = torch.zeros_like(args[0]).scatter_add(1, index, args[0])
        count = torch.zeros(into.shape).scatter_add(1, into, torch.ones(into.shape))[..., None]
        return (torch.where(count > 0, total / count.clamp_min(1), args[0]), *args[1:]), kwargs

    return hook


def _freeze_hook(still: Tensor) -> Any:
    return lambda _layer, args, output: torch.where(still[..., None], args[0], output)
