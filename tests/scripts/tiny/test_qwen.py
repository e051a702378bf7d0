"""The recipe of tiny-qwen-vl: its start from a LLaVA, its training layouts, and what it writes."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from scripts.tiny import batches, qwen_recipe, qwen_run
from scripts.tiny.export import export
from scripts.tiny.model import Sizes, build_model, llm_pass
from scripts.tiny.qwen import QwenSizes, build_qwen, first_layer, mrope_positions, qwen_tower_pass, start_from
from scripts.tiny.tokenizer import build_qwen_processor, build_tokenizer
from vtr.data.scenes import CANVAS, Dice
from vtr.data.shapes import ASKERS, split_samples

SMALL = QwenSizes(width=32, tower_layers=3, llm_layers=3, tower_intermediate=128, intermediate=64, full=(1,), mrope=(1, 1, 2))
LLAVA = Sizes(width=32, tower_layers=3, llm_layers=2, intermediate=64)
SHORT = tuple(replace(stage, steps=2, batch=2) for stage in qwen_recipe.STAGES)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(qwen=True)


def small(tokenizer):
    torch.manual_seed(0)
    return build_qwen(tokenizer, SMALL).eval()


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A small LLaVA with random weights, as a folder."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(1)
    export(build_model(build_tokenizer(), LLAVA), folder)
    return folder


@pytest.fixture(scope="module")
def picture():
    return split_samples("validation", limit=1)[0].image


def pixels_of(inputs) -> torch.Tensor:
    """The picture `(1, 3, H, W)` behind the patches of the processor."""
    _, rows, cols = inputs["image_grid_thw"][0].tolist()
    patches = inputs["pixel_values"].view(rows // 2, cols // 2, 2, 2, 3, 2, 8, 8)
    assert torch.equal(patches[..., 0, :, :], patches[..., 1, :, :])
    return patches[..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, rows * 8, cols * 8)


@pytest.mark.parametrize("size", [(384, 384), (224, 112), (80, 144)])
def test_the_tower_in_training_is_that_of_transformers(tokenizer, picture, size):
    inputs = build_qwen_processor().image_processor(images=[picture.resize(size)], return_tensors="pt")
    visual = small(tokenizer).model.visual
    with torch.no_grad():
        theirs = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        _, ours = qwen_tower_pass(visual, pixels_of(inputs))
    torch.testing.assert_close(ours[0], theirs, atol=1e-4, rtol=1e-4)


def test_training_pictures_are_what_the_processor_makes(picture):
    inputs = build_qwen_processor().image_processor(images=[picture], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 24, 24]]
    np.testing.assert_allclose(batches.normalised(np.asarray(picture), 2), pixels_of(inputs)[0], atol=0.02)


def test_packed_questions_are_answered_as_alone(tokenizer):
    """Logits of the training layout equal those of the plain model on each question's own prompt."""
    model, processor = small(tokenizer), build_qwen_processor()
    sample = split_samples("validation", limit=1)[0]
    asked = [q for asker in ASKERS.values() for q in asker(Dice(0, 0), sample.scene)[:1]]
    packer = batches.Packer(tokenizer)
    packed = packer.pack([asked])
    image = sample.image.resize((160, 96))
    seen = processor.image_processor(images=[image], return_tensors="pt")
    where = mrope_positions(torch.arange(60)[None], 10, len(packer.head))
    with torch.no_grad():
        _, visual = qwen_tower_pass(model.model.visual, pixels_of(seen))
        logits, _ = llm_pass(model, visual, where, packed | {"start": torch.tensor([len(packer.head) + 10])})
        at = 0
        for question in asked:
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            alone = processor(images=[image], text=[f"{prompt} {question.answer}"], return_tensors="pt")
            count = len(tokenizer(question.answer, add_special_tokens=False)["input_ids"]) + 1
            torch.testing.assert_close(logits[at : at + count], model(**alone).logits[0, -count:], atol=1e-4, rtol=1e-4)
            at += count
        both = torch.tensor(packer.head), packed | {"start": torch.tensor([0])}
        assert at == len(logits) and first_layer(model, visual, where, both[0]).shape == visual.shape


