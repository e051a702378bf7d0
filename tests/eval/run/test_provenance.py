"""Which sources a result depends on."""

import importlib
import sys

import pytest

from vtr.eval.run import provenance
from vtr.eval.run.provenance import code_hash, git_state, versions
from vtr.registry import create_method

FASTV, DART = create_method("fastv", keep=64), create_method("dart", keep=64)


@pytest.fixture
def edited(monkeypatch):
    """Pretends that a source was edited: `edited("vtr.methods.fastv")`."""
    source = provenance._source

    def edit(*names):
        provenance._hash_of.cache_clear()
        monkeypatch.setattr(provenance, "_source", lambda name: source(name) + "\n# edited" * (name in names))

    yield edit
    monkeypatch.undo()
    provenance._hash_of.cache_clear()


def test_only_what_can_change_an_answer_counts(edited):
    before = {method.name: code_hash([method], "llava") for method in (FASTV, DART)}
    assert before["fastv"] != before["dart"] != code_hash([FASTV, DART], "llava") != code_hash([], "llava")
    edited("vtr.methods.fastv")
    assert code_hash([FASTV], "llava") != before["fastv"] and code_hash([DART], "llava") == before["dart"]
    for name in ("vtr.plans", "vtr.ops.topk", "vtr.eval.run.runner", "vtr.data.scenes", "vtr.hosts.hf_llava", "vtr.types.step"):
        edited(name)
        assert code_hash([FASTV], "llava") != before["fastv"], name
    for name in ("vtr.cli.eval", "vtr.methods.tome", "vtr.eval.summary", "vtr.viz.patches", "vtr.bench.shapes"):
        edited(name)
        assert code_hash([FASTV], "llava") == before["fastv"], name


THEIRS = """
from dataclasses import dataclass
import vtr
{imports}

@dataclass(frozen=True, kw_only=True)
class Theirs({base}):
    default_budget = vtr.Budget(keep=4)
"""


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """A third party's package, imported: a method, a helper that it imports, one that it imports later, and what cannot be parsed."""
    name = f"theirs_{request.node.name.replace('[', '_').strip(']')}"
    folder = tmp_path / name
    (folder / "deep" / ".cache").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "helper.py").write_text("SCALE = 1\n")
    (folder / "deep" / "later.py").write_text("from vtr.ops import kmedoids\nSCALE = 1\n")
    (folder / "deep" / ".cache" / "old.py").write_text("SCALE = 1\n")
    (folder / "template.py").write_text("{{ not Python }}\n")
    (folder / "method.py").write_text(THEIRS.format(imports="from . import helper", base="vtr.Method"))
    (tmp_path / f"{name}_child.py").write_text(THEIRS.format(imports=f"import {name}.method", base=f"{name}.method.Theirs"))
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]
    provenance._hash_of.cache_clear()


def hash_now(module):
    provenance._hash_of.cache_clear()
    return code_hash([importlib.import_module(module).Theirs(keep=4)], "llava")


@pytest.mark.parametrize("init", [pytest.param(True, id="package", marks=pytest.mark.slow), pytest.param(False, id="folder")])
def test_every_module_of_a_third_partys_package_counts(package, init):
    if not init:
        (package / "__init__.py").unlink()
    module = f"{package.name}.method"
    seen = [hash_now(module)]
    for file in ("helper.py", "deep/later.py", "template.py", "method.py", "new.py"):
        with (package / file).open("a") as opened:
            opened.write("# edited\n")
        seen.append(hash_now(module))
    assert len(set(seen)) == len(seen), "an edit was not seen"
    (package / "deep" / ".cache" / "old.py").write_text("# edited")
    (package / "notes.txt").write_text("no source")
    assert hash_now(module) == seen[-1]


def test_the_packages_of_base_classes_and_what_helpers_import_of_ours_count(package, edited):
    child = f"{package.name}_child"  # a single file
    before = hash_now(child)
    (package / "helper.py").write_text("SCALE = 2\n")
    after = hash_now(child)
    assert after != before
    edited("vtr.ops.kmedoids")
    assert hash_now(child) != after
    with (package.parent / f"{child}.py").open("a") as opened:
        opened.write("# edited\n")
    edited()
    assert hash_now(child) not in (before, after)


def test_git_and_versions():
    state = git_state()
    assert state is None or (len(state["commit"]) == 40 and isinstance(state["dirty"], bool))
    assert versions()["torch"] and versions()["vtr"]
