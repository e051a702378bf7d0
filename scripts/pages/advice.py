"""The tables of docs/choose.md, and the lines "Use it when, avoid it when" of every card: made from facts alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from scripts.pages.facts import REFERENCES, Facts, listed, short
from vtr.eval.measured import Measured
from vtr.markdown import markdown_table
from vtr.registry import list_methods, method_class
from vtr.types import STAGES

BEST = 4
NEEDS = {
    "existence": "whether something is there",
    "attribute": "colors, sizes and shapes",
    "counting": "counting",
    "relation": "where things are",
    "text": "print (OCR)",
    "order": "what came first",
    "motion": "which way things move",
    "events": "how often something happens",
    "needle": "a sign in one frame",
}
"""Families of questions, and the need that each stands for."""
ALL = "all kinds of questions together"

_STAGES = {
    ("input",): "the tower is what costs: it sees a smaller image, and the LLM fewer tokens",
    ("tower",): "the vision tower should be cheaper, too",
    ("boundary",): "the whole LLM should run on fewer tokens, from its first layer on",
    ("boundary", "prefill"): "the LLM should have fewer tokens from its first layer on, and still fewer later",
    ("prefill",): "the first layers of the LLM may read the whole image before tokens go",
}


def needs_table(facts: Facts, models: Sequence[str], budget: Callable[[str], str]) -> str:
    """Returns need by model: the best methods that beat both `random` and `pool`, percent; † marks those that remove late."""
    heads = [f"{short(on)}, {budget(on).removeprefix('keep ')} of {facts.tokens(on):.0f}" for on in models]
    families = facts.families(models[0])
    body = [[NEEDS[family], *(_best(facts, on, budget(on), family) for on in models)] for family in families]
    return markdown_table(["need", *heads], [*body, [ALL, *(_best_overall(facts, on, budget(on)) for on in models)]])


def _best(facts: Facts, on: str, budget: str, family: str) -> str:
    rows = facts.at(on, budget)
    scored = {one: score.value for one in rows if facts.better(one, family) and (score := facts.score(one, family))}
    beside = {name: score.value for name in ("random", "pool") if (score := facts.score(rows[0], family, name))}
    return _cell(facts, scored, beside, len(_judged(rows)))


def _best_overall(facts: Facts, on: str, budget: str) -> str:
    rows = _judged(facts.at(on, budget))
    scored = {one: float(one.macro) for one in rows if facts.better_overall(one)}
    return _cell(facts, scored, {"random": float(rows[0].random), "pool": float(rows[0].pool)}, len(rows))


def _cell(facts: Facts, scored: dict[Measured, float], beside: dict[str, float], of: int) -> str:
    best = sorted(scored, key=lambda one: (-scored[one], one.label))[:BEST]
    names = ", ".join(f"{_link(one)}{'†' if facts.later(one) else ''} {scored[one]:.0f}" for one in best)
    others = ", ".join(f"`{name}` {value:.0f}" for name, value in beside.items())
    return f"{names or 'none'} ({len(scored)} of {of}; {others})"


def _link(one: Measured) -> str:
    return f"[{one.method}](methods/{one.method}.md){one.label.removeprefix(one.method)}"


def _judged(rows: Sequence[Measured]) -> list[Measured]:
    return [one for one in rows if one.method not in REFERENCES]


def cost_table(facts: Facts, on: str) -> str:
    """Returns what the methods cost on a model at about a quarter of its tokens, the fastest prefill first."""
    budget = facts.quarter(on)
    times, costs = facts.tables[on, f"{budget}: speed, batch 1"], facts.tables[on, f"{budget}: cost"]
    body = []
    for label in sorted(times, key=lambda label: float(times[label]["prefill ms"])):
        known = label in list_methods()
        name, stages = (f"[{label}](methods/{label}.md)", ", ".join(method_class(label).stages)) if known else (label, "-")
        row = {**times[label], **costs[label]}
        body.append([name, stages, row["prefill ms"], row["choosing ms"] or "-", row["peak MiB"], row["KV MiB"], row["average tokens"]])
    return markdown_table(["method", "stage", "prefill ms", "of it choosing", "peak MiB", "KV MiB", "average tokens"], body)


def advice(facts: Facts, name: str) -> str:
    """Returns the two lines of a method's card."""
    return f"**Use it when** {'; '.join(_use(facts, name))}.\n\n**Avoid it when** {'; '.join(_avoid(facts, name))}."


def _use(facts: Facts, name: str) -> list[str]:
    cls = method_class(name)
    if name in REFERENCES:
        return ["a method has to show what it is worth: this is a row that it must beat at the same budget"]
    said = ["the prompt has a video"] if cls.card.needs_video else []
    if cls.card.needs_frame_scores:
        said.append("a second model may be asked about every frame (`frame_scores=`)")
    if cls.takes_budget:
        stages = tuple(sorted(set(cls.stages) - {"decode"}, key=STAGES.index))
        said.append(_STAGES[stages if stages in _STAGES else stages[:1]])
    else:
        said.append("no token may be missing in the end, and all may cost less on the way")
    if won := _by_family(facts, name, facts.better, facts.better_overall):
        said.append(f"you ask about {won}: there it beats `random` and `pool` with about a quarter of the tokens")
    return said


def _avoid(facts: Facts, name: str) -> list[str]:
    cls = method_class(name)
    card, quarters = cls.card, _quarters(facts, name)
    said = []
    if card.experimental:
        said.append("results have to be relied on: it is experimental")
    if card.needs_cls:
        said.append("the tower has no CLS token (SigLIP, Qwen-VL and others): it is refused there")
    if card.needs_text:
        said.append("one image, read once, has to answer several questions: what is kept depends on the question")
    if card.needs_video:
        said.append("the prompt has images alone")
    if not card.exact:
        said.append("the budget must be met exactly: at most so many tokens stay")
    if late := [one for one in quarters if facts.later(one)]:
        left, average, where = float(late[0].tokens), float(late[0].average), short(late[0].on)
        said.append(f"a budget has to be the work saved: where {left:.0f} tokens are left, layers have {average:.0f} on average ({where})")
    if lost := _by_family(facts, name, facts.worse, lambda one: False):
        said.append(f"you ask about {lost}: there it is below `random`")
    if name not in REFERENCES and cls.takes_budget:
        if not quarters:
            said.append("a measured result is needed: the embedded checkpoints have none at about a quarter of the tokens")
        elif not _by_family(facts, name, facts.better, facts.better_overall):
            said.append("it has to beat `random` and `pool`: with about a quarter of the tokens it does so on nothing measured here")
    return said or ["your model or your questions are unlike those measured here: small checkpoints, drawn scenes"]


def _quarters(facts: Facts, name: str) -> list[Measured]:
    """Returns the lines of a method at about a quarter of the tokens, with its default settings."""
    return [one for on in facts.models for one in facts.at(on, facts.quarter(on)) if one.label == name]


def _by_family(facts: Facts, name: str, judge: Callable[[Measured, str], bool], overall: Callable[[Measured], bool]) -> str:
    """Returns `print (tiny-llava and tiny-qwen-vl), counting (tiny-llava)`: where the lines of a method are judged so; empty for nowhere."""
    where: dict[str, list[str]] = defaultdict(list)
    for one in _quarters(facts, name):
        for family in facts.families(one.on):
            if judge(one, family):
                where[NEEDS[family]].append(short(one.on))
        if overall(one):
            where[ALL].append(short(one.on))
    return ", ".join(f"{need} ({listed(models)})" for need, models in where.items())
