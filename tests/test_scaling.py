"""Where the LLM or the tower scales its logits in its own way, methods that compute attention themselves do the same."""

import importlib
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import vtr
from tests.methods.handmade import LLAVA
from tests.tiny_models import IMAGE, batch_of, build
from vtr.hosts._protocol import host_of
from vtr.methods.flowcut import last_row
from vtr.methods.sparsevlm_plus import Rotary, gravity, rotary_of
from vtr.ops.prompt_rows import prompt_rows
from vtr.ops.received import attention_received
from vtr.ops.topk import topk_mask
from vtr.types import VtrError

pytestmark = pytest.mark.usefixtures("no_gradients")
MULTIPLIER, N, BEFORE, AFTER = 0.9, 36, 4, 6
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 48, "patch_size": 8}
TEXT = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def llava(text, **changes):
    """LLaVA-1.5 in miniature around an LLM of any type, float64, eager so that it shows its attention."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=AutoConfig.for_model(text, **{**TEXT, **changes}),
        image_token_id=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def granite():
    return llava("granite", attention_multiplier=MULTIPLIER)


@pytest.fixture(scope="module")
def prompt():
    dice = torch.Generator().manual_seed(0)
    words = torch.randint(5, 90, (BEFORE + AFTER,), generator=dice).tolist()
    ids = torch.tensor([words[:BEFORE] + [IMAGE] * N + words[BEFORE:]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 48, 48, generator=dice).double()}


def test_pyramiddrop_ranks_by_the_models_own_attention(granite, prompt):
    shown = granite(**prompt, output_attentions=True).attentions[2]  # (1, H, S, S)
    score = shown[:, :, -1, BEFORE : BEFORE + N].mean(1)
    expected = topk_mask(score, torch.ones_like(score, dtype=torch.bool), torch.tensor([12]))[0].nonzero()[:, 0].tolist()
    with vtr.reduced(granite, "pyramiddrop", counts=(12, 12, 12), layers=(2, 3, 4)) as reduction:
        granite(**prompt)
    assert reduction.report().images[0].per_layer == [36, 36, 12, 12, 12]
    assert reduction.report().images[0].retained == expected
    logits = shown[:, :, -1].log() / (MULTIPLIER * 16**0.5)  # what d ** -0.5 would make of it is another choice
    other = logits.softmax(-1)[..., BEFORE : BEFORE + N].mean(1)
    assert topk_mask(other, torch.ones_like(other, dtype=torch.bool), torch.tensor([12]))[0].nonzero()[:, 0].tolist() != expected


@pytest.mark.parametrize("name", ["pyramiddrop", "transprune", "flowcut"])
def test_the_factor_reaches_the_method(name, monkeypatch):
    model, seen = build("llava_next" if name == "flowcut" else "llava"), []
    for layer in model.model.language_model.layers:
        layer.self_attn.scaling = MULTIPLIER
    module = importlib.import_module(f"vtr.methods.{name}")
    function = {"flowcut": "last_row", "pyramiddrop": "last_token_row"}.get(name, "prompt_rows")
    real = getattr(module, function)

    def watched(*args, **kwargs):
        seen.append(kwargs["scaling"] if "scaling" in kwargs else args[3])
        return real(*args, **kwargs)

    monkeypatch.setattr(module, function, watched)
    batch = batch_of("llava_next" if name == "flowcut" else "llava")
    with vtr.reduced(model, name, keep=9):
        model(**batch.inputs)
    assert seen and set(seen) == {MULTIPLIER}


@pytest.mark.parametrize("name", ["visionzip", "vispruner"])
def test_the_factor_of_a_tower_without_cls_reaches_the_method(name, monkeypatch):
    model, seen = build("llava_siglip"), []
    for layer in model.model.vision_tower.modules():
        if hasattr(layer, "scale") and hasattr(layer, "q_proj"):
            layer.scale = MULTIPLIER
    module = importlib.import_module(f"vtr.methods.{name}")
    real = module.attention_received
    monkeypatch.setattr(module, "attention_received", lambda *args, **more: seen.append(more["scaling"]) or real(*args, **more))
    with vtr.reduced(model, name, keep=9):
        model(**batch_of("llava_siglip").inputs)
    assert seen and set(seen) == {MULTIPLIER}


def test_functions_take_the_factor():
    dice = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 5, 2, 8, generator=dice).double(), torch.randn(1, 5, 2, 8, generator=dice).double()
    real = torch.ones(1, 5, dtype=torch.bool)
    expected = (torch.einsum("gqhd,gkhd->ghqk", query, key) * MULTIPLIER).softmax(-1)
    torch.testing.assert_close(attention_received(query, key, real, scaling=MULTIPLIER), expected.mean((1, 2)))
    rows = prompt_rows(query, key[:, :3], key[:, 3:], real[:, :3], real[:, 3:], torch.zeros(1, dtype=torch.int64), scaling=MULTIPLIER)
    torch.testing.assert_close(rows, expected.mean(1)[..., :3])
    torch.testing.assert_close(last_row(query[:, -1], key, real, MULTIPLIER), expected[:, :, -1].mean(1))
    torch.testing.assert_close(attention_received(query, key, real), attention_received(query, key, real, scaling=8**-0.5))


# -- the rotary embedding that SparseVLM+ corrects for


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("llama", {}),
        ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("llama", {"head_dim": 32}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}}),
        ("glm", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ],
    ids=["llama", "base of mistral-v1.6", "own width", "linear", "half of the dimensions"],
)
def test_gravity_is_that_of_the_models_own_rotary_embedding(text, changes):
    model = llava(text, **changes)
    host = host_of(model)
    rotary = rotary_of(host.geometry(), 1)
    width, position = host.language.blocks[0].self_attn.head_dim, torch.tensor([[0, 3, 17, 100, 611]])
    assert rotary.head_dim == width
    cos, sin = host.language.module.rotary_emb(torch.zeros(1, 1, 1, dtype=torch.float64), position_ids=position)  # (1, 5, rotated)
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]  # every angle stands twice
    first, second = cos - sin, cos + sin  # a pair of ones, turned
    ones = torch.cat([first, second, torch.ones(1, 5, width - 2 * half, dtype=cos.dtype)], -1)[0]
    got = gravity(position, position, rotary.head_dim, rotary.base, rotary.rotated, rotary.factor)
    torch.testing.assert_close(got[0], (ones @ ones.T).double() * width**-0.5, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("facts", "layer", "expected"),
    [
        ({}, 2, Rotary(128, 128)),
        ({"hidden_size": 64, "num_attention_heads": 4, "head_dim": None, "rope_parameters": {"rope_theta": 7.0}}, 2, Rotary(16, 16, 7.0)),
        (
            {"rope_parameters": {"a": {"rope_theta": 7.0}, "b": {"rope_theta": 9.0}}, "layer_types": ["a", "a", "b"]},
            2,
            Rotary(128, 128, 9.0),
        ),
        ({"rope_parameters": {"rope_theta": 7.0}, "layer_types": ["full_attention"] * 3}, 2, Rotary(128, 128, 7.0)),
    ],
)
def test_facts_of_the_config(facts, layer, expected):
    assert rotary_of(replace(LLAVA, text_config=facts), layer) == expected
    assert rotary_of(replace(LLAVA, text_config=facts), layer, 50.0) == expected._replace(base=50.0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (None, "sparsevlm_plus: the LLM of 'llava' has no rotary embedding to correct for; use 'sparsevlm'"),
        (
            {"rope_type": "llama3", "rope_theta": 5e5},
            "rotary embedding of 'llava' is scaled by 'llama3', only 'linear' is known; use 'sparsevlm'",
        ),
    ],
)
def test_what_cannot_be_corrected_for_is_refused(parameters, message):
    with pytest.raises(VtrError, match=message):
        vtr.create_method("sparsevlm_plus").steps(replace(LLAVA, text_config={"rope_parameters": parameters}))
