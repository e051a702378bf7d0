from dataclasses import replace

import pytest
import torch

import vtr
from tests.methods.handmade import IMAGES, LLAVA, make_view, select_without_sync
from tests.test_contract import retained_of
from tests.tiny_models import batch_of, model_of
from vtr.methods.sparsevlm import TABLES, SparseVLM, kept_count, recycled_counts
from vtr.ops.gather import take
from vtr.types import Budget

DEEP = replace(LLAVA, llm_layers=32, most_tokens=576)
PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""The authors' tables of kept tokens, without clusters."""


@pytest.mark.parametrize("table", TABLES)
def test_kept_and_clusters_are_the_published_ones(table):
    n = 576
    for total, kept in zip(TABLES[table], PUBLISHED[table], strict=True):
        pruned = n - kept
        recycled = int(0.3 * pruned) + 1
        assert total == kept + int(recycled / 10) + 1
        assert int(kept_count(torch.tensor([n]), torch.tensor([total]), total)) == kept
        n = total


def test_every_budget_is_met_with_at_most_half_of_it_clusters():
    for n in (1, 2, 7, 36, 97, 300):
        keep = torch.arange(1, n + 1)
        kept = kept_count(torch.full_like(keep, n), keep, n)
        clusters = recycled_counts(n - kept)[1]
        assert (kept <= keep).all() and (keep - kept <= clusters).all() and (keep - kept <= keep // 2).all()
        assert int(kept[-1]) == n and int(kept[0]) == 1
        enough = kept > keep - keep // 2
        assert torch.equal((kept + clusters)[enough], keep[enough])


def staged(view, method, stage=1):
    """The answer of one stage; attention rows depend on the patch and the text token only."""
    first, *stages = method.steps(LLAVA)
    first.select(view)
    step = stages[stage]
    rows = torch.rand(view.text.real.shape[1], 3000, generator=torch.Generator().manual_seed(2))[:, view.patch]
    view.signals = {step.needs[0]: rows.transpose(0, 1)}
    return step, step.select(view)


@pytest.mark.parametrize("keep", [1, 2, 9, [35, 36, 60, 2]])
def test_budgets_are_exact_and_merged_tokens_are_means_of_what_they_absorbed(keep):
    view = make_view(IMAGES, keep, filler=3)
    _, answer = staged(view, SparseVLM())
    assert answer.keep.sum(1).tolist() == view.keep.tolist() and not (answer.keep & ~view.real).any()
    assert (answer.assign[~view.real] == -1).all()
    for g in range(4):
        for pivot in answer.keep[g].nonzero()[:, 0].tolist():
            members = (answer.assign[g] == pivot).nonzero()[:, 0]
            assert pivot in members.tolist()
            torch.testing.assert_close(answer.tokens[g, pivot], view.tokens[g, members].mean(0), atol=1e-4, rtol=1e-4)
        pruned = int((view.real[g] & (answer.assign[g] < 0)).sum())
        assert pruned <= view.counts[g] - int(view.keep[g])


def test_batch_and_padding_change_nothing():
    together = make_view(IMAGES, 12)
    _, answer = staged(together, SparseVLM())
    for g, image in enumerate(IMAGES):
        alone = make_view([image], 12, filler=5)
        _, single = staged(alone, SparseVLM())
        assert torch.equal(answer.keep[g, together.real[g]], single.keep[0, alone.real[0]])
        torch.testing.assert_close(answer.tokens[g, answer.keep[g]], single.tokens[0, single.keep[0]])


def test_authors_order_has_the_same_tokens_behind_each_other():
    view = make_view(IMAGES, [14, 9, 30, 2], filler=2)
    _, ours = staged(view, SparseVLM())
    _, theirs = staged(view, SparseVLM(compat="authors"))
    assert theirs.order == "given" and theirs.real.sum(1).tolist() == view.keep.tolist()
    for g in range(4):
        index, tokens = theirs.index[g, theirs.real[g]], theirs.tokens[g, theirs.real[g]]
        assert theirs.real[g].tolist() == sorted(theirs.real[g].tolist(), reverse=True)
        assert sorted(index.tolist()) == ours.keep[g].nonzero()[:, 0].tolist()
        torch.testing.assert_close(tokens, take(ours.tokens[g : g + 1], index[None])[0])
        merged = (tokens != view.tokens[g, index]).any(1)
        kept = int(kept_count(torch.tensor([view.counts[g]]), view.keep[g : g + 1], 30))
        assert not merged[:kept].any() and index[:kept].tolist() == sorted(index[:kept].tolist())


def test_selections_never_wait_for_the_device():
    for method in (SparseVLM(), SparseVLM(compat="authors")):
        view = make_view(IMAGES, 9)
        step, _ = staged(view, method)
        select_without_sync(method.steps(LLAVA)[0], view)
        if method.compat is None:
            select_without_sync(step, view)


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_schedules_and_budgets(table):
    method = SparseVLM(table=table)
    assert method.budget == Budget(keep_ratio=TABLES[table][-1] / 576)
    last = method.budget.resolve(576)
    observe, *stages = method.steps(DEEP)
    assert observe.action == "observe" and [s.layer for s in stages] == [3, 7, 16]
    assert tuple(last + round(s.share * (576 - last)) for s in stages) == TABLES[table]
    assert SparseVLM(keep=last).schedule(DEEP) == method.schedule(DEEP), "the nearest table"
    assert SparseVLM(counts=TABLES[table]).schedule(DEEP) == method.schedule(DEEP)


def test_averages_take_a_table_within_reach():
    assert SparseVLM(average_keep=206).schedule(DEEP)[1] == SparseVLM(table=192).schedule(DEEP)[1]
    assert SparseVLM(average_keep=83).schedule(DEEP)[1] == SparseVLM(table=64).schedule(DEEP)[1]
    assert SparseVLM(average_keep=5).schedule(DEEP)[1] == SparseVLM(table=64).schedule(DEEP)[1]


def test_settings_are_checked():
    with pytest.raises(ValueError, match="table must be one of 192, 128, 96, 64, got 100"):
        SparseVLM(table=100)
    with pytest.raises(ValueError, match="compat must be None or 'authors'"):
        SparseVLM(compat="paper")
    with pytest.raises(ValueError, match="is a budget already"):
        SparseVLM(counts=(3, 2, 1), keep_ratio=0.5)
    with pytest.raises(ValueError, match="sparsevlm: a schedule of 3 removals needs an LLM of at least 4 layers"):
        SparseVLM().steps(replace(LLAVA, llm_layers=3))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_the_authors_order_runs_in_a_model(kind):
    model, batch = model_of(kind), batch_of(kind)
    with vtr.reduced(model, SparseVLM(keep=12, compat="authors")) as reduction:
        logits = model(**batch.inputs).logits
    assert [len(ids) for ids in retained_of(reduction.report())] == [12] * 3 and logits[:, -1].isfinite().all()
