"""Keys and values by themselves are those of the whole projection, without projecting the queries."""

import pytest
import torch

from tests.tiny_models import model_of
from vtr.hosts._host import Host, host_of
from vtr.hosts._taps import project_kv, project_qkv


@pytest.mark.parametrize("kind", ["llava", "llava_qwen"])
def test_keys_and_values_alone(kind: str) -> None:
    host = host_of(model_of(kind))
    assert isinstance(host, Host)
    attention = getattr(host.layers[1], host.llm_attention)
    hidden = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    rope = host.language_model.rotary_emb(hidden, position_ids=torch.arange(7)[None])
    rows = []
    seen = attention.q_proj.register_forward_hook(lambda _module, args, _output: rows.append(args[0].shape[1]))
    try:
        _, key, value = project_qkv(attention, hidden, rope)
        alone = project_kv(attention, hidden, rope)
    finally:
        seen.remove()
    assert torch.equal(alone[0], key) and torch.equal(alone[1], value)
    assert rows == [7, 1]
    assert not attention.q_proj._forward_hooks and not attention.q_proj._forward_pre_hooks
