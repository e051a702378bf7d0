"""Which sources a result depends on."""

import pytest

from vtr.eval import provenance
from vtr.eval.provenance import code_hash, git_state, versions
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
    for name in ("vtr.apply.plan", "vtr.ops.topk", "vtr.eval.runner", "vtr.data.scenes", "vtr.hosts.hf_llava", "vtr.types.contract"):
        edited(name)
        assert code_hash([FASTV], "llava") != before["fastv"], name
    for name in ("vtr.cli.eval", "vtr.methods.tome", "vtr.eval.summary", "vtr.viz.patches", "vtr.bench.shapes"):
        edited(name)
        assert code_hash([FASTV], "llava") == before["fastv"], name


def test_a_method_of_somebody_else_counts_by_its_own_source(edited):
    class Mine(type(FASTV)):
        pass

    assert code_hash([Mine(keep=64)], "llava") != code_hash([FASTV], "llava")


def test_git_and_versions():
    state = git_state()
    assert state is None or (len(state["commit"]) == 40 and isinstance(state["dirty"], bool))
    assert versions()["torch"] and versions()["vtr"]
