"""A plan is checked against the modules and the keyword arguments that it needs of this very model, and no others."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig, ViTConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel

import vtr
from tests.probes import Freeze
from tests.tiny_models import IMAGE, LLM, ONE, TOWER, batch_of, build
from vtr import Boundary, Observe
from vtr.hosts._probe import keywords_of
from vtr.hosts._versions import cache_keyword

pytestmark = pytest.mark.usefixtures("no_gradients")

BATCH = batch_of("llava", ONE)


def llava_with(text: str) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=AutoConfig.for_model(text, **LLM),
        image_token_id=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.15)
    return model.double().eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("text", "name"), [("phi", "uniform"), ("phi", "fastv"), ("phi", "pyramiddrop"), ("gpt_neox", "uniform"), ("gpt_neox", "divprune")]
)
def test_a_backbone_that_has_what_a_method_needs_is_right(text, name):
    model, batch = llava_with(text), BATCH.to(torch.float64)
    with vtr.reduced(model, name, keep=9, position_ids="keep") as reduction:
        found = model(**batch.inputs, use_cache=False).logits
    image, ids = reduction.report().images[0], batch.inputs["input_ids"][0]
    assert image.per_layer[-1] == 9 and found.shape[1] == len(ids) - 27
    if image.per_layer[0] == 9:  # at the boundary: as the full model that never sees what was dropped
        keep = ids != IMAGE
        keep[[4 + patch for patch in image.retained]] = True
        seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & keep | torch.eye(len(ids), dtype=torch.bool)
        full = model(**{**batch.inputs, "attention_mask": seen[None, None]}, use_cache=False).logits[:, keep]
        assert float((full - found).abs().max()) < 1e-10


@pytest.mark.parametrize(
    ("text", "name", "missing"),
    [
        ("gpt_neox", "fastv", "fastv: needs 'self_attn' of GPTNeoXLayer"),
        ("gpt_neox", "pyramiddrop", "pyramiddrop: needs 'self_attn' of GPTNeoXLayer"),
        ("phi", "dart", "dart: needs 'norm' of PhiModel"),
        ("phi", "corematching", "corematching: needs 'down_proj' of the MLP"),
    ],
)
def test_what_a_method_needs_and_a_backbone_lacks_is_named(text, name, missing):
    with pytest.raises(vtr.VtrError, match=rf"{missing}.*use another method, such as 'uniform', or register a host"):
        vtr.reduced(llava_with(text), name, keep=9)


def test_a_tower_without_a_host_is_refused_by_name():
    tower = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=48, patch_size=8)
    config = LlavaConfig(vision_config=tower, text_config=MistralConfig(**LLM), image_token_id=IMAGE, vision_feature_layer=-1)
    with pytest.raises(vtr.VtrError, match=r"llava: the tower must be CLIP.*got 'vit'; register a host for it"):
        vtr.reduced(LlavaForConditionalGeneration(config), "fastv", keep=9)


# -- keyword arguments

CACHE = cache_keyword()


class RenamedCache(LlamaModel):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, kv=None, inputs_embeds=None, use_cache=None, **kwargs):
        return super().forward(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **{CACHE: kv}, **kwargs
        )


class RenamedMask(LlamaModel):
    def forward(self, input_ids=None, mask=None, position_ids=None, cache=None, inputs_embeds=None, use_cache=None, **kwargs):
        return super().forward(input_ids, mask, position_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **{CACHE: cache}, **kwargs)


class RenamedRope(LlamaDecoderLayer):
    def forward(self, hidden_states, attention_mask=None, position_ids=None, cache=None, use_cache=False, rope=None, **kwargs):
        return super().forward(hidden_states, attention_mask, position_ids, cache, use_cache, position_embeddings=rope, **kwargs)


class RenamedLayerCache(LlamaDecoderLayer):
    def forward(self, hidden_states, attention_mask=None, position_ids=None, kv=None, position_embeddings=None, **kwargs):
        return super().forward(hidden_states, attention_mask, position_ids, kv, position_embeddings=position_embeddings, **kwargs)


class RenamedAttentionRope(LlamaAttention):
    def forward(self, hidden_states, rope=None, attention_mask=None, **kwargs):
        return super().forward(hidden_states, rope, attention_mask, **kwargs)


def renamed(kind: type) -> LlavaForConditionalGeneration:
    model = build("llava")
    language = model.model.language_model
    for module in [language, *language.layers, *(layer.self_attn for layer in language.layers)]:
        if isinstance(module, kind.__bases__[0]):
            module.__class__ = kind
    return model


METHODS = {
    "boundary": ["divprune"],
    "tower": ["visionzip"],
    "llm": ["fastv"],
    "next layer": ["pyramiddrop"],
    "merging": ["sparsevlm"],
    "freezing": [],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "argument", "needed_by"),
    [
        (RenamedCache, "'cache' or 'past_key_values'", METHODS),
        (RenamedMask, "'attention_mask'", METHODS),
        (RenamedRope, "'position_embeddings'", METHODS),
        (RenamedLayerCache, "'cache' or 'past_key_values'", ["freezing"]),
        (RenamedAttentionRope, "'position_embeddings'", ["next layer", "freezing"]),
    ],
)
def test_a_renamed_argument_is_refused_where_it_is_needed(kind, argument, needed_by, method):
    model = renamed(kind)
    plan = METHODS[method][0] if METHODS[method] else [Freeze()]
    settings = {"keep": 9} if METHODS[method] else {}
    if method in needed_by:
        with pytest.raises(
            vtr.VtrError, match=rf"{kind.__name__}\.forward\) takes no argument {argument}, got .*transformers \d.*tested are \d"
        ):
            vtr.apply(model, plan, **settings)
    else:
        vtr.reduced(model, plan, **settings)


def test_arguments_are_found_behind_wrappers_and_unknown_ones_are_accepted():
    class Open(nn.Module):
        def forward(self, *args, **kwargs):
            return args

    class Named(nn.Module):
        def forward(self, hidden, mask=None):
            return hidden

    assert keywords_of(Open()) is None
    module = Named()
    assert list(keywords_of(module)) == ["hidden", "mask"]
    original = module.forward
    module.forward = functools.update_wrapper(
        functools.partial(lambda module, *args, **kwargs: original(*args, **kwargs), module), original
    )
    assert list(keywords_of(module)) == ["hidden", "mask"]
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)  # says nothing: the class counts
    assert list(keywords_of(module)) == ["hidden", "mask"]
    model = build("llava")
    language = model.model.language_model
    inner = language.forward
    language.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with vtr.reduced(model, "fastv", keep=9):
        assert model(**BATCH.inputs).logits.shape[1] == 19


def test_a_final_norm_is_asked_for_only_where_a_step_says_so():
    @dataclass(frozen=True, kw_only=True)
    class Normed(Freeze):
        def steps(self, geometry):
            return (Observe(Boundary(), lambda view: None, final_norm=True),)

    with pytest.raises(vtr.VtrError, match=r"probe: needs 'norm' of GPTNeoXModel"):
        vtr.reduced(llava_with("gpt_neox"), [Normed()])
