"""A selection never waits for the device, and a removal at most once."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import vtr
from tests.probes import ByAttention, EveryNth, MergePairs, TowerTop
from tests.test_contract import NAMES, home, method_of
from tests.tiny_models import batch_of, build, model_of

PACKAGE = Path(vtr.__file__).parent
WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__len__", "numpy", "cpu", "nonzero", "unique", "masked_select"}


class Waits(TorchFunctionMode):
    """Notes the lines of methods and ops that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        masks = [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
        repeats = name == "repeat_interleave" and len(args) > 1 and isinstance(args[1], torch.Tensor) and "output_size" not in kwargs
        if (name in WAITS and name != "__len__") or (masks and name == "__getitem__") or repeats:
            frame = sys._getframe(1)
            while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                frame = frame.f_back
            if frame is not None and Path(frame.f_code.co_filename).parent.name in ("methods", "ops"):
                self.lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {name}")
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_selection_does_not_wait_for_the_device(name):
    kind = home(name)
    model, batch = model_of(kind), batch_of(kind)
    with vtr.reduced(model, method_of(name, 7, kind)):
        model(**batch.inputs)  # fills caches of what is known on the host
        with Waits() as waits:
            model(**batch.inputs)
    assert not waits.lines


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
                cache.append(model(**arguments).past_key_values)
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
        assert waits(**step, past_key_values=cache[-1]) <= 1
