"""Keys and values by themselves are those of the whole projection, without projecting the queries."""

import gc
import threading

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import vtr
from tests.probes import ByAttention, Observe
from tests.tiny_models import ONE, batch_of, build, model_of, snapshot
from vtr.hosts._protocol import Host, host_of
from vtr.hosts._taps import TAPS, project_kv, project_qkv


@pytest.mark.parametrize("kind", ["llava", "llava_qwen"])
def test_keys_and_values_alone(kind: str) -> None:
    host = host_of(model_of(kind))
    assert isinstance(host, Host)
    attention = host.language.attention(host.language.blocks[1])
    hidden = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    rope = host.language.module.rotary_emb(hidden, position_ids=torch.arange(7)[None])
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


# -- the registry of attention functions, shared by every model of the process


class Logged(LlamaAttention):
    """The same forward in a class whose file has no `eager_attention_forward`."""


class Asking(LlamaAttention):
    """Asks the registry as older code does, and passes everything by name."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        out, weights = functions[self.config._attn_implementation](
            module=self, query=query, key=key, value=value, attention_mask=attention_mask, scaling=self.scaling, dropout=0.0
        )
        return self.o_proj(out.flatten(2)), weights


class Alone(LlamaAttention):
    """Computes attention itself."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        return self.o_proj(self.q_proj(hidden_states)), None


def with_attention(kind: type, attention: str = "sdpa"):
    model = build("llava", attention=attention)
    for layer in model.model.language_model.layers:
        layer.self_attn.__class__ = kind
    return model


BATCH = batch_of("llava", ONE)


@pytest.fixture
def registry():
    """The registry, which must be what it was at the end."""
    before = type(functions), dict(functions._local_mapping), dict(functions._global_mapping)
    yield functions
    assert (type(functions), functions._local_mapping, functions._global_mapping) == before


def retained(model) -> list[int]:
    with torch.no_grad(), vtr.reduced(model, "fastv", keep=9) as reduction:
        model(**BATCH.inputs, use_cache=False)
    return list(reduction.report().images[0].retained)


@pytest.mark.parametrize(("kind", "attention"), [(Logged, "eager"), (Logged, "sdpa"), (Asking, "sdpa")])
def test_attention_classes_of_the_user_are_read(registry, kind, attention):
    assert retained(with_attention(kind, attention)) == retained(build("llava"))


def test_functions_of_the_user_are_read_whenever_they_are_set(registry):
    wanted = retained(build("llava"))
    AttentionMaskInterface.register("mine", sdpa_mask)
    try:
        registry["mine"] = sdpa_attention_forward
        model = build("llava", attention="mine")
        assert retained(model) == wanted
        with torch.no_grad(), vtr.reduced(model, "fastv", keep=9) as reduction:
            registry["mine"] = lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs)  # after the taps, and kept behind them
            model(**BATCH.inputs)
        assert reduction.report().images[0].retained == wanted
        assert registry["mine"] is not sdpa_attention_forward
        del registry["mine"]
        with torch.no_grad(), vtr.reduced(model, "fastv", keep=9) as reduction:
            AttentionInterface.register("mine", sdpa_attention_forward)
            model(**BATCH.inputs)
        assert reduction.report().images[0].retained == wanted
    finally:
        AttentionMaskInterface._global_mapping.pop("mine")
        AttentionInterface._global_mapping.pop("mine", None)
        registry._local_mapping.pop("mine", None)


def test_attention_that_asks_nobody_is_refused(registry):
    with pytest.raises(vtr.VtrError, match=r"fastv: needs rows of LLM layer 1, but its Alone does not take its attention function from"):
        retained(with_attention(Alone))


class Failing(ByAttention):
    """A method whose selection fails."""

    def select(self, view):
        raise ZeroDivisionError("a method of the user")


def test_one_failure_does_not_become_fifty(registry):
    """Whatever fails in or around one reduced model, other models run as before, and nothing is left once it is gone."""
    others = [build("llava"), with_attention(Logged, "eager"), with_attention(Asking)]
    wanted = [other(**BATCH.inputs, use_cache=False).logits for other in others]

    def others_are_right() -> bool:
        return all(torch.equal(o(**BATCH.inputs, use_cache=False).logits, w) for o, w in zip(others, wanted, strict=True))

    for method in (Failing(), ByAttention(keep=5)):
        model = build("llava")
        vtr.apply(model, [method])  # and never removed
        try:
            model(**BATCH.inputs)
        except ZeroDivisionError:
            pass
        assert type(registry) is not AttentionInterface and others_are_right()
        del model
        gc.collect()
        assert type(registry) is AttentionInterface and others_are_right()

    broken = build("llava")
    broken.model.language_model.layers[3].self_attn.register_forward_hook = None  # fails in the middle of being installed
    plan = [Observe(stage="prefill", layer=4, signals=(vtr.Signal("rows", layer=1), vtr.Signal("attention_io", layer=3)))]
    before = snapshot(broken)
    with pytest.raises(TypeError, match="not callable"):
        vtr.apply(broken, plan)
    assert snapshot(broken) == before and type(registry) is AttentionInterface and others_are_right()


def test_taps_come_and_go_while_another_thread_runs(registry):
    model, other = build("llava"), with_attention(Asking)
    wanted, done, found = other(**BATCH.inputs, use_cache=False).logits, threading.Event(), []

    def watch_and_stop() -> None:
        while not done.is_set():
            with TAPS.watching(model.model.language_model.layers[0].self_attn, lambda *_: None):
                pass

    thread = threading.Thread(target=watch_and_stop)
    thread.start()
    try:
        with torch.no_grad():
            found += [torch.equal(other(**BATCH.inputs, use_cache=False).logits, wanted) for _ in range(8)]
    finally:
        done.set()
        thread.join()
    assert all(found)


def test_a_watcher_ends_alone(registry):
    attention, seen = build("llava").model.language_model.layers[0].self_attn, []
    first = TAPS.watch(attention, lambda *_: seen.append(1))
    second = TAPS.watch(attention, lambda *_: seen.append(2))
    rope = tuple(torch.ones(1, 3, 16) for _ in range(2))
    for stop in (first, first, second):
        attention(torch.zeros(1, 3, 64), position_embeddings=rope, attention_mask=None)
        stop()
    attention(torch.zeros(1, 3, 64), position_embeddings=rope, attention_mask=None)
    assert seen == [1, 2, 2, 2]
