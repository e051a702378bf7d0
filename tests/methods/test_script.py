import pytest
import torch

import vtr
from scripts.replay.script import chosen_segments, released_order, released_relevance
from tests.methods.handmade import IMAGES, LLAVA, NEXT, chosen, make_view, select_without_sync
from vtr.methods.script import Script, script
from vtr.ops.dpp import greedy_dpp
from vtr.ops.redundancy import graph_redundancy


def random_row(n=40, width=24, seed=0):
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, n, width, generator=random) + torch.randn(1, 1, width, generator=random)
    return tokens, torch.rand(1, n, generator=random) + 0.1, torch.ones(1, n, dtype=torch.bool)


@pytest.mark.parametrize("keep", [1, 9, 20, 39, 40])
@pytest.mark.parametrize("redundant", [0.0, 0.5, 1.0])
def test_the_graph_takes_its_share_and_the_process_picks_among_the_rest(keep, redundant):
    tokens, quality, real = random_row()
    kept = script(tokens, quality, real, torch.tensor([keep]), keep, redundant)[0]
    score, _ = graph_redundancy(tokens, real)
    gone = int((40 - keep) * redundant)
    left = score[0].argsort(stable=True)[: 40 - gone].sort().values
    picks = greedy_dpp(tokens[:, left], quality[:, left], real[:, left], keep)[0]
    assert kept.nonzero()[:, 0].tolist() == sorted(left[picks].tolist()) and int(kept.sum()) == keep


def test_released_penalty_in_plain_python():
    tokens, quality, real = random_row(20, 8, 3)
    quality[0, 4] = 0
    unit = torch.nn.functional.normalize(tokens[0].double(), dim=-1)
    kernel = quality[0].double()[:, None] * (unit @ unit.T) * quality[0].double()
    d, picks = kernel.diag().clone(), []
    for _ in range(20):
        j = max((i for i in range(20) if i not in picks), key=lambda i: float(d[i]))
        picks.append(j)
        if d[j] > 0:
            d -= (kernel[:, j] / (d[j].sqrt() + 1e-6)).square()
    assert released_order(tokens, quality, real, 20)[0].tolist() == picks


def test_released_relevance_spans_zero_to_nearly_one():
    image, text = torch.randn(2, 6, 4), torch.randn(5, 4)
    chosen_ = chosen_segments(image, text)
    assert chosen_.sum(1).tolist() == [2, 2]
    relevance = released_relevance(image, text, chosen_)
    assert not relevance.amin(1).any() and (relevance.amax(1) < 1).all()
    for b in range(2):
        fit = (image[b] @ text.T).mean(0)
        assert chosen_[b].nonzero()[:, 0].tolist() == sorted(fit.topk(2).indices.tolist())
        raw = -(image[b] @ text[chosen_[b]].T).mean(1)
        torch.testing.assert_close(relevance[b], (raw - raw.min()) / (raw.max() - raw.min() + 1e-6))


def pruned(view, method):
    (step,) = method.steps(NEXT)
    return step.select(view).keep


@pytest.mark.parametrize("keep", [1, 12, [170, 35, 99, 70]])
def test_budgets_are_exact_for_every_image_of_a_ragged_batch(keep):
    view = make_view(IMAGES, keep, filler=3)
    kept = pruned(view, Script())
    assert kept.sum(1).tolist() == view.keep.tolist() and not (kept & ~view.real).any()


def test_batch_and_padding_change_nothing():
    together = make_view(IMAGES, 12)
    kept = chosen(together, pruned(together, Script()))
    for image, expected in zip(IMAGES, kept, strict=True):
        alone = make_view([image], 12, filler=5)
        assert torch.equal(chosen(alone, pruned(alone, Script()))[0], expected)


def test_selections_never_wait_for_the_device():
    (step,) = Script().steps(LLAVA)
    select_without_sync(step, make_view(IMAGES, 9))


def test_it_is_labelled_as_ours():
    assert Script.card.ours and "ours" in Script.card.title


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"redundant must be in \[0, 1\], got 2"):
        Script(redundant=2)
    with pytest.raises(ValueError, match="tau must be a cosine"):
        Script(tau=3)
    with pytest.raises(ValueError, match="compat must be None or 'authors'"):
        Script(compat="paper")
    with pytest.raises(vtr.VtrError, match="compat='authors' is for the replay of vectors"):
        Script(compat="authors").steps(LLAVA)
