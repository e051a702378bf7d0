"""`docs/speed.md` from the records in `eval/speed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from scripts.pages.targets import tower_against_boundary, verdicts
from vtr.bench.record import KEPT, METHOD
from vtr.bench.tables import Cell, compiled_cell, heads, lines, not_compiled, ops_table, row_of, runs_of, selections_table, spread
from vtr.markdown import markdown_table

Record = Mapping[str, Any]
HEAD = """# Speed

Written by `python scripts/speed_page.py` from the records in `eval/speed/`; do not edit. How to read it:

- Every number is a median over rounds, ± the largest distance of a round from it. A round runs the full model, the floors and every method
  once, one after the other on the same prompts; the next round has other prompts and begins with another row. A first round warms up.
- On a GPU times are CUDA events around synchronised work; on a CPU process time of all threads, which leaves out what other programs do.
  All rows of a table use one attention backend and the same weights, which are random unless it says otherwise.
- *average tokens*: visual tokens per LLM layer, the mean over layers; methods that remove late have more of them at the same budget.
- *tower*: encoding the images, projector and removals in it included. *choosing*: computing signals and selecting. *prefill*: all up to the
  first token, tower and choosing included. *total*: prefill and the further tokens, each by one step with a growing KV cache.
- *peak*: bytes allocated during a prefill on top of weights and prompts. *KV*: the cache after the prefill.
- *full*: the model without a reduction. *Kept floor*: the whole tower, then the LLM given only the kept tokens from the start. *Schedule
  floor*: the same weights cut by hand to the lengths that the method was seen to run on, in every layer of tower and LLM, without selection
  and hooks. "of schedule floor" is method / floor: prefill, and behind the slash the total of the longest answer.
- *With the decode step compiled on a static cache*: `torch.compile(fullgraph=True)` in a warm-up that is not counted; the prefill is eager and
  writes into a cache that is, in all layers, as long as the row's longest layer and the answer. Rows follow one after the other here, each
  with all of its rounds, since a compiled step belongs to one installed reduction.
