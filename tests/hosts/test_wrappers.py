"""Wrappers are looked through: the model inside is reduced, and what is given to the wrapper still counts."""

import functools
import importlib.util

import pytest
import torch
from torch import nn

import vtr
from tests.dense_models import images
from tests.dense_models import model_of as dense_of
from tests.tiny_models import IMAGE, ONE, batch_of, build, generate, model_of, snapshot
from vtr.engine.direct import DirectCalls
from vtr.hosts._protocol import host_of

pytestmark = pytest.mark.usefixtures("no_gradients")

BATCH = batch_of("llava", ONE)
LABELS = BATCH.inputs["input_ids"].masked_fill(BATCH.inputs["input_ids"] == IMAGE, -100)


class Forwarding(nn.Module):
    """Forwards attributes as PEFT does, and calls `forward` of what it holds, past the hooks."""

    def __init__(self, inner: nn.Module, name: str = "base_model") -> None:
        super().__init__()
        self.__dict__["name"] = name
        self._modules[name] = inner

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules[self.__dict__["name"]], name)

    def forward(self, *args, **kwargs):
        return self._modules[self.name].forward(*args, **kwargs)


class Plain(nn.Module):
    """Holds a model as `.module`, as DDP does, and shows nothing of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def as_peft(model: nn.Module) -> nn.Module:
    """PeftModel(base_model=LoraModel(model=...)): two levels, and one of them called like a part of LLaVA."""
    return Forwarding(Forwarding(model, "model"))


WRAPPERS = {
    "peft": as_peft,
    "nested adapters": lambda model: as_peft(as_peft(model)),
    "forwarding": lambda model: Forwarding(model, "anything"),
    "ddp": Plain,
    "ddp around peft": lambda model: Plain(as_peft(model)),
    "data parallel": lambda model: nn.DataParallel(model, device_ids=[]),
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_is_reduced_like_the_model_inside(wrap):
    model = build("llava")
    wrapper = wrap(model)
    before = snapshot(model)
    assert host_of(wrapper).model is model
    with vtr.reduced(wrapper, "fastv", keep=9) as reduction:
        assert repr(reduction).startswith("Reduction(llava: ")
        with pytest.raises(vtr.VtrError, match="reduced already, by fastv"):
            vtr.apply(model, "divprune")
    assert snapshot(model) == before


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "compiled"])
def test_labels_and_generation_through_a_wrapper_are_those_of_the_model(name):
    model = build("llava")
    wrapper = WRAPPERS[name](model)
    with vtr.reduced(model, "fastv", keep=9):
        wanted, answer = model(**BATCH.inputs, labels=LABELS), generate(model, BATCH, 3).sequences
    for given in (wrapper, model):  # what is called is the wrapper, whichever was reduced
        with vtr.reduced(given, "fastv", keep=9):
            found = wrapper(**BATCH.inputs, labels=LABELS)
            assert torch.equal(found.loss, wanted.loss) and torch.equal(found.logits, wanted.logits)
            assert torch.equal(wrapper(**BATCH.inputs).logits, wanted.logits)
            if hasattr(wrapper, "generate"):
                assert torch.equal(generate(wrapper, BATCH, 3).sequences, answer)
    assert wrapper(**BATCH.inputs).logits.shape[1] == 46


def test_an_error_before_forward_does_not_lead_the_next_direct_call_past_the_hooks():
    model = build("llava")
    with vtr.reduced(model, "fastv", keep=9):
        with pytest.raises(TypeError):
            model(**BATCH.inputs, labels=LABELS, nonsense_that_nobody_takes=object(), pixel_values=3)
        wanted = model(**BATCH.inputs, labels=LABELS).loss
        assert torch.equal(model.forward(**BATCH.inputs, labels=LABELS).loss, wanted)
        assert torch.equal(model.forward(**BATCH.inputs, labels=LABELS).loss, wanted)


def test_a_forward_set_inside_the_block_stays():
    model = build("llava")

    with vtr.reduced(model, "fastv", keep=9):
        reduced_forward = model.forward

        @functools.wraps(reduced_forward)
        def mine(*args, **kwargs):
            return reduced_forward(*args, **kwargs)

        model.forward = mine
        assert model(**BATCH.inputs, labels=LABELS).logits.shape[1] == 19
    assert vars(model)["forward"] is mine and model(**BATCH.inputs).logits.shape[1] == 46


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not among the test requirements; `Forwarding` stands in")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads names that transformers has deprecated
def test_adapters_of_peft_stay_active():
    import peft

    base = build("llava")
    plain = base(**BATCH.inputs).logits
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    tuned = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    with vtr.reduced(tuned.get_base_model(), "fastv", keep=9):
        wanted = generate(tuned, BATCH, 4).sequences
        loss = tuned.get_base_model()(**BATCH.inputs, labels=LABELS).loss
    for given in (tuned, tuned.base_model):
        with vtr.reduced(given, "fastv", keep=9):
            assert torch.equal(generate(tuned, BATCH, 4).sequences, wanted)
            assert torch.equal(tuned(**BATCH.inputs, labels=LABELS).loss, loss)
            with tuned.disable_adapter():
                assert not torch.equal(tuned(**BATCH.inputs, labels=LABELS).loss, loss)
    with tuned.disable_adapter():
        assert torch.equal(tuned(**BATCH.inputs).logits, plain)


class Around(nn.Module):
    """Around the LLM alone, as adapters are put on it: forwards calls and attributes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)  # passes by the hooks of what is inside, as PEFT does

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.mark.parametrize(("method", "settings"), [("divprune", {"keep": 9}), ("fastv", {"keep": 9}), ("shortv", {"layers": (2, 3)})])
def test_a_wrapper_of_the_llm_alone_is_looked_through(method, settings):
    model = build("llava")
    with vtr.reduced(model, method, **settings):
        wanted = generate(model, BATCH, 4)
    model.model.language_model = Around(model.model.language_model)
    with vtr.reduced(model, method, **settings):
        found = generate(model, BATCH, 4)
        layers = model.model.language_model.layers
        model.model.language_model.inner.layers = nn.ModuleList(reversed(layers))
        with pytest.raises(vtr.VtrError, match="the model's layers were replaced"):
            model(**BATCH.inputs)
        model.model.language_model.inner.layers = layers
    assert torch.equal(found.sequences, wanted.sequences) and torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))


