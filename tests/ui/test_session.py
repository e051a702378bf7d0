"""What the page is made of, without gradio: comparisons, explanations, tokens that are put back, and the same again elsewhere."""

import shlex
import threading

import pytest
import torch
from PIL import Image, ImageChops

import vtr
from tests.command_line import CliRunner
from tests.marks import quick_first
from vtr.cli import app
from vtr.eval.examples import load_examples
from vtr.models.loading import load_model
from vtr.types.errors import WrongValue
from vtr.ui.explain import explain, step_labels
from vtr.ui.media import open_media
from vtr.ui.pictures import draw_step, token_at
from vtr.ui.reproduce import command, script
from vtr.ui.session import Column, Refused, Session, methods_for
from vtr.ui.steps import PuttingBack, Watching, left_after


def logits(session, prompt, method=None, change=None):
    """Logits of the whole prompt, and the report, under a method whose steps are changed."""
    with torch.no_grad():
        if method is None:
            return session.model(**prompt.inputs).logits, None
        with session.reduction(prompt, method, change) as reduction:
            return session.model(**prompt.inputs).logits, reduction.report().images[0]


def test_a_comparison_is_what_vtr_run_says(found):
    fastv, visionzip, vcast = found.columns
    assert (found.visual_tokens, found.full.retained) == (576, [576])
    assert fastv.outcome.retained == visionzip.outcome.retained == [64] and fastv.outcome.average_tokens > 64
    assert isinstance(vcast, Refused) and "acts on the frames of videos" in vcast.why
    with pytest.raises(WrongValue, match="method 3 of this comparison did not run"):
        found.column(2)


def test_the_steps_end_with_what_the_report_says(found):
    for column in found.columns[:2]:
        kept, into = left_after(column.entry["tokens"], column.taken)
        assert kept == column.entry["retained"]
        if column.entry["assignment"] is not None:
            named = dict(zip(column.entry["tokens"], column.entry["assignment"], strict=True))
            assert into == {token: pivot for token, pivot in named.items() if pivot not in (-1, token)} and into
    assert step_labels(found.columns[0]) == ["before any step", "1. LLM layer 2: removes tokens, 64 left"]


def test_every_token_has_an_explanation(found):
    fastv, visionzip = found.columns[:2]
    told = [explain(fastv, token) for token in range(576)]
    assert {one.token for one in told if one.kept} == set(fastv.entry["retained"])
    assert sorted(one.rank for one in told) == list(range(1, 577))
    assert {one.rank for one in told if one.kept} == set(range(1, 65)), "the best ranks stay"
    gone = next(one for one in told if not one.kept)
    assert gone.lines[1] == f"At LLM layer 2: rank {gone.rank} of 576, of which 64 stay; it is removed." and not gone.fixed
    merged = next(one for one in (explain(visionzip, token) for token in range(576)) if one.target is not None)
    assert f"it is merged into token {merged.target}" in merged.lines[1] and "does not rank tokens" in merged.lines[-1]
    assert any("were merged into it" in line for line in explain(visionzip, merged.target).lines)


def test_a_click_on_the_picture_is_the_token_there(found):
    picture = draw_step(found, 0)
    assert picture.size == (720, 720)
    assert [token_at(found, 0, *spot) for spot in ((0, 0), (719, 0), (0, 30), (719, 719))] == [0, 23, 24, 575]
    merged = next(explain(found.columns[1], token) for token in range(576) if explain(found.columns[1], token).target is not None)
    plain, asked = draw_step(found, 1), draw_step(found, 1, None, merged)
    assert plain.tobytes() != asked.tobytes() and plain.tobytes() != draw_step(found, 1, 0).tobytes()


