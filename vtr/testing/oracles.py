"""The oracles: what a reduced model computes against an independent computation of the same, as a largest absolute difference.

`ORACLES` is name -> oracle, `tolerance` what each may differ by. Every plan removes at the boundary too: errors of positions and of masks
at decode are invisible otherwise. The plans are made of probes, so an oracle judges the engine and a host, not a method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import vtr
from vtr.testing import tiny_models
from vtr.testing.caches import held
from vtr.testing.compare import NEW, Setup, against_masks, equal, generations, logits_of
from vtr.testing.fake_flash import flash_attention
from vtr.testing.families import PIXELS
from vtr.testing.probes import ByAttention, DropAll, EveryNth, Freeze, KeepAll, MergePairs, Ragged, TowerTop
from vtr.testing.reference import largest
from vtr.testing.tiny_models import FAMILIES, PER_TOKEN, Batch, Shot, generate

BOTH = (EveryNth(stride=2), Ragged(stage="prefill", layer=2))
"""The plan where none is named: at the boundary, then ragged inside the LLM."""


def in_tower(setup: Setup, method: vtr.Method) -> list[vtr.Method]:
    """Returns a step inside the tower, none where the family allows none."""
    return [] if "O9" in FAMILIES[setup.kind].refused else [method]


@torch.no_grad()
def keep_all(setup: Setup) -> float:
    """O1: keeping everything is bit-identical, forward and generate."""
    model, batch = setup.model, setup.batch()
    full, answer = model(**batch.inputs).logits, generate(model, batch, NEW)
    plan = [*in_tower(setup, KeepAll(stage="tower", layer=2)), KeepAll(), ByAttention(keep_ratio=1.0)]
    with vtr.reduced(model, plan):
        same, again = model(**batch.inputs).logits, generate(model, batch, NEW)
    return equal((full, same), (answer.sequences, again.sequences), (logits_of(answer), logits_of(again)))


@torch.no_grad()
def removal(setup: Setup) -> float:
    """O2: remove() restores modules, hooks and outputs."""
    model, batch = setup.model, setup.batch()
    generate(model, batch, 2)  # leaves attributes of its own
    before, full = tiny_models.snapshot(model), model(**batch.inputs).logits
    freeze = [] if "O8" in FAMILIES[setup.kind].refused else [Freeze()]
    reduction = vtr.apply(model, [*in_tower(setup, TowerTop()), *BOTH, ByAttention(layer=4, keep=1), *freeze])
    generate(model, batch, 2)
    reduction.remove()
    return equal((before, tiny_models.snapshot(model)), (full, model(**batch.inputs).logits))


def boundary(setup: Setup) -> float:
    """O3: removal at the boundary == masked."""
    return against_masks(setup, [EveryNth(stride=3)], setup.batch())


def boundary_ragged(setup: Setup) -> float:
    """O3b: the same with ragged counts."""
    return against_masks(setup, [Ragged()], setup.batch())


def boundary_merge(setup: Setup) -> float:
    """O3c: merging at the boundary == survivors' values replaced, the rest masked."""
    return against_masks(setup, [MergePairs()], setup.batch())


def boundary_renumbered(setup: Setup) -> float:
    """O3d: renumbered positions == masked with those positions."""
    return against_masks(setup, [Ragged(position_ids="renumber")], setup.batch(), renumber=True)


def layers(setup: Setup) -> float:
    """O4: boundary, layer 2 and everything at layer 4 == masked per layer."""
    return against_masks(setup, [EveryNth(stride=2), EveryNth(stage="prefill", layer=2), DropAll(stage="prefill", layer=4)], setup.batch())


def layers_merge_renumbered(setup: Setup) -> float:
    """O4b: merge at layer 2, prune at layer 3, renumbered at every removal."""
    renumber: Any = "renumber"
    plan = [
        EveryNth(stride=2, position_ids=renumber),
        MergePairs(stage="prefill", layer=2, position_ids=renumber),
        Ragged(stage="prefill", layer=3, position_ids=renumber),
    ]
    return against_masks(setup, plan, setup.batch(), renumber=True)


@torch.no_grad()
def batch_and_singles(setup: Setup) -> float:
    """O5: a ragged batch == its rows alone, by attention, generated."""
    model, batch, worst = setup.model, setup.batch(), 0.0
    with vtr.reduced(model, [Ragged(), ByAttention()]):
        together = generate(model, batch, NEW)
        for row in range(2):
            alone = generate(model, batch.row(row), NEW)
            if setup.exact and not torch.equal(alone.sequences[0, -NEW:], together.sequences[row, -NEW:]):
                return math.inf
            agree = (alone.sequences[0, -NEW:] == together.sequences[row, -NEW:]).long().cumprod(0).sum()
            steps = slice(0, min(int(agree) + 1, NEW))
            worst = max(worst, largest(logits_of(alone)[steps, 0], logits_of(together)[steps, row]))
    return worst