PARTS = {
    "layers": lambda model: [layer.compile(backend="eager") for layer in model.model.language_model.layers],
    "attention": lambda model: model.model.language_model.layers[1].self_attn.compile(backend="eager"),
    "LLM": lambda model: setattr(model.model, "language_model", torch.compile(model.model.language_model, backend="eager")),
    "tower": lambda model: model.model.vision_tower.compile(backend="eager"),
    "MLP": lambda model: model.model.language_model.layers[1].mlp.compile(backend="eager"),
}


@pytest.mark.parametrize(
    ("part", "method", "refused"),
    [
        ("layers", "fastv", "LlamaDecoderLayer"),
        ("layers", "divprune", ""),
        ("attention", "pyramiddrop", "LlamaAttention"),
        ("LLM", "divprune", "LlamaModel"),
        ("tower", "divprune", ""),
        ("tower", "visionzip", "CLIPVisionModel"),
        ("tower", "tome", "CLIPVisionModel"),
        ("MLP", "fastv", ""),
    ],
)
def test_a_part_that_is_compiled_by_itself_is_refused_where_the_plan_acts_in_it(part, method, refused):
    """Nothing runs: hooks in such a part would see a call without its beginning, and remove nothing without a word."""
    model = build("llava")
    PARTS[part](model)
    if refused:
        with pytest.raises(
            vtr.VtrError, match=f"{refused} is compiled by itself .*compile the whole model, or use a method that acts elsewhere"
        ):
            vtr.reduced(model, method, keep=9)
    else:
        vtr.reduced(model, method, keep=9)
    model.compile(backend="eager")
    vtr.reduced(model, method, keep=9)
    torch.compiler.reset()


def test_hooks_that_accelerate_sets_on_the_model_stay():
    hooks = pytest.importorskip("accelerate.hooks")
    model, calls = build("llava"), []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    with vtr.reduced(model, "fastv", keep=9):
        wanted = model(**BATCH.inputs, labels=LABELS)
    for module in (model, model.model, model.model.language_model, *model.model.language_model.layers):
        hooks.add_hook_to_module(module, Counting())
    with vtr.reduced(model, "fastv", keep=9):
        found = model(**BATCH.inputs, labels=LABELS)
    assert torch.equal(found.loss, wanted.loss) and len(calls) == 8
    hooks.remove_hook_from_module(model, recurse=True)
    assert model(**BATCH.inputs).logits.shape[1] == 46


