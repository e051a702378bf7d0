"""A Reduction acts between the beginning and the end of a block, any number of times, and never beside another one on shared modules."""

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

import vtr
from tests.tiny_models import ONE, batch_of, build, model_of, snapshot

pytestmark = pytest.mark.usefixtures("no_gradients")

BATCH = batch_of("llava", ONE)
FULL, SHORT = 46, 19  # 36 visual tokens and 10 of text; 9 of the former are kept


@pytest.fixture
def model():
    return model_of("llava")


def length(model) -> int:
    return model(**BATCH.inputs).logits.shape[1]


def test_nothing_acts_outside_the_block_and_a_block_can_begin_again(model):
    length(model)  # transformers puts hooks of its own on a model when it first runs
    before = snapshot(model)
    reduction = vtr.reduced(model, "divprune", keep=9)
    assert snapshot(model) == before and not reduction.installed and length(model) == FULL
    for _ in range(3):
        with reduction as entered:
            assert entered is reduction and reduction.installed and length(model) == SHORT
        assert snapshot(model) == before and length(model) == FULL


def test_the_report_is_of_the_last_block(model):
    reduction = vtr.reduced(model, "divprune", keep_ratio=0.25, history=True)
    with pytest.raises(
        vtr.VtrError, match=r"no prompt with an image has been run.*call generate or forward first, inside its `with` block"
    ):
        reduction.report()
    with reduction:
        length(model)
        length(model)
    assert len(reduction.reports) == 2 and len(reduction.report().images) == 1
    with reduction, pytest.raises(vtr.VtrError, match="call generate or forward first$"):
        reduction.report()
    with reduction:
        model(**batch_of("llava").inputs)
    assert len(reduction.reports) == 1 and len(reduction.report().images) == 3


def test_each_call_of_a_decorated_function_is_a_block(model):
    reduction = vtr.reduced(model, "divprune", keep=9)

    @reduction
    def measured(deeper: int = 0) -> list[int]:
        """Measures."""
        return [length(model), *(measured(deeper - 1) if deeper else []), length(model)]

    assert measured.__doc__ == "Measures." and length(model) == FULL
    assert measured() == [SHORT, SHORT] and length(model) == FULL
    assert measured(2) == [SHORT] * 6 and length(model) == FULL, "the outermost call ends the reduction"


def test_a_block_ends_with_an_exception_too(model):
    length(model)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), vtr.reduced(model, "fastv", keep=9):
        _ = 1 / 0
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["generator", "coroutine"])
def test_a_function_whose_body_runs_later_is_not_decorated(model, kind):
    def generator():
        yield 1

    async def coroutine():
        return 1

    with pytest.raises(TypeError, match=rf"vtr\.reduced: '{kind}' is a generator or async, whose body runs later; use `with` inside it"):
        vtr.reduced(model, "divprune", keep=9)(generator if kind == "generator" else coroutine)

    class Callable:
        def __call__(self):
            yield 1

    with pytest.raises(TypeError, match=r"is a generator or async, whose body runs later"):
        vtr.reduced(model, "divprune", keep=9)(Callable())
    with pytest.raises(TypeError, match=r"vtr\.reduced: decorates a function, got Tensor"):
        vtr.reduced(model, "divprune", keep=9)(torch.zeros(1))


def test_mistakes_are_raised_where_it_is_made(model):
    for name, settings in (("fast-v", {}), ("fastv", {"keep": 37}), ("fastv", {"layer": 9})):
        with pytest.raises(ValueError, match=r"fast-?v"):
            vtr.reduced(model, name, **settings)


def test_apply_acts_at_once_and_its_block_ends_it(model):
    reduction = vtr.apply(model, "divprune", keep=9)
    assert length(model) == SHORT
    with reduction:
        assert length(model) == SHORT
    assert length(model) == FULL
    with reduction:
        assert length(model) == SHORT
    reduction.install()
    assert length(model) == SHORT
    reduction.remove()
    reduction.remove()
    assert length(model) == FULL and reduction.report().images[0].retained


def test_a_reduction_whose_result_was_dropped_is_named_and_can_be_ended(model):
    vtr.apply(model, "divprune", keep=9)
    with pytest.raises(vtr.VtrError, match=r"reduced already, by divprune\(keep=9,.*vtr\.remove\(model\)"):
        vtr.apply(model, "fastv")
    assert length(model) == SHORT
    vtr.remove(model)
    vtr.remove(model)
    assert length(model) == FULL
    with pytest.raises(TypeError, match=r"vtr\.remove: model must be a torch module, got str"):
        vtr.remove("llava")


def test_it_says_what_it_does(model):
    reduction = vtr.reduced(model, [vtr.create_method("divprune", keep=18), vtr.create_method("fastv", keep=9, layer=1)])
    assert repr(reduction).startswith("Reduction(llava: divprune(keep=18, ") and "fastv(keep=9, " in repr(reduction)
    assert "layer=1" in repr(reduction) and repr(reduction).endswith("; not installed)")
    with reduction:
        assert repr(reduction).endswith("; installed)")


def test_both_ways_show_the_same_arguments():
    assert inspect.signature(vtr.reduced) == inspect.signature(vtr.apply)
    assert list(inspect.signature(vtr.reduced).parameters) == [
        *("model", "method", "history", "processor", "question", "frame_scores", "visuals", "settings")
    ]


def test_the_model_is_looked_at_again_when_a_block_begins():
    model, other = build("llava"), build("llava", text={"num_hidden_layers": 2})
    reduction = vtr.reduced(model, "fastv", keep=9, layer=3)
    with reduction:
        assert length(model) == SHORT
    model.model.language_model = other.model.language_model
    with pytest.raises(ValueError, match=r"fastv: layer 3"), reduction:
        pass
    assert not reduction.installed


def test_two_threads_share_a_decorated_function(model):
    reduction = vtr.reduced(model, "divprune", keep=9)
    inside = threading.Barrier(2, timeout=60)

    @reduction
    def measured(_number: int) -> int:
        inside.wait()
        with torch.no_grad():
            found = length(model)
        inside.wait()
        return found

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(measured, range(2))) == [SHORT, SHORT]
    assert length(model) == FULL


# -- a part and its whole


def parts(kind: str):
    model = build("llava")
    tower = ("expedit", {"alpha": 1, "grid": (3, 3)})
    if kind == "tower":
        return (model.model.vision_tower, *tower), (model, "divprune", {"keep": 9})
    if kind == "inner model":
        return (model.model, "fastv", {"keep": 9}), (model, "divprune", {"keep": 9})
    other = build("llava")
    other.model.vision_tower = model.model.vision_tower
    return (model, "fastv", {"keep": 9}), (other, "divprune", {"keep": 9})


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["tower", "inner model", "shared tower"])
def test_models_that_share_modules_are_not_reduced_apart(kind, turned):
    first, second = parts(kind)[:: -1 if turned else 1]
    assert isinstance(first[0], (CLIPVisionModel, LlavaForConditionalGeneration)) or kind != "tower"
    before = snapshot(second[0])
    with vtr.reduced(first[0], first[1], **first[2]):
        during = snapshot(second[0])
        with pytest.raises(vtr.VtrError, match=rf"reduced already, by {first[1]}\(.*list of methods as a plan"):
            vtr.apply(second[0], second[1], **second[2])
        assert snapshot(second[0]) == during
    assert snapshot(second[0]) == before
    vtr.apply(second[0], second[1], **second[2]).remove()
