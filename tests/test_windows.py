"""Sliding windows and rotary tables by type of layer: distances and tables count the tokens that were removed."""

from functools import cache

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vtr
from tests import reference
from tests.caches import held
from tests.fake_flash import flash_attention
from tests.marks import quick_first
from tests.oracles import expected_of
from tests.probes import OBSERVED, ByAttention, EveryNth, Freeze, MergePairs, Observe, Ragged, TowerTop, recorded
from tests.tiny_models import IMAGE, Shot, batch_of, build, generate
from vtr.engine.llm import masks

pytestmark = pytest.mark.usefixtures("no_gradients")
FP64 = torch.float64
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
WINDOW = 16
BACKBONES = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2, "layer_types": KINDS},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": KINDS, "head_dim": 16},
    "cohere2": {"sliding_window": WINDOW, "layer_types": KINDS},
}
PLANS = {
    "boundary": [EveryNth(stride=3)],
    "attention": [ByAttention(keep=7)],
    "early": [ByAttention(keep=9, layer=1), EveryNth(stage="prefill", layer=4)],
    "ragged": [Ragged(), Ragged(stage="prefill", layer=2)],
    "tower": [TowerTop()],
    "merge": [MergePairs(), MergePairs(stage="prefill", layer=3)],
    "frozen": [EveryNth(stride=2), Freeze()],
    "renumber": [EveryNth(position_ids="renumber"), ByAttention(keep=5, position_ids="renumber")],
}
ROWS = ((4, Shot(), 6), (3, Shot(), 2, Shot(), 5))


@cache
def model_of(backbone: str, attention: str = "sdpa", window: int = WINDOW):
    return build("llava", attention, FP64, backbone=backbone, text={**BACKBONES[backbone], "sliding_window": window})


def masked(model, batch, choices, plan):
    """The full model at full length with removed tokens hidden and every window in original columns."""
    expected = expected_of(batch, choices, renumber=any(method.resolved().position_ids == "renumber" for method in plan))
    expected.freeze = (1, 3) if isinstance(plan[-1], Freeze) else ()
    return reference.masked_logits(model, batch, expected), expected


@pytest.mark.parametrize("backbone", quick_first(BACKBONES, 2))
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_prompt_longer_than_the_window_is_exact(backbone, plan):
    model, batch = model_of(backbone), batch_of("llava", ROWS, dtype=FP64)
    with recorded() as choices, vtr.reduced(model, plan):
        logits = model(**batch.inputs, position_ids=batch.positions).logits
    wanted, expected = masked(model, batch, choices, plan)
    keep = expected.drops[-1][1] if expected.drops else batch.valid
    assert reference.difference(batch, keep, logits, wanted) < 1e-6


@pytest.mark.parametrize("backbone", quick_first(["gemma3_text", "mistral"]))
@pytest.mark.parametrize("plan", [PLANS["boundary"], PLANS["early"], PLANS["renumber"], PLANS["frozen"]])
def test_an_answer_that_leaves_the_window_is_exact(backbone, plan):
    """Cached decoding against the masked full model over prompt and answer; the window ends inside the answer, too."""
    for window in (WINDOW, 52):
        model, batch = model_of(backbone, window=window), batch_of("llava", ((4, Shot(), 6),), dtype=FP64)
        with recorded() as choices, vtr.reduced(model, plan):
            answer = generate(model, batch, 12, suppress_tokens=[IMAGE])
        whole = batch.followed_by(answer.sequences[:, -12:-1])
        wanted, _ = masked(model, whole, choices, plan)
        assert float((torch.stack(answer.logits, 1) - wanted[:, -12:]).abs().max()) < 2e-6


