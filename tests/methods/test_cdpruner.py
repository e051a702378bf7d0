import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.methods.handmade import IMAGES, LLAVA, NEXT, chosen, make_view, select_without_sync
from vtr.methods.cdpruner import CDPruner, balanced, cdpruner
from vtr.ops.relevance import clip_relevance
from vtr.ops.topk import quota


def pruned(view, method):
    (step,) = method.steps(NEXT)
    return step.select(view).keep


def slow(view, g, method):
    """One image in float64 and Python lists: a process per view, relevance over the whole image."""
    real = view.real[g]
    tokens, cells = view.tokens[g, real].double(), view.cells[g, real, 0]
    question = view.text.tokens[g, view.text.instruction[g]].double().mean(0)
    relevance = (method.sign or 1) * F.cosine_similarity(tokens, question[None])
    r = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    r = r if method.theta is None else (method.theta / 2 / (1 - method.theta) * r).exp()
    views = int(cells.max()) + 1
    size = torch.bincount(cells, minlength=views)
    shares = quota(torch.ones(1, views), size[None], view.keep[g : g + 1])[0].tolist()
    kept = []
    for v, share in enumerate(shares):
        own = (cells == v).nonzero()[:, 0]
        unit = F.normalize(tokens[own], dim=-1)
        kernel = r[own, None] * (unit @ unit.T) * r[own]
        residual, rows, picks = kernel.diag().clone(), [], []
        for _ in range(share):
            j = int(residual.argmax())
            row = (kernel[j] - sum(c[j] * c for c in rows)) / residual[j].sqrt()
            rows.append(row)
            picks.append(j)
            residual = residual - row * row
            residual[picks] = -torch.inf
        kept += own[picks].tolist()
    return sorted(kept)


@pytest.mark.parametrize("method", [CDPruner(), CDPruner(sign=-1), CDPruner(theta=0.5)], ids=["default", "sign", "theta"])
@pytest.mark.parametrize("keep", [1, 9, [50, 16, 21, 2]])
def test_every_view_of_every_image_has_its_own_process(keep, method):
    view = make_view(IMAGES, keep, filler=3)  # at most 16 per view: the rank
    kept = chosen(view, pruned(view, method))
    assert [k.tolist() for k in kept] == [slow(view, g, method) for g in range(4)]


@pytest.mark.parametrize("keep", [36, [170, 35, 99, 70]])
def test_beyond_the_rank_the_budget_is_still_exact(keep):
    view = make_view(IMAGES, keep, filler=2)
    assert pruned(view, CDPruner()).sum(1).tolist() == view.keep.tolist()


def test_batch_and_padding_change_nothing():
    together = make_view(IMAGES, 12)
    kept = chosen(together, pruned(together, CDPruner()))
    for image, expected in zip(IMAGES, kept, strict=True):
        alone = make_view([image], 12, filler=5)
        assert torch.equal(chosen(alone, pruned(alone, CDPruner()))[0], expected)


def test_without_text_it_is_a_plain_process():
    view = make_view(IMAGES, 9)
    view.text.instruction[:] = False
    unit = torch.ones_like(view.real, dtype=torch.float32)
    plain = cdpruner(view.tokens[1:2], unit[1:2], view.real[1:2], view.keep[1:2], 9)
    assert torch.equal(pruned(view, CDPruner())[1:2], plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_tokens_are_computed_in_float32(dtype):
    random = torch.Generator().manual_seed(0)
    tokens, quality = torch.randn(1, 40, 12, generator=random).to(dtype), torch.rand(1, 40, generator=random) + 0.1
    real, keep = torch.ones(1, 40, dtype=torch.bool), torch.tensor([12])
    assert torch.equal(cdpruner(tokens, quality, real, keep, 12), cdpruner(tokens.float(), quality, real, keep, 12))


def test_selections_never_wait_for_the_device():
    (step,) = CDPruner().steps(LLAVA)
    select_without_sync(step, make_view(IMAGES, 9))


def test_formulas():
    image, text = torch.randn(2, 5, 4), torch.randn(3, 4)
    expected = -torch.stack([F.cosine_similarity(image, t[None, None], dim=-1) for t in text]).mean(0)
    torch.testing.assert_close(clip_relevance(image, text), expected)
    quality = torch.tensor([0.0, 1.0])
    assert torch.equal(balanced(quality, None), quality) and torch.equal(balanced(quality, 0.0), torch.ones(2))
    torch.testing.assert_close(balanced(quality, 0.5), (0.5 * quality).exp())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="relevance must be 'similarity' or 'clip', got 'bert'"):
        CDPruner(relevance="bert")
    with pytest.raises(ValueError, match="sign must be 1 or -1, got 0"):
        CDPruner(sign=0)
    with pytest.raises(ValueError, match=r"theta must be in \[0, 1\), got 1"):
        CDPruner(theta=1)
    with pytest.raises(ValueError, match="compat must be None or 'authors'"):
        CDPruner(compat="paper")
    with pytest.raises(vtr.VtrError, match="compat='authors' is for the replay of vectors"):
        CDPruner(compat="authors").steps(LLAVA)
