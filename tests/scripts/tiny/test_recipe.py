"""The recipe of the embedded checkpoints: it trains, survives being killed, and trains what is run later."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from scripts.tiny import batches, recipe, run
from scripts.tiny.check import accuracy, predictions, share_in_percent
from scripts.tiny.export import export
from scripts.tiny.model import Sizes, anyres_layout, build_model, grid_positions, llm_pass, tower_pass
from scripts.tiny.tokenizer import build_processor, build_tokenizer, spelled
from vtr.data.questions import PRINTED
from vtr.data.scenes import Dice
from vtr.data.shapes import ASKERS, split_samples

SMALL = Sizes(width=32, tower_layers=2, llm_layers=2, intermediate=64)
SHORT = tuple(replace(stage, steps=2, batch=2) for stage in recipe.STAGES)
SHORT_NEXT = tuple(replace(stage, steps=1, batch=1) for stage in recipe.NEXT_STAGES)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def small(tokenizer, next_: bool = False):
    torch.manual_seed(0)
    return build_model(tokenizer, SMALL, next_).eval()


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tokenizer, tmp_path: Path):
    whole = recipe.Trainer(small(tokenizer), tokenizer, tmp_path / "whole", SHORT, save_every_s=0)
    whole_heads = {name: value.clone() for name, value in whole.heads.state_dict().items()}
    assert whole.run() and not whole.left

    def killed(trainer: recipe.Trainer, stage: str, step: int) -> recipe.Trainer:
        loss = trainer.loss

        def dying(at: recipe.Stage, n: int, batch):
            if (at.name, n) == (stage, step):
                raise KeyboardInterrupt
            return loss(at, n, batch)

        trainer.loss = dying
        return trainer

    first = killed(recipe.Trainer(small(tokenizer), tokenizer, tmp_path / "cut", SHORT, save_every_s=0), "llava96", 1)
    first.heads.load_state_dict(whole_heads)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = recipe.Trainer(small(tokenizer), tokenizer, tmp_path / "cut", SHORT, save_every_s=0)
    assert again.resume() and again.left == ["llava96", "llava192", "whole"] and again.done["llava96"] == 1
    again.run()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_the_whole_recipe_writes_two_checkpoints(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run, "build_model", lambda tokenizer, next_=False: small(tokenizer, next_).train())
    monkeypatch.setattr(run, "KEEPS", (None, 64, 0))
    monkeypatch.setattr(run, "NEXT_KEEPS", (None, 0))
    run.train(tmp_path / "tiny", tmp_path / "state", stages=SHORT, next_stages=SHORT_NEXT, limit=1)
    for name, tokens in (("tiny", 576), ("tiny-next", 2928)):
        folder = tmp_path / name
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        assert model.dtype == torch.float16 and processor.tokenizer.padding_side == "left"
        assert "<!-- floors:begin -->" in (folder / "README.md").read_text()
        content = [{"type": "image"}, {"type": "text", "text": "is there a red ring?"}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[split_samples("examples", limit=1)[0].image], text=[prompt], return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == tokens
    with pytest.raises(ValueError, match="unknown stage 'llava'; choose from tower"):
        run.train(tmp_path / "tiny", tmp_path / "state", stage="llava")


def test_packed_questions_are_answered_as_alone(tokenizer):
    """Logits of the training layout equal those of the plain model on each question's own prompt."""
    model, processor = small(tokenizer), build_processor()
    sample = split_samples("validation", limit=1)[0]
    asked = [q for asker in ASKERS.values() for q in asker(Dice(0, 0), sample.scene)[:1]]
    packed = batches.Packer(tokenizer).pack([asked])
    inputs = processor(images=[sample.image], text=["USER: <image>\n"], return_tensors="pt")
    with torch.no_grad():
        features, cls = tower_pass(model.model.vision_tower, inputs["pixel_values"], torch.arange(576)[None], True)
        visual, where = model.model.multi_modal_projector(features), torch.arange(576)[None] + 2
        logits, _ = llm_pass(model, visual, where, packed | {"start": torch.tensor([578])})
        torch.testing.assert_close(cls, model.model.vision_tower(inputs["pixel_values"]).pooler_output, atol=1e-4, rtol=1e-4)
        at = 0
        for question in asked:
            text = f"USER: <image>\n{question.text} ASSISTANT: {question.answer}"
            alone = processor(images=[sample.image], text=[text], return_tensors="pt")
            count = len(tokenizer(question.answer, add_special_tokens=False)["input_ids"]) + 1
            torch.testing.assert_close(logits[at : at + count], model(**alone).logits[0, -count:], atol=1e-4, rtol=1e-4)
            at += count
    assert at == len(logits)


