"""Vectors `corematching-code-*` (authors' code) and `corematching-paper-*` (float64 reference of our own)."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.replay import Vector, close, same_index
from vtr.methods.corematching import core_neurons, core_votes, shared_neurons
from vtr.ops.elbow import Elbow, elbow


def replay(vector: Vector) -> None:
    if vector.has("act_positive", "counts", "core_tokens"):
        _released(vector)
    elif vector.has("activation", "frequency", "core_tokens"):
        _paper(vector)
    else:
        raise vector.unknown_schema()


def _elbow(counts: Tensor) -> Elbow:
    return elbow(counts, torch.ones_like(counts, dtype=torch.bool))


def _span(vector: Vector) -> slice:
    start = vector.param("image_start")
    return slice(start, start + vector.param("image_tokens"))


def _released(vector: Vector) -> None:
    active, span = vector["act_positive"].bool(), _span(vector)
    counts = released_counts(active[None], vector.param("reference_row", -5))[:, span]
    close("counts", counts[0], vector["counts"])
    found = _elbow(counts)
    close("distance", found.distance[0], vector["distance"])
    same_index("elbow_index", found.place[0], vector["elbow_index"].view(()))
    close("elbow_value", found.value[0], vector["elbow_value"].view(()))
    core = counts[0] > found.value
    same_index("core_tokens", core.nonzero().flatten(), vector["core_tokens"])
    gone = torch.zeros(1, len(active), dtype=torch.bool)
    gone[0, span] = ~core
    for name in ("key", "value"):
        close(f"{name}_out", zeroed(vector[f"{name}_in"], gone), vector[f"{name}_out"])


def _paper(vector: Vector) -> None:
    activation, span = vector["activation"][None], _span(vector)
    votes = core_votes(activation, torch.ones(activation.shape[:2], dtype=torch.bool), vector.param("rho", 0.2))
    same_index("frequency", votes[0], vector["frequency"])
    core = core_neurons(votes, vector.param("beta", 0.4))
    same_index("core_neurons", core[0].nonzero().flatten(), vector["core_neurons"])
    shared = shared_neurons(activation[:, span], core)
    close("intersection", shared[0], vector["intersection"])
    found = _elbow(shared)
    same_index("elbow_index", found.place[0], vector["elbow_index"].view(()))
    close("threshold", found.value[0], vector["threshold"].view(()))
    same_index("core_tokens", (shared[0] >= found.value).nonzero().flatten(), vector["core_tokens"])


def released_counts(active: Tensor, reference: int = -5) -> Tensor:
    """Released: neurons active (`active (G, S, I)` bool) in a token and in the one at place `reference` (the last of the question): `(G, S)`."""
    return (active & active[:, reference, None]).sum(2).double()


def zeroed(states: Tensor, gone: Tensor) -> Tensor:
    """Released: keys or values `(B, H, S, d)` with zeros at the tokens `gone (B, S)`, which stay in the softmax."""
    return states.masked_fill(gone[:, None, :, None], 0)
