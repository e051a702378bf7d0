"""Labels of a prompt whose tokens were removed."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100
"""Label that transformers' losses skip."""


def gathered_labels(labels: Tensor, column: Tensor, valid: Tensor, fill: int = IGNORE) -> Tensor:
    """Returns labels `(B, S)` of a prompt at the tokens that are left `(B, S')`, `fill` where nothing can predict them.

    Args:
        labels: one per original column.
        column: `(B, S')` int64, original column of every token left.
        valid: `(B, S')` bool.
    """
    column, valid = column.to(labels.device), valid.to(labels.device)
    begun = valid & (valid.cumsum(1) > 1)  # nothing real predicts the first token of a row
    return torch.where(begun, labels.expand(len(column), -1).gather(1, column), fill)