def check_put_back(session, media, name, keep):
    """One token that is put back is one token more; with all of them the model is the full one, bit for bit."""
    prompt, (method,) = session.prompt(media, "what is this?"), methods_for([name], keep)
    watching = Watching(media.kind)
    before, report = logits(session, prompt, method, watching)
    gone = sorted(set(report.tokens) - set(report.retained))
    for token in (gone[0], gone[len(gone) // 2]):
        _, after = logits(session, prompt, method, PuttingBack(media.kind, watching.taken, [token]))
        assert set(after.retained) == set(report.retained) | {token}
    same, again = logits(session, prompt, method, PuttingBack(media.kind, watching.taken, []))
    assert again.retained == report.retained and torch.equal(same, before)
    everything, all_back = logits(session, prompt, method, PuttingBack(media.kind, watching.taken, gone))
    assert all_back.retained == report.tokens and torch.equal(everything, logits(session, prompt)[0])


@pytest.mark.parametrize("name", quick_first(["visionzip", "fastv", "vscan"]))
def test_one_token_put_back_is_exactly_one_token_more(quick, media, name):
    check_put_back(quick, media, name, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["pyramiddrop", "divprune", "prumerge", "pool", "none", "mmtok", "tokencorr", "sparsevlm_plus", "transprune", "v2drop", "vscan"]
)
def test_tokens_of_every_kind_of_method_are_put_back(session, media, name):
    check_put_back(session, media, name, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name", "keep", "frames"),
    [
        ("tiny-llava-next", "visionzip", 160, 0),
        ("tiny-llava-next", "globalcom2", 160, 0),
        ("tiny-qwen-vl", "fastv", 16, 0),
        ("tiny-llava-video", "fastv", 20, 4),
        ("tiny-llava-video", "fastervlm", 20, 4),
        ("tiny-llava-video", "vcast", 20, 4),
        ("tiny-llava", "vcast", 100, 2),
    ],
)
def test_tokens_are_put_back_on_other_models_and_of_videos(model, name, keep, frames, tmp_path):
    picture = Image.open(load_examples()[2].file).resize((192, 192))
    files = [tmp_path / f"{number}.png" for number in range(max(frames, 1))]
    for number, file in enumerate(files):
        ImageChops.offset(picture, 20 * number).save(file)
    check_put_back(Session(*load_model(model, "cpu"), model, "cpu"), open_media(files, tmp_path), name, keep)


def test_the_answer_of_a_token_put_back(session, found):
    gone = sorted(set(found.columns[0].entry["tokens"]) - set(found.columns[0].entry["retained"]))
    one, every = session.put_back(found, 0, gone[:1]), session.put_back(found, 0, gone)
    assert one.before == found.columns[0].outcome.answer and len(one.entry["retained"]) == 65
    assert every.after == found.full.answer and every.changed == (every.before != found.full.answer)


def test_what_cannot_be_put_back_says_why(quick, media):
    other = quick.compare(media, "what is this?", methods_for(["flowcut", "resize"], 64), max_new_tokens=1)
    kept = other.columns[0].entry["retained"][0]
    with pytest.raises(WrongValue, match=f"token {kept} was not removed by any step"):
        quick.put_back(other, 0, [kept])
    gone = next(token for token in range(576) if token not in other.columns[0].entry["retained"])
    with pytest.raises(vtr.VtrError, match="cannot be put back at tower layer .*inside the vision tower"):
        quick.put_back(other, 0, [gone])
    assert "It cannot be put back" in explain(other.columns[0], gone).fixed
    with pytest.raises(vtr.VtrError, match="made smaller in front of the vision tower"):
        quick.put_back(other, 1, [gone])
    assert "The picture was made smaller" in explain(other.columns[1], gone).lines[1]
    assert draw_step(other, 1).size == draw_step(other, 1, 0).size == (720, 720)


def test_a_later_step_can_keep_a_token_from_being_put_back(quick, media):
    ordered = vtr.create_method("prumerge", keep=64, compat="authors")
    column = quick.compare(media, "what is this?", [ordered], max_new_tokens=1).column(0)
    gone = next(token for token in range(576) if token not in column.entry["retained"])
    assert not column.taken[explain(column, gone).step].fixed, "the step that removed it would let it come back"
    assert "an order of its own" in explain(column, gone).fixed


def test_bad_questions_are_refused(quick, media):
    with pytest.raises(WrongValue, match="question: must not be empty"):
        quick.compare(media, " ", [])
    with pytest.raises(WrongValue, match="takes up to 3 methods, got 4"):
        quick.compare(media, "what?", methods_for(["fastv", "random", "uniform", "pool"], 64))
    assert "keep=577 is above the 576 visual tokens" in quick.compare(media, "?", methods_for(["random"], 577), 1).columns[0].why


def test_comparisons_in_two_threads_are_those_of_one(quick, media):
    def ask(name):
        results[name] = quick.compare(media, "what is this?", methods_for([name], 64), max_new_tokens=2).columns[0]

    results, alone = {}, {}
    for name in ("fastv", "visionzip"):
        ask(name)
    alone.update(results)
    threads = [threading.Thread(target=ask, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, column in alone.items():
        other = results[name]
        assert isinstance(other, Column) and other is not column
        assert other.entry == column.entry and other.taken == column.taken and other.outcome.answer == column.outcome.answer


def test_the_command_runs_and_says_the_same(session, found, tmp_path):
    line = shlex.split(command(session, found, found.columns[0].method))
    assert line[0] == "vtr"
    result = CliRunner().invoke(app, [*line[1:], "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    assert '"retained": [\n      64' in result.stdout and f'"answer": "{found.columns[0].outcome.answer}"' in result.stdout


@pytest.mark.slow
def test_the_script_runs_and_says_the_same(session, found, capsys):
    exec(compile(script(session, found, found.columns[1].method), "script", "exec"), {})
    assert capsys.readouterr().out.split(" | ") == [found.full.answer, found.columns[1].outcome.answer, "[64]\n"]