@pytest.mark.parametrize("backbone", ["mistral", "gemma3_text"])
def test_a_later_turn_is_exact(backbone):
    plan = PLANS["early"]
    model, batch = model_of(backbone), batch_of("llava", ROWS, dtype=FP64)
    later = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    whole = batch.followed_by(later)
    with recorded() as choices, vtr.reduced(model, plan):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**batch.inputs, position_ids=batch.positions, **held(cache))
        turn = model(input_ids=later, attention_mask=whole.inputs["attention_mask"], position_ids=whole.positions[:, -4:], **held(cache))
    wanted, _ = masked(model, whole, choices, plan)
    assert float((turn.logits - wanted[:, -4:]).abs().max()) < 1e-6


@pytest.mark.parametrize("backbone", ["mistral", "qwen2"])
def test_eager_attention_is_exact(backbone):
    rows = ((4, Shot(), 6), (3, Shot(), 7))  # no padding: in float64 transformers' own eager attention is NaN in rows that see nothing
    model, batch = model_of(backbone, "eager"), batch_of("llava", rows, dtype=FP64)
    with recorded() as choices, vtr.reduced(model, PLANS["early"]):
        logits = model(**batch.inputs, position_ids=batch.positions).logits
    wanted, expected = masked(model, batch, choices, PLANS["early"])
    assert reference.difference(batch, expected.drops[-1][1], logits, wanted) < 1e-5


def test_distances_between_the_tokens_that_are_left_would_be_found(monkeypatch):
    def physical(call, layer):
        real = masks.columns(call, layer)
        return torch.arange(real.shape[1]).expand(real.shape)

    monkeypatch.setattr(masks, "all_columns", physical)
    model, batch = model_of("mistral"), batch_of("llava", ROWS, dtype=FP64)
    with recorded() as choices, vtr.reduced(model, PLANS["boundary"]):
        logits = model(**batch.inputs, position_ids=batch.positions).logits
    wanted, expected = masked(model, batch, choices, PLANS["boundary"])
    assert reference.difference(batch, expected.drops[-1][1], logits, wanted) > 0.1


@pytest.mark.parametrize("queries", ["last", "text"])
def test_attention_that_a_method_reads_is_that_of_the_window(queries):
    """Rows of a sliding layer, against the attention map of the eager model."""
    signal = vtr.Signal("rows", queries=queries)
    model, eager = model_of("mistral"), model_of("mistral", "eager")
    eager.load_state_dict(model.state_dict())
    batch = batch_of("llava", ((14, Shot(), 6),), dtype=FP64)
    plan = [Observe(stage="prefill", layer=3, signals=(signal,))]
    OBSERVED.clear()
    with vtr.reduced(model, plan):
        model(**batch.inputs)
    view = OBSERVED[0]
    attention = eager(**batch.inputs, output_attentions=True).attentions[2].mean(1)[0]
    rows = attention[-1:] if queries == "last" else attention[~batch.visual[0]]
    found = view.signals[signal]
    found = found if queries == "last" else found[0]
    assert float((found - rows[:, batch.visual[0]].to(found.dtype)).abs().max()) < 1e-6


def test_a_window_under_flash_attention_and_in_a_static_cache_is_refused():
    model, batch = model_of("mistral"), batch_of("llava", ((4, Shot(), 6),), dtype=FP64)
    with (
        flash_attention(model),
        vtr.reduced(model, PLANS["boundary"]),
        pytest.raises(vtr.VtrError, match="longer than the sliding window of 16"),
    ):
        model(**batch.inputs)
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with vtr.reduced(model, PLANS["boundary"]), pytest.raises(vtr.VtrError, match="can grow beyond the sliding window of 16"):
        model(**batch.inputs, **held(static))
    with vtr.reduced(model, PLANS["boundary"]), pytest.raises(vtr.VtrError, match="can grow beyond the sliding window of 16"):
        generate(model, batch, 2, cache_implementation="static", disable_compile=True)


def test_a_type_of_layer_that_is_not_known_is_refused():
    model = build("llava")
    model.model.language_model.config.layer_types = ["full_attention"] * 4 + ["linear_attention"]
    with pytest.raises(vtr.VtrError, match="layer 4 of the LLM is of type 'linear_attention'"):
        vtr.reduced(model, "divprune", keep=7)
