"""Layers that are not all alike: linear attention, sliding windows, shared keys. Formulas against counted forwards and real caches."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny_models import build
from vtr.cost import CHUNK, TransformerShape, kv_bytes, layer_flops, prefill_flops
from vtr.testing.caches import held


def counted(language, length, cache=None):
    """Multiply-adds of every layer for one prompt of text, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        language(input_ids=torch.full((1, length), 7), **({} if cache is None else held(cache)))
    found = counter.get_flop_counts()
    return [sum(found[f"{type(language).__name__}.layers.{i}"].values()) / 2 for i in range(len(language.layers))]


def shape_of(language):
    return TransformerShape.from_config(language.config)


def test_linear_layers_of_qwen3_5():
    """Whole chunks; torch does not count the two triangular systems, and counts the filler at the ends of the convolution."""
    language = build("qwen3_5", "eager").model.language_model
    shape, length = shape_of(language), 2 * CHUNK
    linear = shape.linear
    assert [shape.is_linear(i) for i in range(5)] == [True, False, True, False, True]
    systems = linear.value_heads * CHUNK * (linear.key_dim + linear.value_dim) * length
    for layer, found in enumerate(counted(language, length)):
        expected = layer_flops(shape, length, layer=layer)
        filler = (linear.kernel - 1) * linear.kernel * linear.channels
        assert found == (expected - systems + filler if shape.is_linear(layer) else expected)
    assert prefill_flops(shape, [length] * 5) == sum(layer_flops(shape, length, layer=i) for i in range(5))


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "gemma4_unified"])
def test_layers_with_windows_within_their_window(kind):
    language = build(kind, "eager").model.language_model
    shape = shape_of(language)
    assert counted(language, 10) == [layer_flops(shape, 10, layer=i) for i in range(5)]


def test_embeddings_of_every_layer_are_made_in_front_and_used_in_it():
    language = build("gemma4_small", "eager").model.language_model
    shape = shape_of(language)
    assert shape.embedded == language.config.hidden_size_per_layer_input > 0
    assert counted(language, 10) == [layer_flops(shape, 10, layer=i) for i in range(5)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        language(input_ids=torch.full((1, 10), 7))
    tables = 10 * sum(width // 2 for _, width in {*shape.heads_by_layer})  # transformers 5.17 makes the rotary tables by products
    assert counter.get_total_flops() / 2 - prefill_flops(shape, [10] * 5) in (0, tables)


def test_a_token_behind_a_full_window_costs_as_much_as_any_other():
    """One token with the cache of a long prompt: what it adds to the formula of the prompt."""
    from transformers import DynamicCache

    language = build("gemma3", "eager").model.language_model
    shape = shape_of(language)
    cache = DynamicCache(config=language.config)
    with torch.no_grad():
        language(input_ids=torch.full((1, 30), 7), **held(cache))
    for layer, found in enumerate(counted(language, 1, cache)):
        keys = 31 if shape.window_of(layer) is None else 12
        made = 2 * shape.hidden * shape.kv_heads * shape.head_dim
        assert found == layer_flops(shape, 1, 31, layer) - 30 * made, "keys and values of the others are there"
        assert shape.window_of(layer) in (None, 12)
        if shape.window_of(layer):
            assert layer_flops(shape, 31, layer=layer) - layer_flops(shape, 30, layer=layer) == found
        assert keys == min(31, shape.window_of(layer) or 31)


def test_full_layers_of_gemma_4_have_heads_of_their_own():
    """Others have two key heads of width 16; keys of full layers are values, too."""
    shape = shape_of(build("gemma4").model.language_model)
    assert [shape.heads_of(i) for i in range(5)] == [(2, 16), (2, 16), (1, 32), (2, 16), (1, 32)] and shape.tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llava", "qwen3_5", "gemma3", "gemma4", "gemma4_small"])
@pytest.mark.parametrize("length", [9, 40])
def test_bytes_are_those_of_the_cache(kind, dtype, length):
    from transformers import DynamicCache

    model = build(kind, dtype=dtype)
    config = model.config.get_text_config()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.full((1, length), 7), **held(cache))
    tensors = []
    for layer in cache.layers:
        states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        tensors += states or [layer.keys, layer.values]
    found = sum(tensor.nbytes if tensor.untyped_storage().nbytes() >= tensor.nbytes else 0 for tensor in tensors if tensor is not None)
    assert kv_bytes(TransformerShape.from_config(config), [length] * 5, dtype.itemsize) == found


def test_alike_layers_have_one_shape():
    shape = TransformerShape.from_config(build("qwen2_5_vl").config.get_text_config())
    assert not shape.heads_by_layer and (shape.kv_heads, shape.head_dim, shape.query_matrices) == (2, 16, 1) and shape.linear is None


def test_every_layer_of_mistral_slides():
    config = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "sliding_window": 5}
    shape = TransformerShape.from_config(config)
    assert [shape.window_of(i) for i in range(2)] == [5, 5] and kv_bytes(shape, [3, 9], 1) == 2 * 8 * (3 + 4)
    assert layer_flops(shape, 9) - layer_flops(shape, 9, 5) == 2 * 4 * 8 * 8, "keys are made for all of them, five are seen"
    assert TransformerShape.from_config({**config, "use_sliding_window": False}).window_of(0) is None
    with pytest.raises(ValueError, match="kinds must have one entry per layer"):
        TransformerShape(2, 8, 16, 2, 2, 4, kinds=("full_attention",))
