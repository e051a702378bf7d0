"""The example of CONTRIBUTING.md works as it is printed there."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vtr
from tests.tiny_models import batch_of, model_of
from vtr import registry

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The code block, imported as a third party's module; forgotten afterwards."""
    code = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL)[0]
    (tmp_path / "loudest.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("loudest")
    yield code
    registry._METHODS.pop("loudest", None)
    sys.modules.pop("loudest", None)


def test_the_example_is_short_and_registers_its_method(example: str) -> None:
    assert example.count("\n") < 40
    assert "loudest" in vtr.list_methods()
    assert vtr.create_method("loudest", keep=64).keep == 64


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_the_example_reduces_a_model(example: str, kind: str) -> None:
    model, batch = model_of(kind), batch_of(kind)
    with vtr.reduced(model, "loudest", keep=5) as reduction:
        model(**batch.inputs)
    assert [len(image.retained) for image in reduction.report().images] == [5] * len(batch.counts())
