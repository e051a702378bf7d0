"""The examples of CONTRIBUTING.md work as they are printed there."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vtr
from tests.tiny_models import batch_of, model_of
from vtr import registry
from vtr.testing import check_method

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(params=["loudest", "attended"])
def example(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Name and code block, imported as a third party's module; forgotten afterwards."""
    name = request.param
    blocks = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if f'register_method("{name}")' in block)
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(name)
    yield name, code
    registry._METHODS.pop(name, None)
    sys.modules.pop(name, None)


def test_the_example_is_short_and_registers_its_method(example: tuple[str, str]) -> None:
    name, code = example
    assert code.count("\n") < 45
    assert name in vtr.list_methods()
    assert vtr.create_method(name, keep=64).keep == 64


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_the_example_reduces_a_model(example: tuple[str, str], kind: str) -> None:
    model, batch = model_of(kind), batch_of(kind)
    with vtr.reduced(model, example[0], keep=5) as reduction:
        model(**batch.inputs)
    assert [len(image.retained) for image in reduction.report().images] == [5] * len(batch.counts())


def test_the_example_keeps_what_vtr_promises_of_a_method(example: tuple[str, str]) -> None:
    check_method(example[0], ["llava"], raises=True)
