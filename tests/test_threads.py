"""Several models, several threads, several callers: nothing leaks from one call into another."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import vtr
from tests import tiny_models
from tests.probes import ByAttention, EveryNth, Freeze, Ragged, TowerTop
from tests.tiny_models import batch_of, build, generate, model_of

pytestmark = pytest.mark.usefixtures("no_gradients")

PLAN = [TowerTop(), Ragged(), ByAttention(keep=5), Freeze(layers=(4,))]


def test_two_reduced_models_do_not_see_each_other():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    first, second = model_of("llava"), model_of("llava_next")
    one, two = batch_of("llava"), batch_of("llava_next")
    reduction = vtr.apply(first, PLAN)
    a, full = first(**one.inputs).logits, second(**two.inputs).logits
    other = vtr.apply(second, [ByAttention(keep=7)])
    assert torch.equal(first(**one.inputs).logits, a)
    b = second(**two.inputs).logits
    reduction.remove()
    assert torch.equal(second(**two.inputs).logits, b) and b.shape != full.shape
    other.remove()
    assert torch.equal(second(**two.inputs).logits, full)
    assert type(ALL_ATTENTION_FUNCTIONS) is AttentionInterface and not ALL_ATTENTION_FUNCTIONS._local_mapping


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_threads_on_one_reduced_model_get_their_own_results(kind):
    model = model_of(kind)
    batches = [batch_of(kind, ((3 + i, tiny_models.Shot(90, 40), 4),), seed=i) for i in range(4)]
    start = threading.Barrier(len(batches))
    with vtr.reduced(model, PLAN):
        expected = [generate(model, batch, 4).sequences for batch in batches]

        def work(number: int) -> list:
            found = []
            start.wait()
            for _ in range(3):
                with torch.no_grad():
                    found.append(generate(model, batches[number], 4).sequences)
            return found

        with ThreadPoolExecutor(len(batches)) as pool:
            results = list(pool.map(work, range(len(batches))))
    for found, wanted in zip(results, expected, strict=True):
        assert len(found) == 3 and all(torch.equal(sequences, wanted) for sequences in found)


def test_threads_with_a_reduced_model_each():
    models = [build("llava"), build("llava")]
    batches = [batch_of("llava", seed=seed) for seed in (0, 1)]
    start = threading.Barrier(2)

    def work(number: int) -> list[torch.Tensor]:
        start.wait()
        with torch.no_grad():
            found = []
            for keep in (3, 4, 5):  # installs and removes while the other runs
                with vtr.reduced(models[number], [Ragged(), ByAttention(keep=keep)]):
                    found.append(generate(models[number], batches[number], 3).sequences)
        return found

    alone = []
    for number in range(2):
        start = threading.Barrier(1)
        alone.append(work(number))
    start = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, range(2)))
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Wrapped(nn.Module):
    """As adapters wrap a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def test_a_wrapped_model_is_reduced_all_the_same():
    model, batch = model_of("llava"), batch_of("llava")
    wrapped = Wrapped(model)
    with vtr.reduced(model, EveryNth()):
        assert torch.equal(wrapped(**batch.inputs).logits, model(**batch.inputs).logits)


def test_a_linear_replaced_under_a_reduction_is_used():
    """What adapters do when they are injected later: layers stay, their projections change."""
    model, batch = build("llava"), batch_of("llava")
    with vtr.reduced(model, PLAN):
        before = model(**batch.inputs).logits
        layer = model.model.language_model.layers[0]
        changed = nn.Linear(64, 64, bias=False)
        layer.self_attn.q_proj = changed.requires_grad_(False)
        assert not torch.equal(before, model(**batch.inputs).logits)


def test_train_and_eval_state_are_left_alone():
    model = build("llava")
    for training in (True, False):
        model.train(training)
        with vtr.reduced(model, PLAN):
            assert model.training is training
            model(**batch_of("llava").inputs)
        assert model.training is training
