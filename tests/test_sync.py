"""A selection never waits for the device, and a removal at most once."""

import ast
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import vtr
from scripts.replay.visionzip import authors_order
from tests.caches import held, output_cache
from tests.marks import slow
from tests.probes import ByAttention, EveryNth, MergePairs, TowerTop
from tests.test_contract import NAMES, REPRESENTATIVES, home, method_of
from tests.tiny_models import batch_of, build, model_of
from vtr.ops.blocks import all_at_once
from vtr.registry import method_class
from vtr.testing import given

TORCH = Path(torch.__file__).parent
PACKAGE = Path(vtr.__file__).parent
WAITS = {
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__len__",
    "numpy",
    "cpu",
    "nonzero",
    "unique",
    "masked_select",
    "equal",
}


HOST_TABLES = {
    "hosts/_layout.py: Layout.tokens",
    "hosts/_layout.py: Layout.view_tokens",
    "hosts/_layout.py: Layout.cells",
    "hosts/_layout.py: by_patch",
    "engine/llm/prompt.py: Prompt._place.<locals>.<genexpr>",  # lines of cached layouts
    "engine/views.py: quotas",  # a quota of host integers
    "engine/resize.py: plan_resize",
    "engine/resize.py: plan_resize.<locals>.<listcomp>",
    "engine/selections.py: check_selection",  # looks at an index on the CPU only
}
"""Functions of the host layer that read tensors which never leave the host, by file."""


def functions_of(path: Path) -> set[str]:
    """Qualified names of the functions of a file, those inside functions excluded."""

    def inside(node: ast.AST, outer: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield outer + child.name
            elif isinstance(child, ast.ClassDef):
                yield from inside(child, f"{outer}{child.name}.")

    return set(inside(ast.parse(path.read_text()), ""))


@pytest.mark.parametrize("entry", sorted(HOST_TABLES))
def test_host_tables_name_functions_that_exist(entry):
    """Otherwise a function that is renamed would no longer be allowed, or another one of its name would be."""
    path, _, function = entry.partition(": ")
    assert function.partition(".<locals>")[0] in functions_of(PACKAGE / path)


class Waits(TorchFunctionMode):
    """Notes the functions in some parts of vtr, or of another folder, that would wait for a GPU, and where."""

    def __init__(self, *parts: str, root: Path = PACKAGE) -> None:
        super().__init__()
        self.parts = parts
        self.root = root
        self.functions: list[str] = []
        self.lines: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        masks = [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
        repeats = name == "repeat_interleave" and len(args) > 1 and isinstance(args[1], torch.Tensor) and "output_size" not in kwargs
        if (name in WAITS and name != "__len__") or (masks and name == "__getitem__") or repeats:
            frame = sys._getframe(1)
            while frame is not None and Path(frame.f_code.co_filename).is_relative_to(TORCH):
                frame = frame.f_back
            path = Path(frame.f_code.co_filename) if frame is not None else TORCH
            if path.is_relative_to(self.root) and path.relative_to(self.root).parts[0] in self.parts:
                self.functions.append(f"{path.relative_to(self.root).as_posix()}: {frame.f_code.co_qualname}")
                self.lines.append(f"{path.name}:{frame.f_lineno} {name}")
        return function(*args, **kwargs)


CASES = [
    (name, stage)
    for name in NAMES
    for stage in (method_class(name).stages if "stage" in {f.name for f in fields(method_class(name))} else method_class(name).stages[:1])
]
"""Every method at every stage that it can be told to work at."""


def reduced(name, stage):
    """Model, batch, and the method at that stage."""
    kind = home(name)
    method = method_of(name, 7, kind)
    at = {"stage": stage} if hasattr(method, "stage") else {}
    return model_of(kind), batch_of(kind), replace(method, **at)


def test_the_trap_sees_what_waits():
    with Waits("replay", root=PACKAGE.parent / "scripts") as waits:
        released_authors = authors_order(torch.tensor([True, False, True]), torch.tensor([False, False, True]))
    assert released_authors.tolist() == [0, 2]
    assert waits.functions == ["replay/visionzip.py: authors_order"] * 2, "nonzero, twice"


@pytest.mark.parametrize(("name", "stage"), CASES)
@torch.no_grad()
def test_a_selection_does_not_wait_for_the_device(name, stage):
    model, batch, method = reduced(name, stage)
    with given.reduced(model, method):
        model(**batch.inputs)  # fills caches of what is known on the host
        with all_at_once(), Waits("methods", "ops") as waits:
            model(**batch.inputs)
    assert not waits.lines


@pytest.mark.parametrize(("name", "stage"), [case if case[0] in REPRESENTATIVES else slow(case) for case in CASES])
@torch.no_grad()
def test_the_host_layer_waits_once_per_prefill_and_once_per_removal_of_unknown_counts(name, stage):
    model, batch, method = reduced(name, stage)
    with given.reduced(model, method) as reduction:
        model(**batch.inputs)
        with Waits("engine", "hosts") as waits:
            model(**batch.inputs)
        anyres = "next" in home(name)  # which lines keep their newline token is known on the device only
        unknown = [step for step in reduction.plan.steps if step.removes and (anyres or not reduction.plan.counted(step))]
        found = Counter(function.partition(": ")[2] for function in waits.functions if function not in HOST_TABLES)
        assert found.pop("count_rows", 0) == 1
        assert found.pop("Prompt._count", 0) <= len(unknown)
        assert not found, waits.lines
        cache = output_cache(model(**batch.inputs))
        step = torch.full((2, 1), 7), batch.positions[:, -1:] + 1
        with Waits("engine", "hosts", "methods", "ops") as waits:
            model(input_ids=step[0], position_ids=step[1], **held(cache))
        assert not [f for f in waits.functions if f not in HOST_TABLES], waits.lines


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("plan", "removals"),
    [
        ([EveryNth()], 1),
        ([EveryNth(), EveryNth(stage="prefill", layer=2)], 2),
        ([TowerTop(keep=9)], 0),
        ([MergePairs(), ByAttention(keep=5)], 1),
    ],
)
@torch.no_grad()
def test_a_removal_waits_at_most_once(plan, removals):
    """One wait per prefill to learn the widths, one per removal whose counts are not known on the host, none while decoding."""
    model, batch = build("llava").to("cuda"), batch_of("llava")
    inputs = {name: value.to("cuda") for name, value in batch.inputs.items()}

    def waits(**arguments) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                cache.append(output_cache(model(**arguments)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum(Path(w.filename).is_relative_to(PACKAGE) for w in caught)

    cache: list = []
    with vtr.reduced(model, plan):
        model(**inputs)
        assert waits(**inputs) <= 1 + removals
        mask = torch.ones(2, batch.valid.shape[1] + 1, dtype=torch.long, device="cuda")
        positions = torch.full((2, 1), batch.valid.shape[1], device="cuda")
        step = {"input_ids": torch.full((2, 1), 7, device="cuda"), "attention_mask": mask, "position_ids": positions}
        assert waits(**step, **held(cache[-1])) <= 1
