"""Answers with a compiled decode step: one graph a row, on a cache of the row's length, and a reason where there is none."""

import time

import pytest
import torch

import vtr
from scripts.pages import speed as page
from vtr.bench import compiled, measure, tables
from vtr.bench.record import environment, make_record
from vtr.bench.shapes import build, find_shape, prompts
from vtr.cost import TransformerShape, kv_bytes
from vtr.markdown import markdown_table


@pytest.fixture(scope="module")
def ran():
    """Model, prompts and the rows of a cell."""
    shape = find_shape("llava-tiny")
    model, pool = build(shape, torch.float32), prompts(shape, torch.float32, "cpu", 2, 3)
    methods = [vtr.create_method("fastv", keep=9), vtr.create_method("shortv", layers=(1, 3))]
    return model, pool, measure.run_cell(model, pool, methods, 9, (1, 4), repeats=1)


def on_a_page(rows):
    """The page of a cell, and the cell."""
    cell = {"keep": 9, "batch": 2, "prompt": 48, "rows": [row.to_dict() for row in rows]}
    model = {"name": "tiny", "tokens": 36, "parameters": 1, "weight_bytes": 4, "dtype": "float32", "attention": "sdpa", "random": True}
    facts = environment(torch.device("cpu"))
    return page.page([("cpu", make_record("model", facts, model=model, counts=None, refused={}, cells=[cell]))]), cell


@pytest.mark.slow
def test_every_row_is_one_graph_on_a_cache_of_its_length(ran):
    model, pool, rows = ran
    done = []
    before, _ = on_a_page(rows)
    compiled.run_compiled(model, rows, pool, (1, 4), 2, after=lambda rows: done.append(len(rows)), backend="eager")
    llm = TransformerShape.from_config(model.config.text_config)
    for row in rows:
        found = row.compiled
        assert (found["graphs"], len(found["runs"]), found["length"]) == (1, 2, max(row.schedule.llm) + 4)
        run = found["runs"][0]
        assert run["kv_bytes"] == 2 * kv_bytes(llm, [found["length"]] * 4, 4)
        assert 0 < run["tower_ms"] < run["prefill_ms"] == run["total_ms"]["1"] < run["total_ms"]["4"]
        assert (run["choosing_ms"] > 0) == (row.name == "fastv")
    assert done == [len(rows)] * len(rows) and not model._forward_pre_hooks and not model.model._forward_pre_hooks
    text, cell = on_a_page(rows)
    assert "compiled on a static cache, 2 round(s)" in text and "compiled on a static cache, " not in before  # records without it read
    own = tables.compiled_cell(cell)
    assert markdown_table(tables.heads(own), tables.lines(own)).splitlines()[2] in text and "peak MiB" not in tables.heads(own)


@pytest.mark.slow
def test_a_row_that_does_not_compile_says_why(ran):
    """The rows after it run, too; three rows show it, as each costs seconds of tracing."""
    model, pool, rows = ran[0], ran[1], ran[2][:3]

    def backend(module, _examples):
        if len(calls) == 1:
            raise RuntimeError("no compiler for this")
        calls.append(module)
        return module

    calls = []
    compiled.run_compiled(model, rows, pool, (1, 4), 1, backend=backend)
    assert rows[0].compiled["graphs"] == 1 and all("no compiler for this" in row.compiled["not_run"] for row in rows[1:])
    text, _ = on_a_page(rows)
    assert "Not compiled:" in text and "no compiler for this" in text and not model.model._forward_pre_hooks


def test_no_row_begins_after_the_time_is_over(ran):
    model, pool, rows = ran
    compiled.run_compiled(model, rows, pool, (1, 4), 1, until=time.monotonic() - 1)
    assert {row.compiled["not_run"] for row in rows} == {compiled.OVER}
    assert tables.compiled_cell(on_a_page(rows)[1]) is None


def test_other_attention_is_refused(ran):
    model, pool, rows = ran
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(vtr.VtrError, match="compiled decode step is timed with --attention sdpa only"):
            compiled.run_compiled(model, rows, pool, (1, 4), 1)
    finally:
        model.set_attn_implementation("sdpa")