- Methods whose counts depend on the images follow counts measured on an embedded checkpoint where weights are random; the table says so.
"""
NOT_RUN = """No record from a GPU is here: `scripts/bench_gpu.sh`, which makes the tables of the shapes `llava-1.5-7b` and `llava-next-7b`, has not
run on a GPU yet. It was tried with a small shape on a CPU only. Nothing on this page says how fast anything is on a GPU."""


def page(records: Sequence[tuple[str, Record]]) -> str:
    """Returns the text of the page.

    Args:
        records: name and content of each, in the order of the page.
    """
    models = [(name, record) for name, record in records if record["kind"] == "model"]
    parts = [HEAD.rstrip()]
    if not any(record["environment"]["kind"] == "cuda" for _, record in models):
        parts.append(NOT_RUN)
    parts.append(_targets(models))
    parts.append(_choosing(models))
    parts += [_ops(name, record) for name, record in records if record["kind"] == "ops"]
    parts += [_model(name, record) for name, record in models if any(row_of(cell, KEPT) for cell in record["cells"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _where(record: Record) -> str:
    facts, versions = record["environment"], record["environment"]["versions"]
    device = f"{facts['device']}, driver {facts['driver']}, CUDA {facts['cuda']}" if facts["kind"] == "cuda" else _cpu(facts)
    return f"{device}; {facts['clock']}; torch {versions['torch']}, transformers {versions['transformers']}; {facts['date']}."


def _cpu(facts: Mapping[str, Any]) -> str:
    return f"{facts['device']}, {facts['threads']} thread(s), load average {facts['load']} on {facts['cores']} cores at the start"


def _title(record: Record, cell: Cell) -> str:
    model = record["model"]
    return f"{model['name']}, {cell['keep']} of {model['tokens']} tokens, batch {cell['batch']}"


def _model(name: str, record: Record) -> str:
    model = record["model"]
    weights = "random weights" if model["random"] else "trained weights"
    what = f"{model['parameters'] / 1e6:.0f} M parameters, {weights}, {model['dtype']}, {model['attention']}"
    found = [f"## {model['name']}, {model['tokens']} visual tokens", "", f"`eval/speed/{name}.json`: {what}. {_where(record)}"]
    counts = record["counts"]
    if counts and counts["shares"]:
        followers = ", ".join(counts["shares"])
        found += ["", f"Counts measured on `{counts['source']}` and scaled to this model: {followers}."]
    for cell in record["cells"]:
        rounds = len(cell["rows"][0]["runs"])
        found += [
            "",
            f"### {cell['keep']} tokens kept, batch {cell['batch']}",
            "",
            f"Prompt of {cell['prompt']} tokens, {rounds} round(s).",
            "",
        ]
        found.append(markdown_table(heads(cell), lines(cell)))
        found += _compiled(cell)
    if record["refused"]:
        found += ["", "Not run:", "", *(f"- {method}: {reason}" for method, reason in record["refused"].items())]
    return "\n".join(found)


def _compiled(cell: Cell) -> list[str]:
    """Returns lines about the answers with a compiled decode step, none where that was not asked for."""
    own, reasons = compiled_cell(cell), not_compiled(cell)
    found = []
    if own is not None:
        seconds = [row["compiled"]["warm_up_s"] for row in own["rows"]]
        rounds = len(own["rows"][0]["runs"])
        said = f"With the decode step compiled on a static cache, {rounds} round(s); compiling took {min(seconds):.0f} to {max(seconds):.0f} s a row:"
        found += ["", said, "", markdown_table(heads(own), lines(own))]
    if reasons:
        found += ["", "Not compiled:", "", *(f"- {name}: {reason}" for name, reason in reasons.items())]
    return found


def _targets(models: Sequence[tuple[str, Record]]) -> str:
    """Returns which targets are met, a list of misses with their reasons, and tower methods against the boundary."""
    found = [
        "## Targets",
        "",
        "Of every method: prefill within 5 % of the schedule floor plus choosing; choosing at most 3 % of the full prefill on a GPU and 5 % on a",
        "CPU; decode within 2 % of the schedule floor on a GPU at batch 8; peak memory, weights included, at most the full model's and 1 %.",
    ]
    for _, record in models:
        for cell in [cell for cell in record["cells"] if row_of(cell, KEPT)]:
            own = verdicts(cell, record["environment"], record["model"]["weight_bytes"])
            kinds = list(dict.fromkeys(v.target for v in own))
            table = {v.method: {} for v in own}  # type: dict[str, dict[str, str]]
            for v in own:
                table[v.method][v.target] = v.found if v.met else f"**{v.found}**"
            alone = (
                " One round only, so there is no spread: a few percent either way may be noise."
                if len(cell["rows"][0]["runs"]) == 1
                else ""
            )
            found += ["", f"### {_title(record, cell)}", "", f"Misses are bold.{alone}", ""]
            found.append(markdown_table(["", *kinds], [[m, *(own_found.get(k, "") for k in kinds)] for m, own_found in table.items()]))
            missed = [v for v in own if not v.met]
            if missed:
                found += ["", "Misses:", "", *(f"- {v.method}, {v.target} {v.found}: {v.reason}." for v in missed)]
            tower = tower_against_boundary(cell)
            if tower:
                said = "; ".join(f"{name} {ratio:.2f} ({'faster' if ratio < 1 else 'slower'})" for name, ratio in tower)
                found += ["", f"Tower methods against the boundary form of the budget at no cost (kept floor), prefill: {said}."]
    return "\n".join(found) if len(found) > 4 else ""


def _choosing(models: Sequence[tuple[str, Record]]) -> str:
    """Returns the milliseconds of choosing: a line per method, a column per model, budget and batch size."""
    columns: dict[str, None] = {}
    table: dict[str, dict[str, str]] = {}
    for _, record in models:
        for cell in record["cells"]:
            title = f"{record['model']['name']}, {cell['keep']} of {record['model']['tokens']}, B = {cell['batch']}"
            columns[title] = None
            full = median(runs_of(cell["rows"][0], "prefill_ms"))
            for row in [row for row in cell["rows"] if row["kind"] == METHOD]:
                chosen = runs_of(row, "choosing_ms")
                table.setdefault(row["name"], {})[title] = f"{spread(chosen)} ({100 * median(chosen) / full:.1f} %)"
    if not table:
        return ""
    body = [[name, *(table[name].get(column, "") for column in columns)] for name in sorted(table)]
    said = "Milliseconds, and in percent of the full model's prefill in the same run. A batch is that many prompts with one image each."
    return "\n".join(["## Time spent choosing", "", said, "", markdown_table(["", *columns], body)])


def _ops(name: str, record: Record) -> str:
    head, body = ops_table(record["rows"])
    said = f"`eval/speed/{name}.json`: random tokens {record['width']} wide in {record['dtype']}, one of nine kept. {_where(record)}"
    parts = ["## Selection functions by themselves", "", said, "", markdown_table(head, body)] if body else []
    if record.get("selections"):
        head, body = selections_table(record["selections"])
        said = (
            f"`eval/speed/{name}.json`: each method's own step beside a plain implementation of its paper, one image at a time, by turns on the same "
            f"random tokens (64 of 576, 160 of 2880 kept). A ratio above 1 is faster, below 1 slower. {_counted(record)} {_where(record)}\n\n"
            "The launches, and that nothing waits for the device, are those of a GPU, where they are the same for any batch; a reference takes its "
            "images one by one. A CPU gets large rows in blocks that fit in its cache, and a greedy choice looks at its picks there. Below a "
            "millisecond a time is launches and little work: vtr has more of them, since rows may be ragged, tokens may have gone before, and ties "
            "go to the lowest index."
        )
        parts += [*([""] if parts else []), "## Selections beside plain references", "", said, "", markdown_table(head, body)]
    return "\n".join(parts)


def _counted(record: Record) -> str:
    """Returns in how many cases the methods are faster, and which are slower in every round."""
    rounds = {
        (row["method"], row["tokens"], row["batch"]): list(zip(row["plain_ms"], row["ms"], strict=True))
        for row in record["selections"]
        if "left_out" not in row
    }
    faster = sum(all(slow > fast for slow, fast in found) for found in rounds.values())
    slower = {
        case: median(fast for _, fast in found) - median(slow for slow, _ in found)
        for case, found in rounds.items()
        if all(slow < fast for slow, fast in found)
    }
    said = f"Faster in every round in {faster} of {len(rounds)} cases, slower in every round in {len(slower)}"
    named = ", ".join(f"{name} at {tokens} x {batch} by {more:.2f} ms" for (name, tokens, batch), more in slower.items())
    return f"{said}{': ' if named else ''}{named}."