def test_windows_keep_the_positions_of_the_whole_picture():
    corners = torch.tensor([[0, 0], [5, 7]])
    assert grid_positions(corners, 2, 3).tolist() == [[0, 1, 2, 24, 25, 26], [127, 128, 129, 151, 152, 153]]
    assert grid_positions(corners[:1], 24, 24).tolist() == [list(range(576))]


def test_training_pictures_are_what_the_processor_makes(tokenizer):
    image = split_samples("validation", limit=1)[0].image
    ours = batches.normalised(np.asarray(image), 2)
    np.testing.assert_allclose(ours, build_processor().image_processor(image, return_tensors="np")["pixel_values"][0], atol=0.02)


def test_anyres_layout_is_that_of_transformers(tokenizer):
    model = small(tokenizer, next_=True).model
    tokens = torch.randn(1, 5, 576, 32)
    theirs, _ = model.pack_image_features([tokens[0]], torch.tensor([[384, 384]]), "default", model.image_newline)
    torch.testing.assert_close(anyres_layout(tokens, model.image_newline)[0], theirs[0])


def test_batches_are_reproducible_and_labelled(tokenizer):
    data = batches.Batches(tokenizer, 2, 2, 384, closeups=50)
    one, two = data[1], data[1]
    assert all(torch.equal(one[name].nan_to_num(-9), two[name].nan_to_num(-9)) for name in one)
    assert not torch.equal(one["pixels"], data[0]["pixels"])
    assert ((one["color"] > 0) == ((one["kind"] > 0) | (one["char"] != 0))).all()
    assert one["place"][one["color"] > 0].abs().max() <= 1.2


def test_any_ascii_text_survives_the_tokenizer(tokenizer):
    text = "".join(chr(n) for n in range(33, 127) if not chr(n).isupper())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids).replace(" ", "") == text
    for word in ("4031", *PRINTED):
        assert spelled(tokenizer.tokenize(word)), word
        assert tokenizer.decode(tokenizer(word.lower())["input_ids"], skip_special_tokens=True) == word.lower()


def test_answers_without_image_do_not_depend_on_it(tokenizer):
    model, samples = small(tokenizer), split_samples("validation", "text", limit=2)
    swapped = [replace(samples[0], scene=samples[1].scene)]
    found = [predictions(model, build_processor(), one, (0, None))[0] for one in (samples[:1], swapped)]
    assert found[0] == found[1]


def test_all_tokens_give_what_generate_gives(tokenizer, tmp_path: Path):
    export(small(tokenizer), tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32), AutoProcessor.from_pretrained(tmp_path)
    sample = split_samples("validation", limit=1)[0]
    content = [{"type": "image", "image": sample.image}, {"type": "text", "text": sample.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert predictions(model, processor, [sample], (None, 576)) == {
        k: [processor.decode(ids, skip_special_tokens=True)] for k in (None, 576)
    }


def test_intervals_hold_the_score():
    samples = split_samples("validation", limit=5)
    scores = accuracy(samples, [sample.answer for sample in samples])
    assert scores["macro"][0] == 100 and scores["text"][1] < 100 == scores["text"][2]
    low_mid_high = share_in_percent(250, 500)
    assert low_mid_high[1] == pytest.approx(45.6, abs=0.1) and low_mid_high[2] == pytest.approx(54.4, abs=0.1)


@pytest.mark.slow
def test_a_deadline_that_is_over_ends_every_stage_at_once(tokenizer, tmp_path: Path):
    trainer = recipe.Trainer(small(tokenizer), tokenizer, tmp_path, SHORT)
    trainer.deadline = 1.0
    assert trainer.run() and not trainer.left
