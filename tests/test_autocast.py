"""Under `torch.autocast`: every method runs, budgets stay exact, and what promises float32 computes in float32."""

import sys

import pytest
import torch

import vtr
from tests import dense_models, tiny_models
from tests.test_contract import NAMES, home, method_of, retained_of
from vtr.ops.attention_rows import attention_rows
from vtr.ops.clusters import cluster, hard_labels
from vtr.ops.precision import outside_autocast
from vtr.ops.reconstruct import reconstruction
from vtr.ops.sharpness import auto_tau
from vtr.testing import given

HALF = torch.bfloat16


@pytest.fixture
def precisions(monkeypatch) -> list[bool]:
    """Whether autocast was on inside each selection."""
    seen: list[bool] = []

    def watched(select):
        def look(view):
            seen.append(torch.is_autocast_enabled("cpu"))
            return select(view)

        return outside_autocast(look)

    monkeypatch.setattr(sys.modules["vtr.planning"], "outside_autocast", watched)  # `vtr.apply` is the function
    return seen


@pytest.mark.filterwarnings("ignore:.*keep.*")
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_method_runs_on_a_llava_and_keeps_its_budget(name, precisions):
    kind = home(name)
    model, batch, method = tiny_models.model_of(kind), tiny_models.batch_of(kind), method_of(name, 7, home(name))
    with given.reduced(model, method) as reduction:
        with torch.autocast("cpu", HALF):
            logits = model(**batch.inputs).logits
        assert logits.isfinite().all()
        counts = [len(kept) for kept in retained_of(reduction.report())]
    if method.budget is not None and name != "resize":
        assert counts == [min(method.budget.resolve(n), n) for n in batch.counts()]
    assert not any(precisions)


@pytest.mark.parametrize(
    ("name", "settings"), [("expedit", dense_models.COARSE), ("tome", {"keep": 12}), ("pool", {"alpha": 2, "keep": 16})]
)
@pytest.mark.parametrize("kind", ["timm", "ViT"])
@torch.no_grad()
def test_every_dense_method_runs_on_a_vit(kind, name, settings, precisions):
    model, pixels = dense_models.model_of(kind), dense_models.images()
    with vtr.reduced(model, name, **settings) as reduction, torch.autocast("cpu", HALF):
        made = dense_models.outputs(model, pixels)
        report = reduction.report()
    assert all(value.isfinite().all() for value in made)
    assert report.small_grid == ((4, 4) if name != "tome" else None) and precisions and not any(precisions)


def test_distances_weights_and_attention_rows_are_those_of_float32():
    tokens, centres = torch.randn(2, 36, 16), torch.randn(2, 9, 16)
    cases = {
        "cluster": lambda: cluster(tokens, (6, 6), (3, 3), tau=0.1),
        "cluster, bfloat16": lambda: cluster(tokens.to(HALF), (6, 6), (3, 3), tau=torch.tensor([0.1, 0.3])),
        "tau": lambda: auto_tau(tokens, (6, 6), (3, 3), 5, torch.arange(2)),
        "labels": lambda: hard_labels(tokens, centres),
        "weights": lambda: reconstruction(tokens, centres, tau=0.1, neighbours=4),
        "rows": lambda: attention_rows(tokens[:, None, :1], tokens[:, None], 0.25),
    }
    for name, case in cases.items():
        wanted = case()
        with torch.autocast("cpu", HALF):
            assert torch.equal(case(), wanted), name