def recompute(setup: Setup, plan: Sequence[vtr.Method]) -> float:
    """Cached decoding against one forward over prompt and answer."""
    model, batch = setup.model, setup.batch()
    with torch.no_grad(), vtr.reduced(model, list(plan)):
        answer = generate(model, batch, NEW)
        whole = batch.followed_by(answer.sequences[:, -NEW:-1])
        logits = model(**whole.inputs, position_ids=whole.positions, use_cache=False).logits[:, -NEW:]
    return largest(logits_of(answer).transpose(0, 1), logits)


def decode(setup: Setup) -> float:
    """O6: cached decoding == full recompute."""
    return recompute(setup, BOTH)


def decode_renumbered(setup: Setup) -> float:
    """O6b: the same with renumbered positions."""
    return recompute(setup, [EveryNth(position_ids="renumber"), Ragged(stage="prefill", layer=2, position_ids="renumber")])


@torch.no_grad()
def static_cache(setup: Setup) -> float:
    """O7: static cache == dynamic cache."""
    model, batch = setup.model, setup.batch()
    with vtr.reduced(model, list(BOTH)):
        dynamic = generate(model, batch, NEW)
        static = generate(model, batch, NEW, cache_implementation="static", disable_compile=True)
    return generations(dynamic, static, setup.exact)


@torch.no_grad()
def beams(setup: Setup) -> float:
    """O7b: beam search of a batch == of its rows."""
    model, batch = setup.model, setup.batch(*tiny_models.beam_rows())
    with vtr.reduced(model, list(BOTH)):
        together = generate(model, batch, 4, num_beams=3).sequences[:, -4:]
        alone = [generate(model, batch.row(row), 4, num_beams=3).sequences[0, -4:] for row in range(2)]
    return equal((together, torch.stack(alone)))


@torch.no_grad()
def embeddings(setup: Setup) -> float:
    """O7c: inputs_embeds == input_ids, forward and generate."""
    model, batch = setup.model, setup.batch()
    inputs = {name: value for name, value in batch.inputs.items() if name != "input_ids"}
    inputs["inputs_embeds"] = model.get_input_embeddings()(batch.inputs["input_ids"])
    with vtr.reduced(model, list(BOTH)):
        a = model(**batch.inputs, position_ids=batch.positions).logits
        b = model(**inputs, position_ids=batch.positions).logits
        if not FAMILIES[setup.kind].counts_text:
            return largest(a, b)
        answer = generate(model, batch, NEW)
        again = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **FAMILIES[setup.kind].generation)
    return max(largest(a, b), equal((answer.sequences[:, -NEW:], again[:, -NEW:])))


def frozen(setup: Setup) -> float:
    """O8: boundary, then frozen in layers 1 and 3 == outputs overwritten by inputs."""
    return against_masks(setup, [EveryNth(stride=2), Freeze()], setup.batch(), freeze=(1, 3))


def frozen_decode(setup: Setup) -> float:
    """O8b: frozen, cached decoding == full recompute."""
    return recompute(setup, [Ragged(), Freeze()])


def tower(setup: Setup) -> float:
    """O9: removal in the tower and at the boundary == masked keys and boundary removal."""
    return against_masks(setup, [TowerTop(), EveryNth(stride=2)], setup.batch())


def tower_merge(setup: Setup) -> float:
    """O9b: two merges in the tower, then the boundary == values replaced, sources masked, keys weighed by log(size)."""
    return against_masks(setup, [MergePairs(stage="tower", layer=0), MergePairs(stage="tower", layer=1), EveryNth(stride=2)], setup.batch())


@torch.no_grad()
def flash(setup: Setup) -> float:
    """O10: FlashAttention-2's code path (stand-in kernel) == SDPA, a batch and a single row, prefill and decode."""
    model, worst = setup.model, 0.0
    for batch in (setup.batch(), setup.batch().row(0)):
        found = []
        for switch in (nullcontext(), flash_attention(model)):
            with switch, vtr.reduced(model, [EveryNth(stride=2), ByAttention(keep=7)]):
                found.append((model(**batch.inputs, use_cache=False).logits, generate(model, batch, NEW)))
        (a, first), (b, second) = found
        real = _filled(batch, a)
        worst = max(worst, largest(a[real], b[real]), generations(first, second, setup.exact))
    return worst


def _filled(batch: Batch, logits: Tensor) -> Tensor:
    """`(B, S')` bool: columns that are filler in no row: the text behind the last image, or everything when there is one row."""
    if len(batch.visual) == 1:
        return torch.ones(logits.shape[:2], dtype=torch.bool)
    behind = min(int((~row).flip(0).long().cumprod(0).sum()) for row in batch.visual)
    return (torch.arange(logits.shape[1]) >= logits.shape[1] - behind).expand(logits.shape[:2])


