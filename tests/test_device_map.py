"""Models split over devices by accelerate: with weights offloaded to CPU or disk, and over CPU and GPU where there is one."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

import vtr
from tests import tiny_models
from tests.marks import quick_first
from tests.probes import ByAttention, EveryNth, Freeze, MergePairs, Ragged, TowerTop
from tests.tiny_models import batch_of, build, generate, model_of

pytestmark = pytest.mark.usefixtures("no_gradients")

PLANS = {
    "boundary and layer": [Ragged(), ByAttention(keep=5)],
    "tower": [TowerTop(), EveryNth()],
    "merge": [MergePairs(stage="tower", layer=1), MergePairs(stage="prefill", layer=2)],
    "frozen": [EveryNth(), Freeze(layers=(0, 1, 3)), EveryNth(stage="prefill", layer=4)],
    "renumbered": [EveryNth(position_ids="renumber"), EveryNth(stage="prefill", layer=2, position_ids="renumber")],
}


@pytest.fixture(scope="module", params=quick_first(["llava_next", "llava"]))
def checkpoint(request, tmp_path_factory):
    """A tiny checkpoint on disk and the kind it is of."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build(request.param).save_pretrained(folder)
    return folder, request.param


def spread(kind: str, *devices: str) -> dict[str, str]:
    """The model's parts over the devices, the LLM's layers in turn."""
    places = {"model.vision_tower": devices[0], "model.multi_modal_projector": devices[0], "lm_head": devices[0]}
    if "next" in kind:
        places["model.image_newline"] = devices[0]
    places |= {f"model.language_model.{name}": devices[0] for name in ("embed_tokens", "norm", "rotary_emb")}
    places |= {f"model.language_model.layers.{i}": devices[i % len(devices)] for i in range(tiny_models.LAYERS)}
    return places


@pytest.mark.parametrize("plan", quick_first(PLANS.values(), 2), ids=PLANS)
def test_weights_on_disk(checkpoint, plan, tmp_path):
    folder, kind = checkpoint
    model = AutoModelForImageTextToText.from_pretrained(folder, device_map=spread(kind, "cpu", "disk"), offload_folder=tmp_path)
    assert any(weight.is_meta for weight in model.parameters()), "nothing is offloaded"
    batch = batch_of(kind)
    with vtr.reduced(model_of(kind), plan):
        expected = generate(model_of(kind), batch, 3)
    generate(model, batch, 2)  # transformers leaves hooks of its own
    before = tiny_models.snapshot(model)
    with vtr.reduced(model, plan):
        answer = generate(model, batch, 3)
    assert torch.equal(answer.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(answer.logits), torch.stack(expected.logits), atol=2e-5, rtol=0)
    assert {name: state[1:] for name, state in tiny_models.snapshot(model).items()} == {name: state[1:] for name, state in before.items()}


@pytest.mark.parametrize("plan", quick_first(PLANS.values()), ids=PLANS)
def test_whole_model_offloaded_to_the_cpu(plan):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model, batch = build("llava"), batch_of("llava")
    with vtr.reduced(model, plan):
        expected = generate(model, batch, 3)
        remove_hook_from_submodules(cpu_offload(model, execution_device=torch.device("cpu")))  # under a reduction: ours stay in place
        assert torch.equal(generate(model, batch, 3).sequences, expected.sequences)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with vtr.reduced(model, plan):
        assert torch.equal(generate(model, batch, 3).sequences, expected.sequences)


@pytest.mark.gpu
@pytest.mark.parametrize("places", [("cuda:0", "cpu"), ("cuda:0", "disk"), ("cuda:0",)], ids=str)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_gpu_and_offload_give_the_result_of_the_cpu(checkpoint, plan, places, tmp_path):
    folder, kind = checkpoint
    model = AutoModelForImageTextToText.from_pretrained(folder, device_map=spread(kind, *places), offload_folder=tmp_path)
    batch = batch_of(kind)
    with vtr.reduced(model_of(kind), plan) as reduction:
        expected = generate(model_of(kind), batch, 3)
        told = reduction.report().to_dict()
    with vtr.reduced(model, plan) as reduction:
        moved = batch.changed(**{name: value.to("cuda:0") for name, value in batch.inputs.items()})
        answer = generate(model, moved, 3)
        assert reduction.report().to_dict()["images"] == told["images"]
    torch.testing.assert_close(torch.stack(answer.logits).cpu(), torch.stack(expected.logits), atol=2e-3, rtol=0)
