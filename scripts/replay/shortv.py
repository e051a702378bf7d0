"""ShortV vectors: one frozen Llama layer with a decode step, and the Layer Contribution of a small stack.

The layers are those of transformers with the vector's weights; freezing is done by the hooks that `vtr.apply` installs on a real model,
seen through a host that has an LLM and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scripts.replay import ReplayError, Vector, close, same_index
from vtr.calibrate.shortv import layer_contribution, layer_order
from vtr.engine.llm.hooks import LlmHooks
from vtr.hosts._layout import Layout
from vtr.hosts._protocol import Host
from vtr.hosts._towers import RowTower, Stack, transformers_blocks
from vtr.hosts._versions import cache_keyword, output_cache
from vtr.methods.shortv import ShortV
from vtr.planning import make_plan

_WEIGHTS = (
    *("input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
)
_TEXT, _VISUAL = 0, 1


def replay(vector: Vector) -> None:
    if vector.has("hidden", "out", "w_input_layernorm_weight"):
        _layer(vector)
    elif vector.has("hidden", "logits_frozen", "layer0_input_layernorm_weight"):
        _contribution(vector)
    else:
        raise vector.unknown_schema()


def _layer(vector: Vector) -> None:
    hidden, start, visual = vector["hidden"], vector.param("image_start"), vector.param("n_visual")
    model = _Bare(vector, ["w"], final_norm=None)
    ids = _ids(hidden, start, visual)
    with _frozen(model, visual, (0,)):
        out, cache = model(ids, hidden, visual_positions=ids == _VISUAL)
        close("out", out, vector["out"])
        same_index("visual rows untouched", (out == hidden).all(-1)[:, start : start + visual], torch.ones(len(hidden), visual))
        if vector.has("key_cache"):
            close("key_cache", cache.layers[0].keys, vector["key_cache"])
            close("value_cache", cache.layers[0].values, vector["value_cache"])
        if vector.has("decode_hidden"):
            decoded, _ = model(ids[:, :1] * _TEXT, vector["decode_hidden"], cache)
            close("decode_out", decoded, vector["decode_out"])


def _contribution(vector: Vector) -> None:
    hidden, start, visual = vector["hidden"], vector.param("image_start"), vector.param("n_visual")
    count = vector.param("num_layers", vector["logits_frozen"].shape[1])
    model = _Bare(vector, [f"layer{i}" for i in range(count)], vector["norm_weight"])
    ids = _ids(hidden, start, visual)

    def logits() -> Tensor:
        return model(ids, hidden, visual_positions=ids == _VISUAL)[0][:, -1] @ vector["lm_head"].T

    full, each = logits(), []
    for layer in range(count):
        with _frozen(model, visual, (layer,)):
            each.append(logits())
    frozen = torch.stack(each, 1)  # (S, L, V)
    close("logits_full", full, vector["logits_full"])
    close("logits_frozen", frozen, vector["logits_frozen"])
    contribution = layer_contribution(full, frozen)
    close("lc_per_sample", contribution, vector["lc_per_sample"])
    close("lc", contribution.mean(0), vector["lc"])
    same_index("order", layer_order(contribution), vector["order"])
    same_index(
        "order from the vector's logits", layer_order(layer_contribution(vector["logits_full"], vector["logits_frozen"])), vector["order"]
    )


class _Bare(nn.Module):
    """An LLM without tower and embeddings: ids only say which positions are visual."""

    def __init__(self, vector: Vector, prefixes: Sequence[str], final_norm: Tensor | None) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        heads = vector.param("num_heads")
        hidden, middle = vector["hidden"].shape[-1], vector[f"{prefixes[0]}_mlp_gate_proj_weight"].shape[0]
        if vector.param("act", "silu") != "silu":
            raise ReplayError(f"shortv: activation {vector.param('act')!r} is not that of a Llama layer")
        config = LlamaConfig(
            vocab_size=2,
            hidden_size=hidden,
            intermediate_size=middle,
            num_hidden_layers=len(prefixes),
            num_attention_heads=heads,
            num_key_value_heads=vector.param("num_kv_heads", heads),
            rms_norm_eps=vector.param("rms_eps"),
            bos_token_id=None,
            eos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": vector.param("rope_theta")},
        )
        self.config, self.language_model = config, LlamaModel(config).eval()
        for layer, prefix in zip(self.language_model.layers, prefixes, strict=True):
            weights = {f"{name}.weight": vector[f"{prefix}_{name.replace('.', '_')}_weight"] for name in _WEIGHTS}
            layer.load_state_dict(weights)
        if final_norm is None:
            self.language_model.norm = nn.Identity()
        else:
            self.language_model.norm.load_state_dict({"weight": final_norm})

    def forward(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor,
        cache: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        visual_positions: Any = None,
    ) -> tuple[Tensor, Any]:
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{cache_keyword(): cache},
        )
        return out.last_hidden_state, output_cache(out)


@contextmanager
def _frozen(model: _Bare, visual: int, layers: tuple[int, ...]) -> Iterator[None]:
    """Freezes the visual tokens in `layers` for the block."""
    llm, grid = model.language_model, (1, visual)
    layout = Layout((grid,), torch.arange(visual), torch.full((visual,), -1))
    blocks = transformers_blocks(llm, llm.layers, ("input_layernorm", "post_attention_layernorm"))
    facts: dict[str, Any] = dict(embeddings=None, prefix_tokens=0, has_cls=False, patch_grid=grid, patch_size=1, feature_layers=(0,))
    host = Host(
        name="replay",
        model=model,
        base=model,
        projector=llm,
        language=Stack(**blocks),
        tower=RowTower(**blocks, **facts),
        placeholder_ids={"image": _VISUAL},
        most_tokens=visual,
        layouts=lambda _kind, _arguments: [layout],
        default_layout=layout,
    )
    hooks = LlmHooks(host, make_plan(host, ShortV(layers=layers)), lambda call: None)
    undo: list = []
    hooks.install(undo)
    try:
        yield
    finally:
        for remove in undo:
            remove()
        hooks.clear()


def _ids(hidden: Tensor, start: int, visual: int) -> Tensor:
    ids = torch.full(hidden.shape[:2], _TEXT)
    ids[:, start : start + visual] = _VISUAL
    return ids
