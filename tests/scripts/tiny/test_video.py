"""The recipe of tiny-llava-video: its start from a LLaVA, its training layouts, what it writes, and how its floors are measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from scripts.tiny import batches, video_check, video_recipe, video_run
from scripts.tiny.export import export
from scripts.tiny.model import Sizes, build_model, llm_pass
from scripts.tiny.tokenizer import build_tokenizer, build_video_processor
from scripts.tiny.video import PER_FRAME, ClipBatches, build_video, facts, frame_features, start_from, token_labels
from vtr.data.clip_questions import ASKERS
from vtr.data.clips import TICKS, compose_clip, draw_clip
from vtr.data.scenes import Dice
from vtr.data.shapes_video import FAMILIES, split_samples

SMALL = Sizes(width=32, tower_layers=3, llm_layers=5, heads=2, intermediate=64)
SHORT = tuple(replace(stage, steps=3, batch=2) for stage in video_recipe.STAGES)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(video=True)


@pytest.fixture(scope="module")
def sample():
    return split_samples("validation", limit=1)[0]


def small(tokenizer):
    torch.manual_seed(0)
    return build_video(tokenizer, SMALL).eval()


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A small LLaVA with random weights, as a folder."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(1)
    export(build_model(build_tokenizer(), SMALL), folder)
    return folder


def test_the_words_of_tiny_llava_keep_their_tokens(tokenizer):
    old = build_tokenizer().get_vocab()
    assert {word: tokenizer.get_vocab()[word] for word in old} == old
    for clip in (compose_clip(Dice(3, n)) for n in range(10)):
        for question in (q for family in ("order", "motion", "events", "attribute") for q in ASKERS[family](clip)):
            words = [word for word in tokenizer.tokenize(f"{question.text} {question.answer}") if word not in ("o", "##r")]
            assert not [word for word in words if word.startswith("##")]


def test_it_starts_as_tiny_llava_with_its_positions_in_the_middle(tokenizer, llava):
    teacher = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).eval()
    model = small(tokenizer)
    start_from(model, teacher, tokenizer)
    words = torch.tensor([[5, 6, 40]])
    with torch.no_grad():
        ours, theirs = model(words).logits, teacher(words).logits
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs)
    grid = teacher.model.vision_tower.embeddings.position_embedding.weight[1:].view(24, 24, -1)
    torch.testing.assert_close(model.model.vision_tower.embeddings.position_embedding.weight[1:], grid[6:18, 6:18].reshape(144, -1))
    up, above = (tokenizer.convert_tokens_to_ids(word) for word in ("up", "above"))
    assert torch.nn.functional.cosine_similarity(*model.get_input_embeddings().weight[[up, above]], dim=0) > 0.8
    with pytest.raises(ValueError, match=r"tiny-llava has no .*layers"):
        start_from(build_video(tokenizer, replace(SMALL, tower_layers=4)), teacher, tokenizer)


def test_training_frames_are_what_the_processor_makes(tokenizer, sample):
    model = small(tokenizer)
    seen = build_video_processor().video_processor([sample.frames], do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
    ours = np.stack([batches.normalised(picture, 2) for picture in draw_clip(sample.clip)])
    np.testing.assert_allclose(ours, seen[0], atol=0.03)
    with torch.no_grad():
        features = model.model.multi_modal_projector(frame_features(model.model.vision_tower, seen[0]))
        theirs = torch.stack(tuple(model.model.get_video_features(seen).pooler_output)).view_as(features)
    torch.testing.assert_close(features, theirs, atol=1e-5, rtol=1e-5)


def test_packed_questions_are_answered_as_alone(tokenizer, sample):
    """Logits of the training layout equal those of the plain model on each question's own prompt."""
    model, processor = small(tokenizer), build_video_processor()
    asked = [question for asker in ASKERS.values() for question in asker(sample.clip)[:1]]
    packed = batches.Packer(tokenizer, FAMILIES).pack([asked], [facts(sample.clip)])
    frames = sample.frames
    seen = processor.video_processor([frames], do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
    count = TICKS * PER_FRAME
    with torch.no_grad():
        visual = model.model.multi_modal_projector(frame_features(model.model.vision_tower, seen[0])).view(1, count, -1)
        logits, _ = llm_pass(model, visual, torch.arange(count)[None] + 2, packed | {"start": torch.tensor([count + 2])})
        at = 0
        for question in asked:
            content = [{"type": "video"}, {"type": "text", "text": question.text}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            alone = processor(videos=[frames], text=[f"{prompt} {question.answer}"], do_sample_frames=False, return_tensors="pt")
            assert int((alone["input_ids"] == model.config.video_token_id).sum()) == count
            targets = len(tokenizer(question.answer, add_special_tokens=False)["input_ids"]) + 1
            torch.testing.assert_close(logits[at : at + targets], model(**alone).logits[0, -targets:], atol=1e-4, rtol=1e-4)
            at += targets
    assert at == len(logits)


def test_every_second_batch_is_the_one_before_backwards(tokenizer):
    made = ClipBatches(tokenizer, 4, 2, small(tokenizer).model.vision_tower, longer=0)
    there, back = made[2], made[3]
    assert there["features"].shape == (2, TICKS, PER_FRAME, 32)
    torch.testing.assert_close(there["features"].flip(1), back["features"])
    torch.testing.assert_close(there["objects"].view(2, TICKS, -1).flip(1), back["objects"].view(2, TICKS, -1))
    assert not torch.equal(there["counts"].view(2, TICKS, -1).flip(1), back["counts"].view(2, TICKS, -1))
    assert made[2]["ids"].equal(there["ids"]) and there["family"].unique().tolist() == list(range(len(FAMILIES)))
    longer = ClipBatches(tokenizer, 2, 4, longer=100)[0]
    assert longer["pixels"].shape == (2, 16, 3, 96, 96) and longer["counts"].shape == (2, 16 * PER_FRAME)


def test_facts_of_a_clip_and_of_its_opposite():
    clip = compose_clip(Dice(4, 4))
    there, back = facts(clip), facts(clip.backwards())
    for name, values in there.items():
        np.testing.assert_allclose(back[name][2:5], -values[2:5], atol=1e-6)  # when it comes, where it moves
        assert back[name][5] == values[5]
    (blinking,) = clip.of("blinking")
    assert there[blinking.name][5] == sum(blinking.shown) - 2


def test_labels_count_the_ticks_in_which_an_item_has_been_there():
    for n in range(10):
        clip = compose_clip(Dice(4, n), 16)
        _, counts = token_labels(clip)
        assert counts[counts != batches.IGNORED].min() == 0
        (blinking,) = clip.of("blinking")
        x, y = (at * 6 // 192 for at in (blinking.item.x, blinking.item.y))
        found = counts.reshape(16, 6, 6)[:, y, x]
        seen = np.repeat(blinking.shown, 2)
        np.testing.assert_array_equal(found[seen], np.repeat(np.cumsum(blinking.shown) - 1, 2)[seen])


def test_whole_frames_and_single_tokens_are_pruned(tokenizer, tmp_path: Path):
    trainer = video_recipe.VideoTrainer(small(tokenizer), tokenizer, tmp_path)
    frames = trainer._kept(replace(SHORT[1], whole_frames=100), 0, Dice(0, 0), (3, 288), 1)
    assert frames.shape[1] % PER_FRAME == 0 and (frames.view(3, -1, PER_FRAME) // PER_FRAME).unique(dim=2).shape[2] <= TICKS
    assert (frames.view(3, -1, PER_FRAME) % PER_FRAME == torch.arange(PER_FRAME)).all()
    single = trainer._kept(replace(SHORT[1], whole_frames=0), 0, Dice(0, 0), (3, 288), 1)
    assert (single.diff(dim=1) > 0).all() and 28 <= single.shape[1] <= 288


@pytest.mark.slow
def test_a_killed_run_goes_on_and_writes_a_checkpoint_that_answers(llava, tmp_path: Path, sample):
    whole = video_run.trainer(tmp_path / "whole", llava, stages=SHORT, sizes=SMALL)
    tower = {name: value.clone() for name, value in whole.model.model.vision_tower.state_dict().items()}
    assert whole.run() and not whole.left
    assert all(torch.equal(value, tower[name]) for name, value in whole.model.model.vision_tower.state_dict().items())
    first = video_run.trainer(tmp_path / "cut" / "tiny-llava-video", llava, stages=SHORT, sizes=SMALL)
    first.save_every_s, loss = 0, first.loss

    def dying(stage, step: int, batch):
        if (stage.name, step) == (SHORT[1].name, 1):
            raise KeyboardInterrupt
        return loss(stage, step, batch)

    first.loss = dying
    with pytest.raises(KeyboardInterrupt):
        first.run()
    video_run.train(tmp_path / "tiny", tmp_path / "cut", llava, only_export=True, stages=SHORT, sizes=SMALL)
    assert (tmp_path / "tiny" / "config.json").exists()
    video_run.train(tmp_path / "tiny", tmp_path / "cut", llava, stages=SHORT, sizes=SMALL)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny"), AutoProcessor.from_pretrained(tmp_path / "tiny")
    assert model.config.model_type == "llava_next_video" and model.dtype == torch.float16
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name].float(), value, atol=2e-3, rtol=2e-3, msg=name)
    content = [{"type": "video"}, {"type": "text", "text": sample.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == f"USER: <video>\n{sample.question} ASSISTANT:"
    inputs = processor(videos=[sample.frames], text=prompt, do_sample_frames=False, return_tensors="pt")
    assert model.float().generate(**inputs, max_new_tokens=4).shape[0] == 1


def test_choices_of_frames():
    order = torch.rand(2, TICKS * PER_FRAME, generator=torch.Generator().manual_seed(0))
    chosen = {name: choose(order) for name, choose in video_check.choices(TICKS).items()}
    frames = {name: (one.kept // PER_FRAME)[:, ::PER_FRAME] if one.kept.shape[1] else None for name, one in chosen.items()}
    assert torch.equal(chosen["full"].kept[0], torch.arange(288)) and chosen["none"].length == 0
    assert chosen["random 72"].kept.shape == (2, 72) and torch.equal(chosen["random 72"].positions, chosen["random 72"].kept)
    assert frames["2 of 8 frames"].tolist() == [[2, 6]] * 2 and chosen["2 of 8 frames"].length == 72
    assert chosen["one frame"].kept.shape == (2, 36) and chosen["one frame"].positions[0].tolist() == list(range(36))
    assert torch.equal(chosen["one frame, at its place"].positions, chosen["one frame"].kept)
    assert frames["one frame, repeated"].unique(dim=1).shape[1] == 1 and chosen["one frame, repeated"].kept.shape == (2, 288)
    assert frames["frames shuffled"].sort(1).values.tolist() == [list(range(8))] * 2 and frames["frames shuffled"].diff(dim=1).min() < 0
    assert torch.equal(chosen["frames shuffled"].positions[0], torch.arange(288))
    assert list(video_check.choices(16)) == ["full", "random 288", "random 144", "random 72"]


@pytest.mark.slow
def test_floors_are_measured_as_the_plain_model_answers(tokenizer):
    model, processor = small(tokenizer), build_video_processor()
    samples = split_samples("validation", limit=1)[:3]
    scores = video_check.measure(model, processor, samples, TICKS, batch=2)
    assert set(scores) == set(video_check.choices(TICKS)) and set(scores["full"]) == {"order", "motion", "events", "macro"}
    found = video_check.answers(model, processor, samples, {"full": video_check.some(None)}, "video", video_check.see_videos)["full"]
    for sample, answer in zip(samples, found, strict=True):
        content = [{"type": "video"}, {"type": "text", "text": sample.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(videos=[sample.frames], text=prompt, do_sample_frames=False, return_tensors="pt")
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.slow
def test_floors_that_are_missed_are_named():
    names = video_check.choices(TICKS)
    good = {"order": 50.0, "motion": 25.0, "events": 25.0, "needle": 2.0, "attribute": 10.0, "macro": 22.4}
    guessing = {family: (value, value, value) for family, value in good.items()}
    scores = dict.fromkeys(names, guessing) | {"full": dict.fromkeys(good, (90.0, 80.0, 95.0))}
    floors = video_check.check_floors(scores)
    assert all(floor.passed for floor in floors) and len(floors) == 10
    bad = video_check.check_floors(scores | {"frames shuffled": scores["full"]})
    assert [floor.rule for floor in bad if not floor.passed] == ["frames shuffled: order under 60 %", "frames shuffled: motion under 60 %"]
    text = video_check.section({TICKS: scores}, bad, "all")
    assert "| frames shuffled: motion under 60 % | 90.0 (80.0-95.0) | MISSED |" in text and "full (288)" in text
