"""`torch.compile` under a reduction: a decode step is one graph; a prefill breaks where hooks choose and shorten. Answers are the eager ones."""

import pytest
import torch
from transformers import StaticCache

import vtr
from tests import oracles
from tests.caches import held
from tests.probes import EveryNth, Freeze, Ragged
from tests.tiny_models import KINDS, batch_of, build

PREFILLS = {
    "boundary": ["divprune"],
    "prefill": ["fastv"],
    "tower": ["tome"],
    "three stages": ["tome", "divprune", "fastv"],
}


def plan(names: list[str]) -> list[vtr.Method]:
    """Methods of falling budget."""
    return [vtr.create_method(name, keep=keep) for name, keep in zip(names, (20, 12, 7), strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PREFILLS)
@torch.no_grad()
def test_a_compiled_prefill_equals_an_eager_one(name):
    """Compiled before the reduction comes; two prompts of different length after another under it (one in the quick suite, as each is traced
    anew); whole again after it has gone.

    Then nothing new is compiled any more, but code that is left from under the reduction would run.
    """
    methods = plan(PREFILLS[name])
    model = build("llava", text={"num_hidden_layers": 3 if "fastv" in PREFILLS[name] else 1}, tower={"num_hidden_layers": 2})
    batches = [batch_of("llava"), batch_of("llava").row(1)][: 1 if name == "boundary" else 2]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    full = compiled(**batches[0].inputs).logits
    with vtr.reduced(model, methods) as reduction:
        eager = [(model(**batch.inputs).logits, reduction.report().to_dict()["images"]) for batch in batches]
        for batch, (logits, images) in zip(batches, eager, strict=True):
            torch.testing.assert_close(compiled(**batch.inputs).logits, logits, atol=2e-5, rtol=0)
            assert reduction.report().to_dict()["images"] == images
    assert not torch.allclose(eager[0][0][:, -1], full[:, -1], atol=1e-3), "the full model's"
    with torch.compiler.set_stance("eager_on_recompile"):
        torch.testing.assert_close(compiled(**batches[0].inputs).logits, full, atol=2e-5, rtol=0)
    torch.compiler.reset()
    torch.testing.assert_close(model(**batches[0].inputs).logits, full, atol=2e-5, rtol=0)


DECODED = {
    "boundary and prefill": oracles.BOTH,
    "renumbered, ragged, frozen": [EveryNth(position_ids="renumber"), Ragged(stage="prefill", layer=2), Freeze(layers=(1,))],
    "tower": [vtr.create_method("tome", keep=20)],
    "three stages": plan(PREFILLS["three stages"]),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) == ("renumbered, ragged, frozen", KINDS[0]) else pytest.mark.slow)
        for name, kind in [*((name, KINDS[0]) for name in DECODED), *(("boundary and prefill", kind) for kind in KINDS[1:])]
    ],
)
@torch.no_grad()
def test_the_compiled_decode_step_is_one_graph(name, kind):
    """Static cache, `fullgraph=True`: no graph break, no recompilation over six steps, equal logits."""
    model, batch = build(kind, text={"num_hidden_layers": 3}), batch_of(kind)
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