@torch.no_grad()
def two_turns(setup: Setup) -> float:
    """O12: two turns on one cache == one pass; forward with a batch, then generate."""
    from transformers import DynamicCache

    model = setup.model
    first = setup.batch()
    second = setup.batch((3, Shot(40, 90), 4), (3, Shot(PIXELS, PIXELS), 4), seed=5)
    second = _equal_length(second)
    both = joined(first, second)
    plan = [EveryNth(stride=3), EveryNth(stage="prefill", layer=2)]
    with vtr.reduced(model, plan):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**first.inputs, position_ids=first.positions, **held(cache))
        later = {**second.inputs, "attention_mask": both.inputs["attention_mask"]}
        length = second.visual.shape[1]
        turn = model(**later, position_ids=both.positions[..., -length:], **held(cache)).logits
        whole = model(**both.inputs, position_ids=both.positions, use_cache=False).logits
        text = 4  # behind the last image in both rows
        worst = largest(turn[:, -text:], whole[:, -text:])
        if not FAMILIES[setup.kind].counts_text:
            return worst

        cache = DynamicCache(config=model.config.get_text_config())
        model(**first.inputs, position_ids=first.positions, **held(cache))
        answer = generate(model, second.changed(attention_mask=later["attention_mask"]), NEW, **held(cache))
        return max(worst, generations(answer, generate(model, both, NEW), setup.exact))


def joined(first: Batch, second: Batch) -> Batch:
    """Both turns as one prompt, images row by row."""
    inputs = {name: torch.cat([first.inputs[name], second.inputs[name]], 1) for name in PER_TOKEN if name in first.inputs}
    parts, used = [], [0, 0]
    for row in range(len(first.shots)):
        for turn, batch in enumerate((first, second)):
            stop = used[turn] + len(batch.shots[row])
            parts.append(batch.images(used[turn], stop))
            used[turn] = stop
    inputs |= {name: torch.cat([part[name] for part in parts if part]) for name in next(part for part in parts if part)}
    return Batch(first.kind, inputs, tuple(a + b for a, b in zip(first.shots, second.shots, strict=True)))


def _equal_length(batch: Batch) -> Batch:
    """Fills left padding with text, so that a second turn needs none."""
    ids = torch.where(batch.valid, batch.inputs["input_ids"], 7)
    return batch.changed(input_ids=ids, attention_mask=torch.ones_like(ids))


@torch.no_grad()
def prompt_lookup(setup: Setup) -> float:
    """O12b: prompt-lookup decoding, which crops the cache == greedy."""
    model, batch = setup.model, setup.batch().row(0)
    with vtr.reduced(model, list(BOTH)):
        greedy = generate(model, batch, 8)
        lookup = generate(model, batch, 8, prompt_lookup_num_tokens=2)
    return equal((greedy.sequences, lookup.sequences))


ORACLES: dict[str, Callable[[Setup], float]] = {
    "O1": keep_all,
    "O2": removal,
    "O3": boundary,
    "O3b": boundary_ragged,
    "O3c": boundary_merge,
    "O3d": boundary_renumbered,
    "O4": layers,
    "O4b": layers_merge_renumbered,
    "O5": batch_and_singles,
    "O6": decode,
    "O6b": decode_renumbered,
    "O7": static_cache,
    "O7b": beams,
    "O7c": embeddings,
    "O8": frozen,
    "O8b": frozen_decode,
    "O9": tower,
    "O9b": tower_merge,
    "O10": flash,
    "O12": two_turns,
    "O12b": prompt_lookup,
}
ONLY_SDPA = ("O7", "O7b", "O7c", "O10", "O12", "O12b")
"""Not about the attention backend: run with SDPA alone."""
DISCRETE = ("O7b", "O10", "O12b")
"""Compare generated tokens or choices by attention of two backends, which half precision may round differently."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 0.2}
LOOSE = {("O9b", torch.bfloat16): 0.3}
"""Merged values are rounded once more; the unreduced models themselves are 0.17 to 0.22 away from their float64 results."""


def tolerance(name: str, dtype: torch.dtype, kind: str = "llava") -> float:
    """Largest difference allowed: float64 is the sharp test, bfloat16 only a bound."""
    rounding = FAMILIES[kind].rounding if dtype == torch.bfloat16 else 1.0
    return rounding * LOOSE.get((name, dtype), TOLERANCE[dtype]) + FAMILIES[kind].noise


def judged(name: str, setup: Setup) -> float:
    """Returns the difference that an oracle finds; 0 where the host refuses what it does in the words that its family names, infinity where
    it should and does not."""
    word = FAMILIES[setup.kind].refused.get(name)
    if word is None:
        return ORACLES[name](setup)
    try:
        ORACLES[name](setup)
    except (vtr.VtrError, ValueError) as refusal:
        return 0.0 if word in str(refusal) else math.inf
    return math.inf
