"""`torch.compile` under a reduction: a decode step is one graph; a prefill breaks where hooks choose and shorten. Answers are the eager ones."""

import pytest
import torch
from transformers import StaticCache

import vtr
from tests import oracles
from tests.caches import held
from tests.probes import EveryNth, Freeze, Ragged
from tests.tiny_models import KINDS, batch_of, build, model_of

PREFILLS = {
    "boundary": ["divprune"],
    "prefill": ["fastv"],
    "tower": ["tome"],
    "three stages": ["tome", "divprune", "fastv"],
}


def plan(names: list[str]) -> list[vtr.Method]:
    """Methods of falling budget."""
    return [vtr.create_method(name, keep=keep) for name, keep in zip(names, (20, 12, 7), strict=False)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "boundary" else pytest.mark.slow) for name in PREFILLS])
@torch.no_grad()
def test_a_compiled_prefill_equals_an_eager_one(name):
    """Two prompts of different length after another, so that nothing of the first stays in the compiled code."""
    model = build("llava", text={"num_hidden_layers": 3}, tower={"num_hidden_layers": 2})
    batches = batch_of("llava"), batch_of("llava").row(1)
    torch._dynamo.reset()
    with vtr.reduced(model, plan(PREFILLS[name])) as reduction:
        eager = [(model(**batch.inputs).logits, reduction.report().to_dict()["images"]) for batch in batches]
        compiled = torch.compile(model, backend="eager")
        for batch, (logits, images) in zip(batches, eager, strict=True):
            torch.testing.assert_close(compiled(**batch.inputs).logits, logits, atol=2e-5, rtol=0)
            assert reduction.report().to_dict()["images"] == images
    torch._dynamo.reset()
    full = model(**batches[0].inputs).logits
    assert torch.equal(model(**batches[0].inputs).logits, full)


DECODED = {
    "boundary and prefill": oracles.BOTH,
    "renumbered, ragged, frozen": [EveryNth(position_ids="renumber"), Ragged(stage="prefill", layer=2), Freeze()],
    "tower": [vtr.create_method("tome", keep=20)],
    "three stages": plan(PREFILLS["three stages"]),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in DECODED for kind in (KINDS if name in list(DECODED)[:2] else KINDS[:1])]
)
@torch.no_grad()
def test_the_compiled_decode_step_is_one_graph(name, kind):
    """Static cache, `fullgraph=True`: no graph break, no recompilation over six steps, equal logits."""
    model, batch = model_of(kind), batch_of(kind)
    length = batch.valid.shape[1]
    graphs = [0]

    def backend(module, examples):
        graphs[0] += 1
        return module

    def answer(decode) -> torch.Tensor:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 16)
        logits = [model(**batch.inputs, position_ids=batch.positions, **held(cache)).logits[:, -1]]
        # what generate hands over: a mask of fixed shape, whose columns are those of the unreduced prompt
        mask = torch.zeros(2, 1, 1, length + 16, dtype=torch.bool)
        for step in range(6):
            positions = batch.positions[:, -1:] + 1 + step
            ids = torch.full((2, 1), 7 + step)
            logits.append(decode(input_ids=ids, attention_mask=mask, position_ids=positions, **held(cache)).logits[:, -1])
        return torch.stack(logits)

    with vtr.reduced(model, DECODED[name]):
        plain = answer(model)
        torch._dynamo.reset()
        compiled = answer(torch.compile(model, backend=backend, fullgraph=True, dynamic=False))
        torch._dynamo.reset()
    assert graphs[0] == 1
    torch.testing.assert_close(compiled, plain, atol=2e-5, rtol=0)
