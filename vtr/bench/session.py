"""A run of `vtr bench` on one model: its methods at every budget and batch size, as a record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vtr.bench.compiled import run_compiled
from vtr.bench.measure import Row, run_cell
from vtr.bench.record import environment, make_record
from vtr.bench.schedule import decides_itself, forced, measure_shares, scaled
from vtr.hosts._protocol import Host, host_of
from vtr.planning import make_plan
from vtr.plans import Plan
from vtr.registry import create_method, list_methods, method_class
from vtr.types import Method, VtrError

ALL = "all"


@dataclass(frozen=True)
class Asked:
    """What a run is to do.

    Args:
        methods: registry names; `("all",)` takes all, and lists those that cannot run here instead of failing.
        keeps, batches, new_tokens: every budget is run at every batch size; answers of all lengths come from one run.
        repeats: counted rounds of a cell.
        floors: run the floors too.
        minutes: shared evenly by the cells; no further round of a cell begins after its share. Every cell counts one round at least.
        settings: method -> its settings beside the budget.
        compiled: time the answers with a compiled decode step on a static cache too; of `minutes` it has the second half.
    """

    methods: tuple[str, ...] = (ALL,)
    keeps: tuple[int, ...] = (64,)
    batches: tuple[int, ...] = (1,)
    new_tokens: tuple[int, ...] = (1,)
    repeats: int = 5
    floors: bool = True
    minutes: float | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    compiled: bool = False

    @property
    def names(self) -> list[str]:
        """Registry names, checked."""
        return list_methods() if ALL in self.methods else [method_class(name).name for name in self.methods]


@dataclass
class Counts:
    """Counts that data-dependent methods follow: `source` names the checkpoint, `shares` has them by `method keep`."""

    source: str
    shares: dict[str, tuple[float, ...]] = field(default_factory=dict)


def make(name: str, keep: int, asked: Asked, layers: int) -> Method:
    """Returns a method with a budget and the user's settings."""
    cls = method_class(name)
    settings = dict(asked.settings.get(name, {}))
    if not settings and ALL in asked.methods:
        settings = cls.timed_settings(layers)
    return create_method(name, **({"keep": keep} if cls.takes_budget else {}), **settings)


def tokens_of(model: Any, inputs: Mapping[str, Any]) -> int:
    """Returns the most visual tokens that an image can have, or those of the image in some inputs where the checkpoint does not limit it.

    Raises:
        VtrError: not a multimodal model.
    """
    host = host_of(model)
    if not isinstance(host, Host):
        raise VtrError(f"bench: {host.name} has no LLM, and prefill and decode are what is timed; give a multimodal model")
    return int(host.most_tokens or host.images_of(inputs)[0].tokens)


def find_counts(model: Any, asked: Asked, tokens: int, source: str, trained: Any, prompts: Sequence[Any], there: int) -> Counts:
    """Measures the counts of data-dependent methods on a trained checkpoint.

    Args:
        model: what will be timed, with images of `tokens` visual tokens.
        asked: methods and budgets.
        tokens: visual tokens of an image of `model`.
        source, trained: name and model of the checkpoint.
        prompts: its inputs.
        there: visual tokens of an image of the checkpoint.
    """
    counts, host = Counts(source), host_of(model)
    for name in asked.names:
        for keep in asked.keeps:
            try:
                method = make(name, keep, asked, host.llm_layers)
                if not decides_itself(make_plan(host, method)):
                    continue
                counts.shares[f"{name} {keep}"] = measure_shares(trained, prompts, scaled(method, tokens, there))
            except (ValueError, VtrError):
                if ALL not in asked.methods:
                    raise
    return counts


def bench_model(
    model: Any,
    facts: Mapping[str, Any],
    pool: Callable[[int], Sequence[Any]],
    asked: Asked,
    counts: Counts | None = None,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
    advance: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Runs every cell and returns the record of all.

    Args:
        model: on its device.
        facts: `name`, `tokens`, ... of the model, filed as they are.
        pool: batch size -> prompts.
        asked: what to do.
        counts: for data-dependent methods on random weights; None lets them count for themselves.
        save: called with the record after every round.
        advance: called with a line about what was done.

    Raises:
        VtrError: not a multimodal model.
    """
    host, start = host_of(model), time.monotonic()
    if not isinstance(host, Host):
        raise VtrError(f"bench: {facts['name']} has no LLM, and prefill and decode are what is timed; give a multimodal model")
    weights = sum(p.nbytes for p in model.parameters())
    described = {
        **facts,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": host.attention_name(tower=False),
    }
    refused: dict[str, str] = {}
    record = make_record("model", environment(model.device), model=described, counts=None, refused=refused, cells=[])
    if counts is not None:
        record["counts"] = {"source": counts.source, "shares": counts.shares}
    share = float("inf") if asked.minutes is None else 60 * asked.minutes / (len(asked.batches) * len(asked.keeps))
    for batch in asked.batches:
        prompts = pool(batch)
        for keep in asked.keeps:
            methods = list(_methods(asked, keep, host, counts, refused))
            tolerated = refused if ALL in asked.methods else None
            cell = {"keep": keep, "batch": batch, "prompt": prompts[0]["input_ids"].shape[1], "rows": []}
            record["cells"].append(cell)
            until = start + share * len(record["cells"])
            half = until - share / 2 if asked.compiled else until

            def after(rows: list[Row], cell: dict[str, Any] = cell) -> None:
                cell["rows"] = [row.to_dict() for row in rows]
                record["seconds"] = round(time.monotonic() - start, 1)
                save(record)

            rows = run_cell(model, prompts, methods, keep, asked.new_tokens, asked.repeats, asked.floors, half, tolerated, after, advance)
            if asked.compiled:
                run_compiled(model, rows, prompts, asked.new_tokens, asked.repeats, until, after, advance)
    return record


def _methods(asked: Asked, keep: int, host: Any, counts: Counts | None, refused: dict[str, str]) -> Iterable[Method | Plan]:
    for name in asked.names:
        try:
            method = make(name, keep, asked, host.llm_layers)
            made = make_plan(host, method)
        except (TypeError, ValueError, VtrError) as error:
            if ALL not in asked.methods:
                raise
            refused[name] = str(error)
            continue
        shares = counts.shares.get(f"{name} {keep}") if counts is not None else None
        yield method if not shares else forced(made, shares)


def dtype_of(name: str, device: str, stored: str) -> torch.dtype:
    """Returns the dtype of a name; `auto` = float32 on the CPU, elsewhere as the checkpoint is stored."""
    chosen = ("float32" if device == "cpu" else stored) if name == "auto" else name
    return getattr(torch, chosen)
