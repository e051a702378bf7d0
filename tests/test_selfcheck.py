"""The self-check passes where reduced models are right, and names what is wrong where they are not."""

from pathlib import Path

import pytest
import torch

import vtr.versions
from vtr.engine import tokens as sequence
from vtr.engine.llm import hooks as llm
from vtr.engine.llm.positions import Positions
from vtr.selfcheck import TOLERANCE, self_check
from vtr.selfcheck.cases import apart

KINDS = ("boundary method, LLaVA", "LLM method, LLaVA", "merging method, LLaVA", "freezing method, LLaVA", "tower method, LLaVA")
PARTS = ("removed = masked", "cached = recomputed", "batch = single")


def test_everything_passes_here():
    checks = self_check()
    assert not [check for check in checks if not check.passed]
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) and {f"{kind}: {part}" for kind in KINDS for part in PARTS} <= set(names)
    assert {f"{kind} method, AnyRes: {part}" for kind in ("boundary", "LLM") for part in PARTS} <= set(names)
    assert "ViT of timm: a cluster per token = full" in names
    assert max(check.difference for check in checks) < TOLERANCE / 20 and min(check.seconds for check in checks) > 0


def test_the_callers_settings_neither_matter_nor_change():
    """Nor is it needed that gradients are off, or that the default dtype is float32."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            state = torch.random.get_rng_state()
            checks = self_check(quick=True)
            assert torch.get_default_dtype() == torch.float64 and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
            assert torch.equal(torch.random.get_rng_state(), state)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [check.passed for check in checks] == [True] * 4 and max(check.difference for check in checks) < TOLERANCE / 20


def failed(**only: bool) -> set[str]:
    return {check.name for check in self_check(**only) if not check.passed}


def test_a_mask_that_hides_nothing_is_found(monkeypatch):
    monkeypatch.setattr(llm, "mask", lambda *_: None)
    found = failed()
    assert {
        "LLM method, LLaVA: removed = masked",
        "LLM method, LLaVA: cached = recomputed",
        "LLM method, AnyRes: removed = masked",
    } <= found
    assert not [name for name in found if name.startswith(("ViT", "freezing"))]


def test_tokens_at_the_wrong_place_are_found(monkeypatch):
    real = sequence.compaction

    def off_by_one(keep, width=None):
        index, valid = real(keep, width)
        return index.roll(1, 1), valid

    monkeypatch.setattr(sequence, "compaction", off_by_one)
    assert {f"{kind}: removed = masked" for kind in KINDS if not kind.startswith("freezing")} <= failed()


@pytest.mark.slow
def test_values_that_were_not_averaged_are_found(monkeypatch):
    import vtr.methods.pool

    real = vtr.methods.pool.pool

    def unmerged(tokens, *rest):
        keep, _, assign = real(tokens, *rest)
        return keep, tokens, assign

    monkeypatch.setattr(vtr.methods.pool, "pool", unmerged)
    assert failed() == {"merging method, LLaVA: removed = masked", "merging method, LLaVA: cached = recomputed"}


@pytest.mark.slow
def test_layers_that_do_not_freeze_are_found(monkeypatch):
    monkeypatch.setattr(llm.LlmHooks, "_layer_hook", lambda self, i: lambda module, args, kwargs: None)
    assert {"freezing method, LLaVA: removed = masked", "freezing method, LLaVA: cached = recomputed"} <= failed()


def test_an_error_is_a_finding(monkeypatch):
    def broken(*_args, **_kwargs):
        raise AttributeError("renamed in the release after this one")

    monkeypatch.setattr(Positions, "rope_for", broken)
    checks = self_check(quick=True)
    assert {check.error for check in checks if not check.passed} == {"AttributeError: renamed in the release after this one"}
    assert all(check.difference == float("inf") for check in checks if not check.passed) and any(not check.passed for check in checks)


def test_nan_is_infinitely_far():
    assert apart(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan])) == float("inf")
    assert apart(torch.zeros(2), torch.zeros(3)) == float("inf")
    assert apart(torch.zeros(2), torch.ones(2)) == 1


@pytest.mark.parametrize(
    ("release", "other", "wanted"),
    [("5.24.0", "5.24.0", 0), ("2.14.1+cu130", "2.14.1", 0), ("5.9.1", "5.24.0", -1), ("5.25.0.dev0", "5.24.0", 1), ("5.25", "5.24.0", 1)],
)
def test_releases_are_compared_as_numbers(release, other, wanted):
    assert vtr.versions.compared(release, other) == wanted


def test_tested_releases_are_read_from_the_checkout_or_the_wheel(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(vtr.versions, "__file__", str(tmp_path / "vtr" / "versions.py"))
    (tmp_path / "vtr").mkdir()
    assert vtr.versions.tested() == {} and vtr.versions.newer_than_tested() is None
    monkeypatch.setattr(vtr.versions, "installed", lambda name: {"transformers": "5.25.1", "torch": "2.11.0+cpu"}.get(name))
    for folder in ("vtr/_data/constraints", "constraints"):  # the second wins
        file = tmp_path / folder / "tested.txt"
        file.parent.mkdir(parents=True)
        file.write_text(
            "# written by make lock\ntransformers==5.24.0  # newest\nopen-clip-torch == 3.3.0\ntorch==2.14.1 ; sys_platform == 'linux'\n"
        )
        assert vtr.versions.tested_release("open_clip_torch") == "3.3.0" and vtr.versions.tested_release("torch") == "2.14.1"
        assert vtr.versions.newer_than_tested() == "transformers 5.25.1 is newer than 5.24.0, the newest that vtr was tested with"
        assert vtr.versions.newer_than_tested("torch") is None and vtr.versions.newer_than_tested("timm") is None
        file.write_text("transformers==5.25.1\n")
        assert vtr.versions.newer_than_tested() is None
