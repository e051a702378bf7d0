"""Scores of frames by a second model: what is asked, which probability counts, what it takes, and how results hold it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

import vtr
from tests.clips import FRAMES, Clip, clips_task, noise
from tests.embedded import random_checkpoint, random_next_video, random_qwen, shared_model
from vtr.cost import TransformerShape, prefill_flops
from vtr.data.frames import FrameQuestion, video_of
from vtr.data.shapes_video import FAMILIES, split_samples
from vtr.eval.frame_scores import SCORER, FrameScorer, Scores, TaskScores, VideoScores, sufficient
from vtr.eval.run.asking import encode, to_model
from vtr.eval.run.cells import Cell
from vtr.eval.run.runner import Runner
from vtr.eval.run.setup import Setup
from vtr.eval.run.workers import describe
from vtr.models.loading import load_model
from vtr.registry import create_method
from vtr.types import VtrError

ASKED = FrameQuestion(("is there a red circle?", "is there an orange ring?"))


@dataclass(frozen=True)
class AskedClip(Clip):
    frame_question: FrameQuestion = ASKED


CLIPS = clips_task(AskedClip)
QUOTA = create_method("quota", keep=12)


@pytest.fixture(scope="module", params=[random_checkpoint, random_qwen], ids=["llava", "qwen"])
def scorer(request):
    return FrameScorer(*shared_model(str(request.param())))


def by_hand(scorer, frame, text):
    """Probabilities over the whole vocabulary behind one prompt, in one forward."""
    inputs = to_model(encode(scorer.processor, [text], [[frame]]), scorer.model)
    with torch.no_grad():
        return scorer.model(**inputs).logits[0, -1].float().softmax(-1), inputs


def token(scorer, word):
    return scorer.processor.tokenizer(word, add_special_tokens=False)["input_ids"][0]


def test_a_score_is_the_share_of_one_word_in_the_whole_vocabulary(scorer):
    frames = noise(3)
    (row,) = scorer.scores([frames], FrameQuestion((ASKED.texts[0],))).rows
    wanted = [by_hand(scorer, frame, ASKED.texts[0])[0][token(scorer, "yes")].item() for frame in frames]
    assert row == pytest.approx(wanted, rel=1e-4) and len(set(row)) == 3
    with_no = [sum(by_hand(scorer, frame, ASKED.texts[0])[0][token(scorer, word)].item() for word in ("yes", "no")) for frame in frames]
    assert max(with_no) < 0.9, "shares of yes and no alone would be other numbers"


def test_of_several_questions_the_likeliest_counts(scorer):
    frames = noise(3)
    single = [scorer.scores([frames], FrameQuestion((text,))).rows[0] for text in ASKED.texts]
    assert scorer.scores([frames], ASKED).rows[0] == pytest.approx([max(pair) for pair in zip(*single, strict=True)], rel=1e-4)


def test_without_a_word_it_is_how_sure_the_model_is(scorer):
    frames = noise(2)
    (row,) = scorer.scores([frames], FrameQuestion(("what does the sign say?",), ())).rows
    assert row == pytest.approx([by_hand(scorer, frame, "what does the sign say?")[0].max().item() for frame in frames], rel=1e-4)


def test_spellings_are_added_and_those_of_several_tokens_left_out(scorer):
    frames, text = noise(2), ASKED.texts[0]
    parts = [scorer.scores([frames], FrameQuestion((text,), (word,))).rows[0] for word in ("yes", "no")]
    both = scorer.scores([frames], FrameQuestion((text,), ("yes", "no", "sufficiently"))).rows[0]
    assert both == pytest.approx([sum(pair) for pair in zip(*parts, strict=True)], rel=1e-4)
    with pytest.raises(
        VtrError, match="FrameScorer: a word of the answer must be one token of the scorer, got 'sufficiently', 'sufficient'; ask"
    ):
        scorer.scores([frames], FrameQuestion((text,), ("sufficiently", "sufficient")))


def test_text_alone_is_asked_as_the_authors_do_without_objects(scorer):
    asked = sufficient("<video> what moves?")
    assert asked.words == ("A",) and "<video>" not in asked.texts[0] and "what moves?" in asked.texts[0] and "sufficient" in asked.texts[0]
    frames = noise(2)
    assert scorer.scores([frames], "<video> what moves?").rows == [pytest.approx(scorer.scores([frames], asked).rows[0], rel=1e-4)]


@pytest.mark.parametrize("size", [1, 4, 5])
def test_batches_over_the_frames_of_all_videos_change_no_score(scorer, size):
    videos, questions = [noise(3), video_of(noise(2, 1)), noise(1, 2)], [ASKED, FrameQuestion(("what does the sign say?",), ()), ASKED]
    together = scorer.scores(videos, questions)
    few = FrameScorer(scorer.model, scorer.processor, batch_size=size)
    batches, first = [], few._answers
    few._answers = lambda prompts: batches.append(len(prompts)) or first(prompts)
    for row, other in zip(together.rows, few.scores(videos, questions).rows, strict=True):
        assert other == pytest.approx(row, rel=1e-3)
    assert sum(batches) == 6 + 2 + 2 and max(batches) <= size, "two questions about four frames, one about two"
    assert [len(row) for row in together.rows] == [3, 2, 1]


def test_what_scoring_takes_is_told(scorer):
    found = scorer.scores([noise(2), noise(3, 1)], [ASKED, FrameQuestion(("what moves?",))])
    shape = TransformerShape.from_config(scorer.model.config.get_text_config())
    for video, texts, frames in zip(found.videos, (ASKED.texts, ("what moves?",)), (2, 3), strict=True):
        lengths, tokens = [], 0
        for text in texts:
            inputs = by_hand(scorer, noise(1)[0], text)[1]
            lengths.append(inputs["input_ids"].shape[1])
            tokens += 576 if "tiny" in scorer.model.config.model_type or scorer.model.config.model_type == "llava" else 24
        assert (video.prompts, video.visual_tokens) == (frames * len(texts), frames * tokens)
        assert video.tflops * 1e12 == pytest.approx(frames * sum(prefill_flops(shape, [length] * shape.layers) for length in lengths))
        assert video.seconds > 0
    assert found.cost == {name: sum(getattr(one, name.removeprefix("scorer_")) for one in found.videos) for name in SCORER}
    assert found.to_dict()["frame_scores"] == [pytest.approx(row, abs=1e-6) for row in found.rows]


def test_of_frames_that_a_model_puts_together_the_highest_counts():
    scores = Scores(tuple(VideoScores(tuple(row), 1, 1, 0.0, 0.0) for row in ([0.1, 0.2, 0.9, 0.3, 0.4], [0.5, 0.6])))
    assert scores.joined(1) == scores and scores.joined(2).rows == [[0.2, 0.9, 0.4], [0.6]]
    assert scores.joined(2).cost == scores.cost and scores([3, 1]) == scores.rows, "nothing is joined unasked"


def test_scores_go_where_frame_scores_are_taken():
    scorer = FrameScorer(*shared_model(str(random_checkpoint())))
    for folder, pictures in ((random_next_video, 1), (random_qwen, 2)):
        model, processor = shared_model(str(folder()))
        assert vtr.host_of(model).pictures == pictures
        inputs = to_model(encode(processor, ["what moves?"], [[]], [[video_of(noise())]]), model)
        scores = scorer.scores([noise()], ASKED)
        with vtr.reduced(model, "quota", keep=12, frame_scores=scores.joined(pictures)) as reduction:
            model.generate(**inputs, max_new_tokens=1)
        kept = reduction.report().images[0].per_frame
        assert len(kept) == FRAMES // pictures and sum(kept) == 12
        weight = np.array(scores.joined(pictures).rows[0]) ** 2
        assert np.abs(kept - 12 * weight / weight.sum()).max() <= 1
        for given in (scorer.scores([noise(2 * FRAMES)], ASKED), scores.joined(3 - pictures)):
            with (
                vtr.reduced(model, "quota", keep=12, frame_scores=given),
                pytest.raises(VtrError, match=r"one score for every frame.*joined\(2\)"),
            ):
                model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize(
    ("kind", "message", "asked"),
    [
        (ValueError, "FrameScorer.scores: give one question, or one per video, got 2 for 1 videos", ([noise(1)], ["a", "b"])),
        (ValueError, "FrameScorer.scores: a video must have at least one frame, got none for video 1", ([noise(1), []], "what?")),
        (TypeError, "FrameScorer.scores: a question must be text or a FrameQuestion, got 3", ([noise(1)], [3])),
    ],
)
def test_what_cannot_be_scored(scorer, kind, message, asked):
    with pytest.raises(kind, match=message):
        scorer.scores(*asked)


def test_what_is_no_scorer():
    model, processor = shared_model(str(random_checkpoint()))
    for given in ((model,), ("tiny-llava", processor)):
        with pytest.raises(ValueError, match="FrameScorer: give a model with its processor, or the name of a model alone"):
            FrameScorer(*given)
    with pytest.raises(ValueError, match="FrameScorer: batch_size must be at least 1, got 0"):
        FrameScorer(model, processor, batch_size=0)
    with pytest.raises(ValueError, match="unknown name 'tiny-lava'; did you mean 'tiny-llava'"):
        FrameScorer("tiny-lava")
    with pytest.raises(VtrError, match="FrameScorer: the scorer must answer questions about images"):
        FrameScorer(ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)), processor)
    for texts in ((), ("",), (3,)):
        with pytest.raises(ValueError, match="FrameQuestion: texts must hold at least one question and no empty one"):
            FrameQuestion(texts)


def runner(scores, **settings):
    identity = {"name": "s", "sha256": "1", "model_type": "llava"}
    around = {"batch_size": 2, "scorer": identity, "frame_scores": scores, **settings}
    return Runner(*shared_model(str(random_next_video())), {"name": "m", "sha256": "0"}, "sdpa", "cpu", **around)


def counted(scorer):
    """What a scorer was asked, beside scores of tasks that load it once."""
    seen = []

    class Counting(FrameScorer):
        def scores(self, videos, questions):
            seen.append(len(videos))
            return super().scores(videos, questions)

    return seen, TaskScores(lambda: seen.append("loaded") or Counting(scorer.model, scorer.processor))


def test_every_sample_is_scored_once_and_only_for_methods_that_read_it():
    plain = FrameScorer(*shared_model(str(random_checkpoint())))
    seen, scores = counted(plain)
    asked = runner(scores)
    for method in (None, create_method("uniform", keep=12)):
        assert not {"frame_scores", *SCORER} & set(asked.answer(Cell(method, CLIPS))[0])
    assert seen == []
    rows = [asked.answer(Cell(create_method("quota", keep=keep), CLIPS)) for keep in (12, 20)]
    assert seen == ["loaded", 2, 1], "three samples in batches of two, not again for the second cell"
    for sample, *both in zip(CLIPS.samples(None), *rows, strict=True):
        wanted = plain.scores([sample.frames], ASKED)
        for row in both:
            assert row["frame_scores"] == [pytest.approx(wanted.rows[0], rel=1e-3, abs=1e-6)]
            assert (row["scorer_prompts"], row["scorer_visual_tokens"]) == (2 * FRAMES, 2 * FRAMES * 576) and row["scorer_seconds"] > 0
    assert [row["retained"] for row in rows[0]] == [[12]] * 3


def test_answers_are_those_of_the_scores():
    plain = FrameScorer(*shared_model(str(random_checkpoint())))
    model, processor = shared_model(str(random_next_video()))
    (row,) = runner(TaskScores(lambda: plain)).answer(Cell(QUOTA, CLIPS, limit=1))
    sample = CLIPS.samples(1)[0]
    inputs = to_model(encode(processor, [sample.question], [[]], [[video_of(sample.frames)]]), model)
    with vtr.reduced(model, "quota", keep=12, frame_scores=row["frame_scores"]):
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip() == row["prediction"]


def test_a_sample_without_a_question_for_frames_is_asked_whether_they_are_sufficient():
    @dataclass(frozen=True)
    class Plain:
        id: str = "0"
        question: str = "what moves?"

    asked = []
    plain = FrameScorer(*shared_model(str(random_checkpoint())))
    plain.scores = lambda videos, questions: asked.append(questions) or Scores((VideoScores((1.0,), 1, 1, 0.0, 0.0),) * len(videos))
    found = TaskScores(lambda: plain).of(CLIPS, [Plain(), Plain("1"), AskedClip("2")], [[noise(1)], [], [noise(1), noise(1)]])
    assert asked == [["what moves?", ASKED, ASKED]] and [len(one.videos) for one in found] == [1, 0, 2]


def test_frames_of_a_model_without_videos_and_of_one_that_joins_them_are_scored():
    plain = FrameScorer(*shared_model(str(random_checkpoint())))
    around = ({"name": "m", "sha256": "0"}, "sdpa", "cpu")
    (row,) = Runner(*shared_model(str(random_qwen())), *around, frame_scores=TaskScores(lambda: plain)).answer(Cell(QUOTA, CLIPS, limit=1))
    assert row["retained"] == [12] and [len(own) for own in row["frame_scores"]] == [FRAMES], "of every picture, not of every second"
    asked = Runner(*load_model(str(random_checkpoint())), *around, frame_scores=TaskScores(lambda: plain))
    (row,) = asked.answer(Cell(QUOTA, CLIPS, limit=1))
    assert row["retained"] == [12] and [len(own) for own in row["frame_scores"]] == [FRAMES]
    asked = Runner(plain.model, plain.processor, *around, frame_scores=TaskScores(lambda: plain))
    with pytest.raises(
        VtrError, match="FrameScorer.scores: the scorer must see whole frames, and it is reduced by quota.*load the scorer a second"
    ):
        asked.answer(Cell(QUOTA, CLIPS, limit=1))


def test_a_result_says_who_scored_and_what_that_took():
    seen, scores = counted(FrameScorer(*shared_model(str(random_checkpoint()))))
    made = runner(scores).measure(Cell(QUOTA, CLIPS, limit=1))
    assert made["fingerprint"]["frame_scores"] == {"name": "s", "sha256": "1"} and seen == ["loaded", 1]
    assert made["summary"]["scorer_prompts"] == 2 * FRAMES and set(SCORER) <= set(made["summary"])
    assert "frame_scores" not in runner(scores).fingerprint(Cell(create_method("uniform", keep=12), CLIPS))


def test_fingerprints_of_cells_that_read_no_scores_stay_as_they_are():
    folder, other = str(random_next_video()), str(random_checkpoint())
    plain, scored = (describe(Setup(folder, device="cpu", frame_scores=name)) for name in (None, other))
    uniform = Cell(create_method("uniform", keep=12), CLIPS)
    assert plain.fingerprint(uniform) == scored.fingerprint(uniform)
    own = scored.fingerprint(Cell(QUOTA, CLIPS))
    assert own["frame_scores"]["name"] == "random" and set(own["frame_scores"]) == {"name", "sha256"}
    assert own["code"] != plain.fingerprint(Cell(QUOTA, CLIPS))["code"], "the code of the scorer counts"
    with pytest.raises(ValueError, match="frame_scores: unknown name 'tiny-lava'; did you mean 'tiny-llava'"):
        describe(Setup(folder, frame_scores="tiny-lava"))


def test_the_embedded_model_knows_in_which_frames_something_is():
    """No frame without what is asked for has a score as high as one with it, on clips of the stream `examples`."""
    scorer = FrameScorer("tiny-llava")
    clips = [sample for family in FAMILIES if family != "attribute" for sample in split_samples("examples", family, 1)]
    found = scorer.scores([sample.frames for sample in clips], [sample.frame_question for sample in clips])
    for sample, row in zip(clips, found.rows, strict=True):
        named = [track for track in sample.clip.tracks if f"the {track.name} " in sample.question.replace("?", " ")]
        shown = [
            any(track.at(frame, sample.clip.rate) for track in named) if named else frame == sample.clip.sign_at
            for frame in range(len(row))
        ]
        there, away = ([score for score, one in zip(row, shown, strict=True) if one == kind] for kind in (True, False))
        assert min(there) > 0.5 and max(away, default=0) < min(there), sample.id


def test_samples_ask_in_words_that_the_embedded_model_was_trained_on():
    asked = {family: split_samples("examples", family, 1)[0] for family in FAMILIES}
    for family in ("order", "motion", "events"):
        assert all(text.startswith("is there a") for text in asked[family].frame_question.texts)
        assert len(asked[family].frame_question.texts) == (2 if family == "order" else 1)
    for family in ("needle", "attribute"):
        assert asked[family].frame_question == FrameQuestion((asked[family].question,), ())


def test_a_copy_of_a_task_is_scored_by_itself():
    seen, scores = counted(FrameScorer(*shared_model(str(random_checkpoint()))))
    asked = runner(scores)
    for task in (CLIPS, replace(CLIPS, name="others")):
        asked.answer(Cell(QUOTA, task, limit=1))
    assert seen == ["loaded", 1, 1]