def test_a_wrapper_of_two_models_or_none_is_refused_by_name():
    two = nn.ModuleDict({"first": build("llava"), "second": build("llava")})
    with pytest.raises(vtr.VtrError, match=r"ModuleDict holds 2 models with a host \(first, second\); give one of them"):
        vtr.reduced(two, "fastv")
    forwarding = Forwarding(two["first"])
    forwarding.other = two["second"]
    with pytest.raises(vtr.VtrError, match=r"Forwarding holds 2 models with a host \(base_model, other\); give one of them"):
        vtr.reduced(forwarding, "fastv")
    with pytest.raises(vtr.VtrError, match=r"no host for 'Linear'; known: .*llava"):
        vtr.reduced(nn.Linear(2, 2), "fastv")
    with pytest.raises(vtr.VtrError, match=r"no host for 'llama'"):
        vtr.reduced(as_peft(model_of("llava").model.language_model), "fastv")


def test_one_model_held_twice_is_one_model():
    model = build("llava")
    wrapper = Forwarding(model)
    wrapper.again = Plain(model)
    assert host_of(wrapper).model is model


def test_a_wrapper_that_hides_its_model_is_refused():
    class Hiding(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.__dict__["hidden"] = [model]

        def __getattr__(self, name: str):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.__dict__["hidden"][0], name)

    with pytest.raises(vtr.VtrError, match=r"Hiding wraps a model that is not among its modules; give that model itself"):
        vtr.reduced(Hiding(model_of("llava")), "fastv")

    class Configured(nn.Module):
        config = model_of("llava").config

    with pytest.raises(vtr.VtrError, match=r"Configured is not built as the host for 'llava' knows it: .*'vision_tower'"):
        vtr.reduced(Configured(), "fastv")


def test_a_wrapped_vit_is_reduced():
    vit = dense_of("ViT")
    for wrapper in (Plain(vit), as_peft(vit), Plain(as_peft(vit))):
        assert host_of(wrapper).model is vit


def test_hooks_that_were_compiled_leave_no_mark_and_the_call_still_arrives(monkeypatch):
    """Where a compiler gives up behind the hooks, `forward` comes without the mark of the call that it belongs to."""
    module, undo, compiling = nn.Linear(2, 2), [], []
    DirectCalls(module).install(undo)
    module.register_forward_pre_hook(lambda *_: compiling.append(True), prepend=True)
    module.register_forward_pre_hook(lambda *_: compiling.clear())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: bool(compiling))
    given = torch.ones(1, 2)
    assert torch.equal(module(given), nn.functional.linear(given, module.weight, module.bias))
    for put_back in undo:
        put_back()


def replica_of(model: nn.Module) -> nn.Module:
    """What `torch.nn.parallel.replicate` makes of a model for one device, on this one."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            copy._modules[name] = None if child is None else copies[child]
            vars(copy)[name] = copy._modules[name]
        for name, parameter in module._parameters.items():
            vars(copy)[name] = parameter
    return copies[model]


def test_replicas_that_share_a_reduction_are_refused():
    model = build("llava")
    with vtr.reduced(model, "fastv", keep=9):
        wanted = model(**BATCH.inputs).logits
        with pytest.raises(
            vtr.VtrError, match="replica of a reduced LlavaForConditionalGeneration was called, .* DataParallel with one device"
        ):
            replica_of(model)(**BATCH.inputs)
        assert torch.equal(model.forward(**BATCH.inputs).logits, wanted)
    with vtr.reduced(model.model, "fastv", keep=9), pytest.raises(vtr.VtrError, match="replica of a reduced LlavaModel was called"):
        replica_of(model)(**BATCH.inputs)


@pytest.mark.parametrize("kind", ["ViT", "timm"])
def test_replicas_of_a_reduced_vit_are_refused(kind):
    model = dense_of(kind)
    pixels = images()
    with vtr.reduced(model, "expedit", alpha=1, grid=(3, 3)):
        model(pixels)
        with pytest.raises(vtr.VtrError, match="replica of a reduced .* was called"):
            replica_of(model)(pixels)
        model(pixels)


def test_data_parallel_over_several_devices_is_refused():
    wrapper = nn.DataParallel(build("llava"), device_ids=[])
    wrapper.device_ids = [0, 1]
    for call in (vtr.plan, vtr.apply):
        with pytest.raises(
            vtr.VtrError, match="DataParallel over 2 devices runs replicas, which would share one reduction; use one process"
        ):
            call(wrapper, "fastv", keep=9)
