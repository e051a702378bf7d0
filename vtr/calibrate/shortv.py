"""ShortV's Layer Contribution: how much the answer changes when visual tokens are frozen in one layer.

Paper: arXiv 2504.00502; code read: github.com/icip-cas/ShortV at 737c28c. The code's KL(frozen || full) made the published lists; the paper
writes the other direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from vtr.reduction import reduced
from vtr.types.errors import WrongValue

Direction = Literal["frozen||full", "full||frozen"]


def layer_contribution(full: Tensor, frozen: Tensor, direction: Direction = "frozen||full") -> Tensor:
    """Returns the KL divergence between the answers with and without one frozen layer.

    Args:
        full: logits at the last prompt position `(S, V)` of each sample, any float dtype; computed in float32 at least.
        frozen: `(S, L, V)`, the same with layer l frozen.
        direction: which of the two distributions the expectation is over.

    Returns:
        `(S, L)`, at least 0 up to rounding; 0 where freezing changed nothing.

    Raises:
        ValueError: shapes that do not belong together, or an unknown direction.
    """
    if full.ndim != 2 or frozen.ndim != 3 or frozen.shape[::2] != full.shape:
        raise WrongValue(f"layer_contribution: needs full (S, V) and frozen (S, L, V), got {tuple(full.shape)} and {tuple(frozen.shape)}")
    if direction not in ("frozen||full", "full||frozen"):
        raise WrongValue(f"layer_contribution: direction must be 'frozen||full' or 'full||frozen', got {direction!r}")
    ordinary = (full if full.dtype.itemsize > 4 else full.float()).log_softmax(-1)[:, None]
    changed = (frozen if frozen.dtype.itemsize > 4 else frozen.float()).log_softmax(-1)
    over, against = (changed, ordinary) if direction == "frozen||full" else (ordinary, changed)
    return (over.exp() * (over - against)).sum(-1)


def layer_order(contribution: Tensor) -> Tensor:
    """Returns layers by rising mean contribution: `(S, L)` -> `(L,)` int64. Ties: lowest layer. The first N are the ones to freeze."""
    return contribution.mean(0).argsort(stable=True)


@torch.no_grad()
def measure(model: Any, prompts: Iterable[Mapping[str, Any]], advance: Callable[[int], None] = lambda count: None) -> Tensor:
    """Returns the layer contributions of a model, by one forward without and one with each layer frozen per prompt.

    Args:
        model: with a host; in eval mode.
        prompts: model inputs, each ending at the answer's turn and with at least one image.
        advance: called with 1 after every prompt.

    Returns:
        `(S, L)` float32. The last layer's is 0: nothing that it does to visual rows reaches the answer.

    Raises:
        ValueError: no prompt.
    """
    rows = []
    depth = model.config.get_text_config().num_hidden_layers
    for inputs in prompts:
        full = model(**inputs, use_cache=False).logits[:, -1]
        frozen = []
        for layer in range(depth):
            with reduced(model, "shortv", layers=(layer,)):
                frozen.append(model(**inputs, use_cache=False).logits[:, -1])
        rows.append(layer_contribution(full, torch.stack(frozen, 1)).cpu())
        advance(1)
    if not rows:
        raise WrongValue("measure: needs at least one prompt, got none; give samples with images")
    return torch.cat(rows)
