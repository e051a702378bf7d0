"""Predicts times and memory of a method from the closed form and a calibration, and says what limits the gain.

No weights are needed: lengths follow from a plan, work from `vtr.cost`, milliseconds from `vtr.bench.calibration`. Choosing is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any

from vtr.bench.calibration import Calibration, Rates, rate_at
from vtr.bench.schedule import Schedule, decides_itself, kept_schedule
from vtr.bench.shapes import Shape
from vtr.cost import TransformerShape, kv_bytes, layer_flops
from vtr.plans import Plan
from vtr.types.errors import WrongValue

KV_PASSES = 3
"""A decode step reads the KV cache, and a cache that grows is copied in front of that: read, written, read."""
PREFIX = 1
"""CLS token of the towers of all shapes."""
PARTS = ("tower", "projector", "LLM before the cut", "LLM", "decode")
"""Parts of a total; `LLM before the cut` are the layers in front of the last removal inside the LLM."""


def transformers_of(shape: Shape) -> tuple[TransformerShape, TransformerShape]:
    """Returns tower and LLM of a shape for the formulas."""
    (width, inner, layers, heads), llm = shape.tower, shape.llm
    tower = TransformerShape(layers, width, inner, heads, heads, width // heads, mlp_matrices=2)
    return tower, TransformerShape(llm[2], llm[0], llm[1], llm[3], llm[3], llm[0] // llm[3])


def views_of(shape: Shape) -> int:
    """Returns the views of an image."""
    return 5 if shape.anyres else 1


def full_schedule(shape: Shape) -> Schedule:
    """Returns the lengths of the full model, as `vtr.bench.schedule.measure_schedule` sees them."""
    patches = (shape.image // shape.patch) ** 2
    length = shape.placeholders + shape.text
    return Schedule(None, ((patches + PREFIX,) * 2,) * shape.tower[2], patches, (length,) * shape.llm[2])


def planned_schedule(shape: Shape, plan: Plan) -> Schedule:
    """Returns the lengths that a plan leaves of one image of a shape, without a run.

    On one view they are those of a run, where all steps have a budget; a step that decides itself how much stays counts as removing nothing
    (`Plan.after`). With several views every view is taken to keep the same, images made smaller to be square, and as many newline tokens to stay
    as rows keep a token when tokens are taken at random.
    """
    full, views = full_schedule(shape), views_of(shape)
    attention, mlp = ([pair[side] for pair in full.tower] for side in (0, 1))
    projector, grid = full.projector, None
    for item, left in zip(plan.steps, plan.after(shape.tokens), strict=True):
        step = item.step
        if (step.stage == "boundary" and step.side == "after_projector") or step.stage not in ("input", "tower", "boundary"):
            continue
        projector = -(-left // views)
        if step.stage == "input":
            grid = (max(isqrt(left // views), 1),) * 2
            projector = grid[0] * grid[1]
        if step.stage != "boundary":
            first = step.layer if step.stage == "tower" else 0
            late = int(step.at == "mlp")
            attention[first + late :] = [projector + PREFIX] * (len(attention) - first - late)
            mlp[first:] = [projector + PREFIX] * (len(mlp) - first)
    llm = tuple(shape.text + left + _newlines(shape, plan, left) for left in plan.counts(shape.tokens))
    return Schedule(grid, tuple(zip(attention, mlp, strict=True)), projector, llm, tuple(plan.frozen))


def _newlines(shape: Shape, plan: Plan, left: int) -> int:
    """Newline tokens that stay with `left` visual tokens; a row has as many tokens as there are rows."""
    rows = shape.placeholders - shape.tokens
    kept = next((item.newlines for item in plan.steps if item.removes), "all")
    if left == shape.tokens or kept == "all":
        return rows
    return 0 if kept == "none" else round(rows * (1 - (1 - left / shape.tokens) ** rows))


def sizes_of(shape: Shape, schedules: Sequence[Schedule], batch: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Returns the `(sequences, tokens)` that a calibration should time for tower and LLM: the longest and the shortest of all schedules."""
    towers = sorted({pair[0] for one in schedules for pair in one.tower})
    lengths = sorted({length for one in schedules for length in one.llm})
    found = ((batch * views_of(shape), towers), (batch, lengths))
    return tuple([(many, tokens) for tokens in sorted({some[0], some[-1]})] for many, some in found)  # type: ignore[return-value]


