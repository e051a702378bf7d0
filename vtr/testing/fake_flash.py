"""A stand-in for the flash-attention kernels in plain torch, to run the code paths of FlashAttention-2 without a GPU.

Same call contract: variable lengths by cumulative counts, causal masks aligned to the bottom right. Use `flash_attention(model)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CALLS = {"dense": 0, "varlen": 0}
_FIELDS = (
    "_flash_fn _flash_varlen_fn _flash_with_kvcache_fn _pad_fn _unpad_fn _process_flash_kwargs_fn _process_with_kvcache_kwargs_fn "
    "_loaded_implementation"
).split()


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """One sequence: `(T, H, d)`."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if causal:
        rows, columns = len(query), len(key)
        seen = torch.arange(columns) <= torch.arange(rows)[:, None] + columns - rows
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float = 1.0, causal: bool = False, **_unused: Any) -> Tensor:
    """Batch of equally long sequences `(B, T, H, d)`."""
    CALLS["dense"] += 1
    return torch.stack([_attend(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Sequences of any length, one behind the other `(T, H, d)`."""
    CALLS["varlen"] += 1
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert queries[0] == 0 and queries[-1] == len(q) and keys[-1] == len(k)
    spans = zip(queries, queries[1:], keys, keys[1:], strict=False)
    return torch.cat([_attend(q[a:b], k[c:d], v[c:d], softmax_scale, causal) for a, b, c, d in spans])


@contextmanager
def flash_attention(model: nn.Module) -> Iterator[dict[str, int]]:
    """Inside, `model` runs transformers' FlashAttention-2 code on the stand-in kernels; yields the call counts."""
    import transformers.modeling_flash_attention_utils as flash_utils

    utils: Any = flash_utils
    saved = {name: getattr(utils, name) for name in _FIELDS if hasattr(utils, name)}  # 5.17 knows fewer
    configs: dict[int, Any] = {
        id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if hasattr(c, "_attn_implementation_internal")
    }
    implementations = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        replacements = {
            "_flash_fn": flash_attn_func,
            "_flash_varlen_fn": flash_attn_varlen_func,
            "_flash_with_kvcache_fn": None,
            "_pad_fn": utils._pad_input,
            "_unpad_fn": utils._unpad_input,
            "_process_flash_kwargs_fn": utils._lazy_define_process_function(flash_attn_varlen_func),
            "_process_with_kvcache_kwargs_fn": dict,
            "_loaded_implementation": "flash_attention_2",
        }
        for name in saved:
            setattr(utils, name, replacements[name])
        for config in configs.values():
            config._attn_implementation_internal = "flash_attention_2"
        CALLS.update(dense=0, varlen=0)
        yield CALLS
    finally:
        for name, value in saved.items():
            setattr(utils, name, value)
        for key, config in configs.items():
            config._attn_implementation_internal = implementations[key]
