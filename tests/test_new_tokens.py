"""What happens while an answer is made: new tokens that choose keys, and keys of earlier layers that go."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vtr
from tests.caches import held, output_cache
from tests.fake_flash import flash_attention
from tests.marks import quick_first
from tests.oracles import Setup
from tests.test_prompt_end import draft, silent_transformers  # noqa: F401
from vtr.hosts._protocol import host_of
from vtr.methods.dycoke import DyCoke
from vtr.testing import new_tokens
from vtr.testing.compare import NEW, logits_of
from vtr.testing.new_tokens import NEW_TOKENS, ChosenKeys, Evict
from vtr.testing.probes import EveryNth, Freeze, Ragged
from vtr.testing.reference import Expected, keep_mask, largest, masked_logits, spots
from vtr.testing.tiny_models import VIDEO_KINDS, generate

KINDS = ("llava", "llava_next", "internvl", *VIDEO_KINDS)


@pytest.mark.parametrize("name", NEW_TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_equal_the_masked_model(name, kind):
    assert NEW_TOKENS[name](Setup(kind, dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("before", [[], [Ragged(), EveryNth(stage="prefill", layer=4)]], ids=["alone", "behind"])
def test_new_tokens_choose_without_a_removal_and_with_a_later_one(before):
    assert new_tokens.attend(Setup("llava_next", dtype=torch.float64), before) < 1e-6


@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_other_attention_gives_the_same_answers(attention):
    setup = Setup("llava", "eager" if attention == "eager" else "sdpa", torch.float32)
    found = []
    for one in (Setup("llava"), setup):
        switch = flash_attention(one.model) if attention == "flash" and one is setup else nullcontext()
        with torch.no_grad(), switch, vtr.reduced(one.model, [Ragged(), ChosenKeys()]):
            found.append(logits_of(generate(one.model, one.batch(), NEW)))
    assert largest(*found) < 2e-5


@pytest.mark.parametrize("plan", [[EveryNth(stride=2), ChosenKeys()], [Evict(stage="prefill", layer=3)]], ids=["attend", "evict"])
def test_beams_of_a_batch_are_those_of_its_rows(plan):
    setup = Setup("llava", dtype=torch.float64)
    batch = setup.batch()
    with torch.no_grad(), vtr.reduced(setup.model, plan):
        together = generate(setup.model, batch, 4, num_beams=3).sequences[:, -4:]
        alone = torch.stack([generate(setup.model, batch.row(row), 4, num_beams=3).sequences[0, -4:] for row in range(2)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("plan", [[ChosenKeys()], [Evict(stage="prefill", layer=3)]], ids=["attend", "evict"])
def test_a_static_cache_is_refused(plan):
    setup = Setup("llava", dtype=torch.float64)
    with vtr.reduced(setup.model, plan), pytest.raises(vtr.VtrError, match="static cache cannot follow; use a dynamic cache"):
        generate(setup.model, setup.batch(), 3, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_layers_without_keys_of_all_tokens_are_refused_when_planned(kind):
    setup = Setup(kind)
    with pytest.raises(vtr.VtrError, match="chooses keys for new tokens, but layer"):
        vtr.plan(setup.model, ChosenKeys())
    with pytest.raises(vtr.VtrError, match="removes keys of earlier layers, but layer"):
        vtr.plan(setup.model, Evict(stage="prefill", layer=3))


def test_the_first_layer_has_nothing_to_choose_by():
    with pytest.raises(ValueError, match="layer must be 1 to 4 in an LLM of 5 layers, got 0"):
        vtr.plan(Setup("llava").model, ChosenKeys(layer=0))


def test_freezing_and_choosing_keys_do_not_go_together():
    with pytest.raises(vtr.VtrError, match="use one of the two"):
        vtr.plan(Setup("llava").model, [Freeze(), ChosenKeys()])


def test_a_plan_names_the_new_tokens():
    plan = vtr.plan(Setup("llava").model, ChosenKeys(layer=2))
    assert "new tokens at LLM layer 2" in str(plan) and plan.counts(36) == [36] * 5


@dataclass(frozen=True, kw_only=True)
class Noted(DyCoke):
    """DyCoke, which notes for every new token and video `(prompt row, patch ids left out)`."""

    seen: ClassVar[list] = []

    def _attend(self, need, view):
        selection = super()._attend(need, view)
        gone = view.real & ~selection.keep
        assert view.counts == view.keeps == view.real.sum(1).tolist()
        self.seen.append([(int(row), patch[out].tolist()) for row, patch, out in zip(view.row, view.patch, gone, strict=True)])
        return selection


@pytest.mark.parametrize("kind", VIDEO_KINDS)
@torch.no_grad()
def test_dycoke_attends_to_what_it_chose(kind):
    Noted.seen.clear()
    setup = Setup(kind, dtype=torch.float64)
    batch = setup.batch()
    with vtr.reduced(setup.model, Noted(keep=9, decode=True, layer=2, threshold=2.0, position_ids="keep")) as reduction:
        answer = generate(setup.model, batch, NEW)
        report = reduction.report()
    keep, hidden = (
        keep_mask(batch, [video.retained for video in report.images]),
        torch.zeros(2, NEW - 1, batch.valid.shape[1], dtype=torch.bool),
    )
    for step, videos in enumerate(Noted.seen):
        for spot, (row, gone) in zip(spots(batch), videos, strict=True):
            assert row == spot.row and len(gone) == 7  # 9 - int(9 * 0.3) are left out
            hidden[row, step, spot.positions[torch.isin(spot.patches, torch.tensor(gone))]] = True
    assert report.attended == [[2, 2, 2]] * (NEW - 1)
    whole = batch.followed_by(answer.sequences[:, -NEW:-1])
    length = whole.valid.shape[1]
    expected = Expected(drops=[(0, torch.cat([keep, whole.valid[:, -NEW + 1 :]], 1))], unseen_from=2)
    expected.unseen = torch.zeros(2, length, length, dtype=torch.bool)
    expected.unseen[:, -NEW + 1 :, : -NEW + 1] = hidden
    full = masked_logits(setup.model, whole, expected)[:, -NEW:]
    assert largest(logits_of(answer).transpose(0, 1), full) < 1e-6


LONG = 10


class Prophet:
    """In place of a draft: guesses the three tokens that come next, and one that does not."""

    requires_model_outputs = False

    def __init__(self, prompt: int, tokens: list[int]) -> None:
        self.prompt, self.tokens = prompt, tokens

    def get_candidates(self, input_ids, *_args, **_kwargs):
        done = input_ids.shape[1] - self.prompt
        guesses = torch.tensor([[*self.tokens[done : done + 3], 1]])
        return torch.cat([input_ids, guesses], 1), None

    def update_candidate_strategy(self, *_args):
        pass


def answers(setup, batch, plan, **settings):
    """Tokens, their logits, and what new tokens attended to."""
    with torch.no_grad(), vtr.reduced(setup.model, plan) as reduction:
        made = setup.model.generate(
            **batch.inputs, max_new_tokens=LONG, do_sample=False, output_logits=True, return_dict_in_generate=True, **settings
        )
        return made.sequences[0, -LONG:].tolist(), torch.stack(made.logits), reduction.report().attended


CHOOSING = {
    "dycoke": [DyCoke(keep=9, decode=True, layer=2, threshold=0.999, position_ids="keep")],
    "chosen keys": [EveryNth(stride=2), ChosenKeys()],
    "alone": [ChosenKeys(layer=3)],
}


@pytest.mark.usefixtures("silent_transformers")
@pytest.mark.parametrize("attention", quick_first(["sdpa", "eager", "flash"]))
@pytest.mark.parametrize("name", CHOOSING)
def test_guesses_of_a_draft_choose_as_they_would_alone(name, attention, monkeypatch):
    kind = "llava_next_video_clips" if name == "dycoke" else "llava"
    setup = Setup(kind, "eager" if attention == "eager" else "sdpa", torch.float64)
    batch = setup.batch().row(0)
    batch = batch.followed_by(batch.inputs["input_ids"][:, -6:].repeat(1, 2))  # lookup then proposes in the first pass
    switch = flash_attention(setup.model) if attention == "flash" else nullcontext()
    with switch:
        tokens, logits, attended = answers(setup, batch, CHOOSING[name])
        assert len(attended) == LONG - 1 and len({str(one) for one in attended}) > (name != "dycoke"), "not every token chose alike"
        for settings in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft(kind)}):
            found = answers(setup, batch, CHOOSING[name], **settings)
            assert found[0] == tokens
            assert found[2][: LONG - 1] == attended
            assert largest(found[1], logits) < 1e-6
        calls, length = [], batch.inputs["input_ids"].shape[1]
        monkeypatch.setattr(setup.model, "_get_candidate_generator", lambda **_: Prophet(length, tokens), raising=False)
        hook = host_of(setup.model).language.module.register_forward_pre_hook(
            lambda _module, _args, given: calls.append(given["inputs_embeds"].shape[1]), with_kwargs=True
        )
        found = answers(setup, batch, CHOOSING[name], prompt_lookup_num_tokens=3)
        hook.remove()
        assert calls == [length + 4, 5, 4], "three guesses of four are right, in the call of the prompt too"
        assert found[0] == tokens and found[2][: LONG - 1] == attended and largest(found[1], logits) < 1e-6


def test_guesses_that_cannot_choose_alone_are_refused():
    setup = Setup("llava", dtype=torch.float64)
    batch = setup.batch().row(0)
    batch = batch.followed_by(batch.inputs["input_ids"][:, -6:].repeat(1, 2))
    plan = [EveryNth(stage="prefill", layer=4), ChosenKeys()]
    with pytest.raises(vtr.VtrError, match="probe: several new tokens at once, .* since probe removes tokens behind it; generate without"):
        answers(setup, batch, plan, prompt_lookup_num_tokens=3)


def test_what_a_cropped_cache_had_chosen_is_taken_back():
    setup = Setup("llava", dtype=torch.float64)
    batch = setup.batch()
    with torch.no_grad(), vtr.reduced(setup.model, [ChosenKeys()]) as reduction:
        out = setup.model(**batch.inputs, use_cache=True)
        cache, mask = output_cache(out), batch.inputs["attention_mask"]

        def step(token):
            nonlocal mask
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            return setup.model(input_ids=token, attention_mask=mask, **held(cache)).logits[:, -1]

        tokens = [torch.full((2, 1), number) for number in (5, 6, 7, 8)]
        first = [step(token) for token in tokens]
        attended = reduction.report().attended
        cache.crop(-3)
        mask = mask[:, :-3]
        again = [step(token) for token in tokens[1:]]
        assert largest(torch.stack(first[1:]), torch.stack(again)) < 1e-12 and reduction.report().attended == attended
        for number in range(80):
            step(tokens[number % 4])
        cache.crop(-70)
        mask = mask[:, :-70]
        with pytest.raises(
            vtr.VtrError, match="is known of the last 64 only, got a cache that was cropped by more; begin with a new cache"
        ):
            step(tokens[0])