@dataclass(frozen=True)
class Costs:
    """Predicted times and memory of one way to run a prompt, of a whole batch.

    Args:
        ms: milliseconds of each of `PARTS`.
        visual: visual tokens, newlines included, behind the last LLM layer.
        weight_bytes, kv_bytes, peak_bytes: weights; KV cache behind the answer; the most that a prefill takes on top of weights and prompts,
            KV cache included (an estimate).
    """

    ms: Mapping[str, float]
    visual: int
    weight_bytes: float
    kv_bytes: float
    peak_bytes: float

    @property
    def prefill(self) -> float:
        """Milliseconds until the first token."""
        return self.total - self.ms["decode"]

    @property
    def total(self) -> float:
        """Milliseconds of the whole answer."""
        return sum(self.ms.values())

    @property
    def memory(self) -> float:
        """Bytes at the peak: weights, and the prefill's peak or the cache of the whole answer."""
        return self.weight_bytes + max(self.peak_bytes, self.kv_bytes)


def costs(
    shape: Shape, schedule: Schedule, cut: int, batch: int, new_tokens: int, calibration: Calibration, weights: float, itemsize: int
) -> Costs:
    """Returns the costs of a batch of prompts with one image each.

    Args:
        shape: the model; schedule: its lengths.
        cut: first LLM layers to count apart, in `LLM before the cut`.
        batch: prompts; new_tokens: of an answer, of which the prefill makes the first.
        calibration: rates of this machine.
        weights: bytes of all weights; itemsize: bytes of a number in cache and activations.
    """
    tower, llm = transformers_of(shape)
    images = batch * views_of(shape)
    patches = schedule.grid[0] * schedule.grid[1] if schedule.grid else (shape.image // shape.patch) ** 2
    embedding = images * patches * 3 * shape.patch**2 * tower.hidden / rate_at(calibration.tower.linear, images * patches)
    encoding = embedding + sum(_layer_s(tower, calibration.tower, images, n, n, mlp) for n, mlp in schedule.tower)
    projected = images * schedule.projector
    projecting = projected * llm.hidden * (tower.hidden + llm.hidden) / rate_at(calibration.llm.linear, projected)
    layers = [_layer_s(llm, calibration.llm, batch, shape.text if i in schedule.frozen else n, n) for i, n in enumerate(schedule.llm)]
    head = shape.vocabulary * llm.hidden * itemsize
    read = itemsize * sum(layer_flops(llm, 1) - 2 * llm.heads * llm.head_dim for _ in range(llm.layers)) + head
    steps = max(new_tokens - 1, 0)
    caches = [batch * kv_bytes(llm, [n + step for n in schedule.llm], itemsize) for step in range(steps + 1)]
    decoding = sum(read + KV_PASSES * cache for cache in caches[1:]) / calibration.bandwidth
    seconds = (encoding, projecting, sum(layers[:cut]), sum(layers[cut:]) + head / calibration.bandwidth, decoding)
    one, held, most = kv_bytes(llm, [1] * llm.layers, itemsize) / llm.layers, 0.0, 0.0
    for n in schedule.llm:
        held += batch * n * one
        most = max(most, held + batch * n * (8 * llm.hidden + 3 * llm.intermediate) * itemsize)
    seen = max(pair[0] for pair in schedule.tower)
    most = max(most, images * seen * (8 * tower.hidden + 2 * tower.intermediate) * itemsize)
    ms = {part: 1e3 * spent for part, spent in zip(PARTS, seconds, strict=True)}
    return Costs(ms, schedule.llm[-1] - shape.text, weights, caches[-1], most)


def _layer_s(shape: TransformerShape, rates: Rates, batch: int, queries: int, keys: int, mlp: int | None = None) -> float:
    """Seconds of one layer with `mlp` tokens at its MLP, as many as queries where None."""
    attention = 2 * queries * keys * shape.heads * shape.head_dim
    merged = (queries - mlp) * shape.mlp_matrices * shape.hidden * shape.intermediate if mlp is not None else 0
    linear = layer_flops(shape, queries, keys) - attention - merged
    return batch * linear / rate_at(rates.linear, batch * queries) + batch * attention / rate_at(rates.attention, keys)


@dataclass(frozen=True)
class Prediction:
    """The full model, a method, and the kept floor: the whole tower, then an LLM that is given the kept tokens only.

    Args:
        full, reduced, floor: costs of each.
        cut: LLM layers in front of the last removal inside the LLM, 0 where there is none.
        text: text tokens of the prompt; new_tokens: of the answer.
        cuts_tower: whether the method shortens the tower.
        adaptive: whether a step of the method decides itself how much stays, which makes its costs upper bounds.
    """

    full: Costs
    reduced: Costs
    floor: Costs
    cut: int
    text: int
    new_tokens: int
    cuts_tower: bool
    adaptive: bool

    def factor(self, part: str, of: str = "reduced") -> float:
        """Returns how many times less than the full model: `part` is `prefill`, `total` or `memory`, `of` is `reduced` or `floor`."""
        return getattr(self.full, part) / getattr(getattr(self, of), part)

    def limit(self) -> str:
        """Returns one sentence: the part that takes most of the reduced total, and what would make it smaller."""
        ms, total = self.reduced.ms, self.reduced.total
        largest = max(PARTS, key=lambda part: ms[part])
        share = f"{100 * ms[largest] / total:.0f} % of the rest"
        if largest == "tower" and self.cuts_tower:
            return f"the tower is {share}, although the method cuts inside it: a smaller keep, or a cut in an earlier layer, would help"
        if largest == "tower":
            bound = self.full.prefill / ms["tower"]
            return (
                f"the tower is {share}: a tower method would help (vtr list --stage tower, or --stage input); "
                f"with the whole tower no prefill is more than {bound:.2f} times faster"
            )
        if largest == "decode":
            return (
                f"decode is {share}: each of the {self.new_tokens} new tokens reads all weights of the LLM, whatever was removed; "
                "shorter answers, a larger batch or quantised weights would help"
            )
        if largest == "LLM before the cut":
            return (
                f"the {self.cut} LLM layers before the cut are {share}: a cut in an earlier layer, "
                "or a method at the boundary (vtr list --stage boundary), would help"
            )
        if largest == "projector":
            return f"the projector is {share}: a method that removes before it (vtr list --stage tower) would help"
        if self.text >= self.reduced.visual:
            return f"the LLM is {share}, and {self.text} of its tokens are text, {self.reduced.visual} visual: a shorter prompt would help"
        return f"the LLM is {share}, with {self.reduced.visual} visual tokens in its last layer and {self.text} of text: a smaller keep would help"

    def memory_limit(self) -> str:
        """Returns one sentence on what takes the reduced memory."""
        share = 100 * self.reduced.weight_bytes / self.reduced.memory
        if share >= 50:
            return f"weights are {share:.0f} % of the memory: only a smaller dtype or quantisation changes that"
        return f"weights are {share:.0f} % of the memory, cache and activations the rest: fewer tokens or a smaller batch would help"

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        factors = {of: {part: self.factor(part, of) for part in ("prefill", "total", "memory")} for of in ("reduced", "floor")}
        return {**asdict(self), "factors": factors, "limit": self.limit(), "memory_limit": self.memory_limit()}


def predict(
    shape: Shape, plan: Plan, keep: int, batch: int, new_tokens: int, calibration: Calibration, weights: float, itemsize: int
) -> Prediction:
    """Returns what a method would gain on a shape.

    Args:
        shape: the model; plan: of the method, made for it.
        keep: visual tokens of the kept floor.
        batch, new_tokens, calibration, weights, itemsize: see `costs`.

    Raises:
        ValueError: `keep` is not within 1 and the visual tokens of an image.
    """
    check_keep(shape, keep)
    full, reduced = full_schedule(shape), planned_schedule(shape, plan)
    cut = next(i for i, n in enumerate(reduced.llm) if n == reduced.llm[-1])
    bounds = plan.adaptive or bool(decides_itself(plan))
    given = (cut, batch, new_tokens, calibration, weights, itemsize)
    first, second, third = (costs(shape, one, *given) for one in (full, reduced, kept_schedule(full, shape.text, keep)))
    return Prediction(first, second, third, cut, shape.text, new_tokens, reduced.tower != full.tower, bounds)


def check_keep(shape: Shape, keep: int) -> None:
    """Refuses a budget that is no part of an image.

    Raises:
        ValueError: more than the visual tokens of an image, or less than 1.
    """
    if not 1 <= keep <= shape.tokens:
        raise WrongValue(f"speedup: keep must be within 1 and {shape.tokens}, the visual tokens of an image of {shape.name}, got {keep}")
