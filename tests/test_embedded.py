"""FlowCut, DART, ToDRE and GlobalCom2 on the two checkpoints that come with the repository: exact, batched, cached, undone."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.marks import quick_first
from tests.tiny_models import snapshot
from vtr.data.shapes import test_samples as samples_of
from vtr.eval.run.asking import encode

MODELS = Path(__file__).parents[1] / "models"
KEEP = {"tiny-llava": 64, "tiny-llava-next": 320}
SYSTEMS = ("flowcut", "dart", "todre", "globalcom2")
PAIRS = [
    pytest.param(name, system, marks=() if (name, system) == ("tiny-llava", "flowcut") else pytest.mark.slow)
    for name in KEEP
    for system in SYSTEMS
]
"""The quick suite has a method of each kind on one checkpoint; tiny models of the same architectures have all of them."""
NEW = 3


@cache
def loaded(name: str) -> tuple[Any, Any]:
    """Model in float32 and processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(MODELS / name, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoProcessor.from_pretrained(MODELS / name, local_files_only=True)


@cache
def prompts(name: str) -> tuple[Any, ...]:
    """Inputs of two questions of different length together, and of each alone."""
    _, processor = loaded(name)
    asked = [samples_of("relation", 1)[0], samples_of("text", 1)[0]]
    return tuple(encode(processor, [s.question for s in some], [[s.image] for s in some]) for some in (asked, asked[:1], asked[1:]))


@torch.no_grad()
def answer(model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """Tokens `(B, NEW)` and logits `(B, NEW, V)` of the greedy answer."""
    made = model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return made.sequences[:, -NEW:], torch.stack(made.logits, 1)


@cache
def full(name: str) -> tuple[Tensor, Tensor]:
    """The full model's answer to the first question."""
    return answer(loaded(name)[0], prompts(name)[1])


@pytest.mark.parametrize(("name", "system"), PAIRS)
def test_identity_is_the_full_model_and_removal_restores_it(name, system):
    model, _ = loaded(name)
    inputs = prompts(name)[1]
    tokens, logits = full(name)  # leaves attributes of its own
    before = snapshot(model)
    with vtr.reduced(model, type(vtr.create_method(system)).identity(model_tokens(model))):
        same = answer(model, inputs)
    assert torch.equal(same[0], tokens) and torch.equal(same[1], logits)
    assert snapshot(model) == before
    assert torch.equal(answer(model, inputs)[1], logits)


def model_tokens(model: Any) -> int:
    """The most visual tokens of an image."""
    return {"llava": 576, "llava_next": 2880}[model.config.model_type]


@pytest.mark.parametrize(("name", "system"), PAIRS)
def test_budgets_are_exact_and_a_batch_is_its_rows(name, system):
    model, _ = loaded(name)
    both, *alone = prompts(name)
    with vtr.reduced(model, system, keep=KEEP[name]) as reduction:
        together = answer(model, both)
        images = reduction.report().to_dict()["images"]
        for row, inputs in enumerate(alone):
            single = answer(model, inputs)
            assert torch.equal(single[0][0], together[0][row])
            torch.testing.assert_close(single[1][0], together[1][row], atol=1e-4, rtol=0)
            (told,) = reduction.report().to_dict()["images"]
            assert told["retained"] == images[row]["retained"]
    left = [len(image["retained"]) for image in images]
    assert all(count == KEEP[name] or (system == "todre" and count == 0) for count in left)  # ToDRE may drop all in its second stage


@pytest.mark.parametrize(("name", "system"), [pair for pair in PAIRS if pair.values[1] != "dart"])
@torch.no_grad()
def test_cached_decoding_is_recomputing(name, system):
    """Where the choice does not look at text, to which recomputing adds the answer: without DART and FlowCut's step in the LLM."""
    model, _ = loaded(name)
    inputs = prompts(name)[0]
    with vtr.reduced(model, system, keep=KEEP[name], **({"llm_layer": None} if system == "flowcut" else {})):
        tokens, logits = answer(model, inputs)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[:, :-1])], 1)
        longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens[:, :-1]], 1), "attention_mask": mask}
        whole = model(**longer, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False).logits[:, -NEW:]
    torch.testing.assert_close(whole, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", quick_first(KEEP))
@torch.no_grad()
def test_removed_is_masked(name):
    """GlobalCom2 acts at the boundary alone: hiding what it removes, by the ordinary attention mask, gives the same logits."""
    model, _ = loaded(name)
    inputs = prompts(name)[0]
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with vtr.reduced(model, "globalcom2", keep=KEEP[name], position_ids="keep") as reduction:
        reduced = model(**inputs, position_ids=positions).logits[:, -1]
        stays = torch.zeros_like(inputs["attention_mask"])
        for row, columns in enumerate(reduction.report().positions):
            stays[row, list(columns)] = 1
    hidden = model(**{**inputs, "attention_mask": stays}, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(reduced, hidden, atol=1e-4, rtol=0)
