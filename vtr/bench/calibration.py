"""How fast this machine runs one layer of a given size, and how fast it reads weights: a few seconds, no checkpoint.

A layer is written out in plain torch with its norms, rotary embedding and activation, so that a rate holds what the closed form leaves out.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vtr.bench.stopwatch import Stopwatch
from vtr.cost import TransformerShape, layer_flops
from vtr.models.devices import synchronize

MOST_ROWS = 2048
"""Longer products are not timed: their rate no longer changes."""
COLD_BYTES = 256 * 2**20
"""Weights that decode steps are timed on, at least where the model has as many: more than caches hold."""
SECONDS, RUNS = 4.0, 15
"""Rounds of all sizes begin until so long has passed: one that warms up, one that counts at least, and so many at most."""

Table = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Rates:
    """Multiply-adds per second of one kind of layer.

    Args:
        linear: `(rows of a product, rate)`, ascending: everything but attention. Few rows are slower for each of them.
        attention: `(tokens, rate)`, ascending; of the full square, also where causality halves the work.
    """

    linear: Table
    attention: Table


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Args:
        tower, llm: rates of one of their layers.
        bandwidth: bytes of weights per second in a decode step.
    """

    tower: Rates
    llm: Rates
    bandwidth: float

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)


def rate_at(table: Table, size: float) -> float:
    """Returns the rate at a size: linear in the logarithm of the size between two measured ones, the nearest measured one outside of them.

    Args:
        table: `(size, multiply-adds per second)`, ascending, one pair at least.
        size: rows or tokens, at least 1.
    """
    for (low, first), (high, second) in pairwise(table):
        if low <= size <= high and low < high:
            return first + (second - first) * math.log(size / low) / math.log(high / low)
    return table[0][1] if size < table[0][0] else table[-1][1]


@torch.no_grad()
def calibrate(
    tower: TransformerShape,
    llm: TransformerShape,
    tower_sizes: Sequence[tuple[int, int]],
    llm_sizes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: str,
) -> Calibration:
    """Times layers of both kinds at the sizes in question.

    On a CPU it takes the smaller of process time and wall time, so that what other programs do meanwhile counts with one thread only where they
    fill the caches; on a GPU it takes CUDA events.

    Args:
        tower, llm: one layer of each is made, with a constant weight; several of the LLM where they are small, so that they are not cached.
        tower_sizes, llm_sizes: `(sequences, tokens of one)`; the first LLM size says how many sequences a decode step has.
        dtype, device: as the model would have them.
    """
    place = torch.device(device)
    first = Layer(llm, dtype, place)
    cold = [first, *(Layer(llm, dtype, place) for _ in range(min(llm.layers, -(-COLD_BYTES // first.nbytes)) - 1))]
    step = torch.randn(llm_sizes[0][0], 1, llm.hidden, dtype=dtype, device=place)
    sorts = (_works(Layer(tower, dtype, place), tower_sizes), _works(first, llm_sizes))
    spent = iter(_seconds([_decode_step(cold, step), *(work for sort in sorts for _, work in sort.values())], place))
    bandwidth = sum(layer.nbytes for layer in cold) / next(spent)
    tables: list[dict[str, list[tuple[int, float]]]] = [{"linear": [], "attention": []} for _ in sorts]
    for sort, table in zip(sorts, tables, strict=True):
        for (kind, size), (flops, _) in sort.items():
            table[kind].append((size, flops / next(spent)))
    of_tower, of_llm = (Rates(*(tuple(sorted(table[kind])) for kind in ("linear", "attention"))) for table in tables)
    return Calibration(of_tower, of_llm, bandwidth)


class Layer:
    """One layer in plain torch: with three MLP matrices as Llama has it, with two as CLIP has it."""

    def __init__(self, shape: TransformerShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        inner, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sizes = [(inner, shape.hidden), (kv, shape.hidden), (kv, shape.hidden), (shape.hidden, inner)]
        sizes += [(shape.intermediate, shape.hidden)] * (shape.mlp_matrices - 1) + [(shape.hidden, shape.intermediate)]
        self.weights = [torch.full(size, 0.01, dtype=dtype, device=device) for size in sizes]
        self.nbytes = sum(weight.nbytes for weight in self.weights)

    def linear(self, hidden: Tensor) -> Tensor:
        """Runs everything but attention on `(B, T, D)`."""
        query, key, value, out, *mlp = self.weights
        normed = self._norm(hidden)
        mixed = self._rotated(functional.linear(normed, query))
        self._rotated(functional.linear(normed, key))
        functional.linear(normed, value)
        hidden = hidden + functional.linear(mixed, out)
        inside = functional.linear(self._norm(hidden), mlp[0])
        gated = functional.silu(inside) * functional.linear(hidden, mlp[1]) if len(mlp) == 3 else inside * torch.sigmoid(1.702 * inside)
        return hidden + functional.linear(gated, mlp[-1])

    def attend(self, batch: int, tokens: int) -> Callable[[], Tensor]:
        """Returns attention of `batch` sequences of `tokens`, causal in an LLM."""
        shape = self.shape
        own = [torch.randn(batch, tokens, shape.heads * shape.head_dim, dtype=self.dtype, device=self.device) for _ in range(3)]
        query, key, value = (one.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for one in own)
        causal = shape.mlp_matrices == 3
        return lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).flatten(2)

    def _norm(self, hidden: Tensor) -> Tensor:
        if self.shape.mlp_matrices == 2:
            return functional.layer_norm(hidden, hidden.shape[-1:])
        wide = hidden.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)

    def _rotated(self, tensor: Tensor) -> Tensor:
        if self.shape.mlp_matrices == 2:
            return tensor
        first, second = tensor.chunk(2, -1)
        return tensor * 0.5 + torch.cat([-second, first], -1) * 0.5


Work = Callable[[], Any]


def _decode_step(layers: Sequence[Layer], hidden: Tensor) -> Work:
    return lambda: [layer.linear(hidden) for layer in layers]


def _works(layer: Layer, sizes: Sequence[tuple[int, int]]) -> dict[tuple[str, int], tuple[float, Work]]:
    """Returns `(linear or attention, size) -> (multiply-adds, what does them)` of all sizes, each once."""
    shape, found = layer.shape, dict[tuple[str, int], tuple[float, Work]]()
    for batch, tokens in sizes:
        square = 2 * tokens * tokens * shape.heads * shape.head_dim
        rows, several = min(batch * tokens, MOST_ROWS), min(batch, max(MOST_ROWS // tokens, 1))
        hidden = torch.randn(1, rows, shape.hidden, dtype=layer.dtype, device=layer.device)
        found["linear", rows] = rows * (layer_flops(shape, tokens) - square) / tokens, partial(layer.linear, hidden)
        found["attention", tokens] = several * square, layer.attend(several, tokens)
    return found


def _seconds(works: Sequence[Work], place: torch.device) -> list[float]:
    """Returns the median time of each, run by turns so that a machine that slows down slows all of them; the first round does not count."""
    found: list[list[float]] = [[] for _ in works]
    start, turn = time.monotonic(), 0
    while turn < 2 or (turn <= RUNS and time.monotonic() - start < SECONDS):
        for work, own in zip(works, found, strict=True):
            synchronize(place)
            watch, wall = Stopwatch(place), time.perf_counter()
            watch.mark("start")
            work()
            watch.mark("end")
            synchronize(place)
            wall = time.perf_counter() - wall
            spent = watch.ms("start", "end") / 1e3
            own.append(spent if place.type == "cuda" else min(spent, wall))
        turn += 1
    return [max(statistics.median(own[1:]), 1e-9) for own in found]