def test_it_starts_as_what_fits_of_the_llava(tokenizer, llava):
    """Without CLS, positions and the turning of queries and keys, a seeded block is the CLIP layer, and the merger the projector."""
    teacher = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).eval()
    model, pixels = small(tokenizer), batches.Batches(None, 1, 2, CANVAS // 2, others=())[0]["pixels"]
    pixels = torch.nn.functional.interpolate(pixels, (192, 192))
    with torch.no_grad():
        teacher.model.vision_tower.encoder.layers[0].layer_norm1.bias.normal_()
        start_from(model, teacher, pixels)
        hidden = torch.randn(1, 16, 32)
        hidden -= hidden.mean(-1, keepdim=True)
        layer, block = teacher.model.vision_tower.encoder.layers[0], model.model.visual.blocks[1]
        torch.testing.assert_close(block.attn.qkv(block.norm1(hidden))[..., :32], layer.self_attn.q_proj(layer.layer_norm1(hidden)))
        theirs = layer.mlp(layer.layer_norm2(hidden))
        plain = torch.zeros_like(block.mlp.up_proj.weight)
        block.mlp.up_proj.weight.copy_(plain)
        torch.testing.assert_close(block.mlp(block.norm2(hidden)), theirs - theirs.mean(-1, keepdim=True), atol=0.02, rtol=0)
        words = torch.tensor([[5, 6, 40]])
        ours = model.model.language_model(inputs_embeds=model.get_input_embeddings()(words)).last_hidden_state
        torch.testing.assert_close(model.lm_head(ours)[..., :206], teacher(words).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(llava, tmp_path: Path):
    whole = qwen_run.trainer(tmp_path / "whole", llava, stages=SHORT, sizes=SMALL)
    assert whole.run() and not whole.left
    first = qwen_run.trainer(tmp_path / "cut", llava, stages=SHORT, sizes=SMALL)
    first.save_every_s, loss = 0, first.loss

    def dying(stage, step: int, batch):
        if (stage.name, step) == ("qwen192", 1):
            raise KeyboardInterrupt
        return loss(stage, step, batch)

    first.loss = dying
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = qwen_run.trainer(tmp_path / "cut", llava, stages=SHORT, sizes=SMALL)
    assert again.left == ["qwen192", "qwen-whole"] and again.done["qwen192"] == 1
    again.run()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_the_recipe_writes_a_checkpoint_that_answers(llava, tmp_path: Path):
    stages = tuple(replace(stage, steps=10_000, batch=2) for stage in qwen_recipe.STAGES)
    begun = time.time()
    qwen_run.train(tmp_path / "tiny", tmp_path / "state", llava, until=begun + 6, stages=stages, sizes=SMALL)  # stages end by the clock
    assert time.time() - begun < 60
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny"), AutoProcessor.from_pretrained(tmp_path / "tiny")
    assert model.config.model_type == "qwen2_5_vl" and model.dtype == torch.float16 and processor.tokenizer.padding_side == "left"
    samples = split_samples("examples", limit=1)[:2]
    images = [samples[0].image, samples[1].image.resize((160, 96))]
    contents = [[{"type": "image"}, {"type": "text", "text": sample.question}] for sample in samples]
    prompts = [processor.apply_chat_template([{"role": "user", "content": one}], add_generation_prompt=True) for one in contents]
    assert prompts[0].endswith("<|image_pad|><|vision_end|>" + samples[0].question + " ASSISTANT:")
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [144, 60]
    assert model.float().generate(**inputs, max_new_tokens=4).shape[0] == 2
    with pytest.raises(ValueError, match="unknown stage 'whole'; choose from qwen-tower"):
        qwen_run.train(tmp_path / "tiny", tmp_path / "state", llava, stage="whole")
