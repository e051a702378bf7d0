from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.methods.handmade import (
    IMAGES,
    LLAVA,
    NEXT,
    ONE,
    SIGLIP,
    chosen,
    embeddings,
    images_of,
    last_cls_logits,
    make_view,
    retained,
    select_without_sync,
    shortened,
)
from tests.tiny_models import batch_of
from vtr.methods.todre import PIVOTS, ToDRE, cls_pivot, cross_attention_shares, mean_pivot, todre
from vtr.types import Signal


def attention_of(view):
    """A CLS row that depends on the patch only."""
    return torch.rand(3000, generator=torch.Generator().manual_seed(5))[view.patch]


def diversified(view, method, geometry=NEXT):
    step = method.steps(geometry)[0]
    view.signals = {need: attention_of(view) for need in step.needs}
    return step.select(view).keep


def slow(tokens, attention, keep):
    """The definition for one image, in float64; `attention` of the thumbnail."""
    unit = F.normalize(tokens.double(), dim=-1, eps=1e-12)
    picked = [int(attention.argmax())]
    while len(picked) < keep:
        total = (unit @ unit[picked].T).sum(1)
        total[picked] = torch.inf
        picked.append(int(total.argmin()))
    return sorted(picked)


@pytest.mark.parametrize("keep", [1, 7, [50, 35, 1, 20]])
def test_stage_1_is_the_definition_for_every_image_of_a_ragged_batch(keep):
    view = make_view(IMAGES, keep, filler=3)
    kept = chosen(view, diversified(view, ToDRE()))
    for g, got in enumerate(kept):
        attention = attention_of(view)[g, view.real[g]][: 36 if IMAGES[g] != ONE else None]
        assert got.tolist() == slow(view.tokens[g, view.real[g]], attention, int(view.keep[g]))


def test_batch_and_padding_change_nothing():
    together = make_view(IMAGES, 12)
    kept = chosen(together, diversified(together, ToDRE()))
    for image, expected in zip(IMAGES, kept):
        alone = make_view([image], 12, filler=5)
        assert torch.equal(chosen(alone, diversified(alone, ToDRE()))[0], expected)


def test_permuted_tokens_give_permuted_picks():
    random = torch.Generator().manual_seed(0)
    tokens, real, keep = torch.randn(2, 30, 8, generator=random), torch.ones(2, 30, dtype=torch.bool), torch.tensor([11, 4])
    order = torch.randperm(30, generator=random)
    inverse = order.argsort()
    got = todre(tokens[:, order], real, keep, 11, inverse[torch.tensor([6, 2])])
    assert torch.equal(got, todre(tokens, real, keep, 11, torch.tensor([6, 2]))[:, order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_tokens_are_summed_in_float32(dtype):
    tokens = torch.randn(1, 60, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    real, keep = torch.ones(1, 60, dtype=torch.bool), torch.tensor([30])
    assert torch.equal(todre(tokens, real, keep, 30, torch.tensor([0])), todre(tokens.float(), real, keep, 30, torch.tensor([0])))


def test_the_pivot_is_a_thumbnail_token_while_there_is_one():
    attention = torch.tensor([[0.1, 0.2, 0.9, 0.8], [0.1, 0.2, 0.9, 0.8]])
    real = torch.tensor([[True, True, True, True], [False, False, True, True]])
    thumbnail = torch.tensor([[True, True, False, False]] * 2)
    assert cls_pivot(attention, real, thumbnail).tolist() == [1, 2]


@pytest.mark.parametrize("pivot", PIVOTS[2:])
def test_other_pivots_are_real_and_need_no_signal(pivot):
    method = ToDRE(pivot=pivot)
    assert not method.steps(LLAVA)[0].needs
    for seed in range(3):
        view = make_view(IMAGES, 1, filler=4, seed=seed)
        keep = diversified(view, method)
        assert not (keep & ~view.real).any() and keep.sum(1).tolist() == [1] * 4


def test_mean_pivots_are_by_direction():
    tokens = torch.tensor([[[5.0, 9.0], [1.0, 0.4], [1.0, -3.0], [-9.0, 0.0], [5.0, 5.0]]])
    real = torch.tensor([[True, True, True, True, False]])
    unit = F.normalize(tokens[0, :4], dim=-1)
    similarity = unit @ unit.mean(0)
    assert mean_pivot(tokens, real, farthest=True).tolist() == [3] == [int(similarity.argmin())]
    assert mean_pivot(tokens, real, farthest=False).tolist() == [int(similarity.argmax())]


def test_a_random_pivot_follows_image_and_seed_not_the_row():
    view = make_view([ONE, ((2, 2), (96, 96)), ONE], 1)
    kept = chosen(view, diversified(view, ToDRE(pivot="random")))
    assert torch.equal(kept[0], kept[2])
    picks = {int(chosen(view, diversified(view, ToDRE(pivot="random", seed=s)))[0]) for s in range(8)}
    assert len(picks) > 3


def test_without_cls_the_pivot_is_random():
    view = make_view(IMAGES, 1)
    assert not ToDRE().steps(SIGLIP)[0].needs
    assert torch.equal(diversified(view, ToDRE(), SIGLIP), diversified(view, ToDRE(pivot="random"), SIGLIP))
    with pytest.raises(vtr.VtrError, match="pivot='farthest'"):
        ToDRE(pivot="cls").steps(SIGLIP)


def full_attention(length, heads=3, seed=0):
    logits = torch.randn(heads, length, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1).mean(0)


def test_shares_are_those_of_the_paper_on_an_interleaved_prompt():
    """System, image, text, image, text: the second image sees the text between, the shares count both images."""
    label = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 2, 2, 2])  # 0 system, 1 and 3 images, 2 text
    a = full_attention(len(label))
    visual, text = (label == 1) | (label == 3), label == 2
    t2v, v2t = a[text][:, visual].sum() / a[text].sum(), a[visual][:, text].sum() / a[visual].sum()
    real = torch.tensor([[True, True, True], [True, True, False]])
    rows_t, rows_v = torch.full((2, 7, 3), 9.0, dtype=torch.float64), torch.full((2, 3, 7), 9.0, dtype=torch.float64)
    words = (label == 2) | (label == 0)  # 7 text tokens, the first two of them system
    for g, image in enumerate((1, 3)):
        n = int((label == image).sum())
        rows_t[g, :, :n] = a[words][:, label == image]
        rows_v[g, :n] = a[label == image][:, words]
    instruction = (label[words] == 2).expand(2, -1)
    got = cross_attention_shares(rows_t, rows_v, real, instruction, torch.tensor([4, 4]))
    torch.testing.assert_close(got[0], t2v.expand(2))
    torch.testing.assert_close(got[1], v2t.expand(2))


def test_prompts_do_not_mix():
    rows_t, rows_v = torch.rand(3, 4, 5), torch.rand(3, 5, 4)
    real, words = torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    together = cross_attention_shares(rows_t, rows_v, real, words, torch.tensor([0, 2, 5]))
    for g in range(3):
        alone = cross_attention_shares(rows_t[g : g + 1], rows_v[g : g + 1], real[:1], words[:1], torch.tensor([0]))
        torch.testing.assert_close(together[0][g], alone[0][0])
        torch.testing.assert_close(together[1][g], alone[1][0])


def test_stage_2_decides_per_prompt():
    method = ToDRE(tau=0.5)
    step = method.steps(LLAVA)[1]
    assert step.layer == 7 and not step.counted and {need.layer for need in step.needs} == {6}
    assert ToDRE().steps(replace(LLAVA, llm_layers=28))[1].layer == 24
    view = make_view([ONE, ONE, ONE], 9, rows=[0, 1, 1], text=[3, 5, 5])
    strength = torch.tensor([0.1, 0.45, 0.2]) / 36  # 0.1 fades; 0.45 + 0.2 do not
    text_rows, visual_rows = strength[:, None, None].expand(3, 5, 36), torch.zeros(3, 36, 5)
    view.signals = dict(zip(step.needs, (text_rows, visual_rows)))
    kept = step.select(view).keep
    assert kept.sum(1).tolist() == [0, 36, 36]
    view.signals = dict(zip(step.needs, (text_rows, visual_rows + 0.3)))  # 2 x 0.3 back from the images
    assert step.select(view).keep.sum(1).tolist() == [36, 36, 36]


def test_stage_2_after_stage_1_sees_only_survivors():
    view = make_view(IMAGES, 5, filler=2)
    view = shortened(view, diversified(view, ToDRE()))
    step = ToDRE(tau=1.0).steps(NEXT)[1]
    view.signals = dict(zip(step.needs, (torch.zeros(4, 5, 5), torch.zeros(4, 5, 5))))
    assert not step.select(view).keep.any()


def test_tau_0_has_no_second_stage_and_is_part_of_identity():
    assert len(ToDRE(tau=0).steps(LLAVA)) == 1
    same = ToDRE.identity(36)
    assert same.keep == 36 and same.tau == 0


@pytest.mark.parametrize("pivot", PIVOTS)
def test_selections_never_wait_for_the_device(pivot):
    view = make_view(IMAGES, 9)
    first, second = ToDRE(pivot=pivot).steps(NEXT)
    view.signals = {need: attention_of(view) for need in first.needs}
    select_without_sync(first, view)
    n, m = view.real.shape[1], view.text.real.shape[1]
    view.signals = dict(zip(second.needs, (torch.rand(4, m, n), torch.rand(4, n, m))))
    select_without_sync(second, view)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="pivot must be one of auto"):
        ToDRE(pivot="best")
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\], got 2"):
        ToDRE(tau=2)
    with pytest.raises(ValueError, match="layer must be at least 1"):
        ToDRE(layer=0)
    with pytest.raises(ValueError, match="layer 8 is not one of the LLM's layers 1 to 7"):
        ToDRE(layer=8).steps(LLAVA)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@torch.no_grad()
def test_on_a_model_stage_1_is_the_definition(kind):
    batch = batch_of(kind, dtype=torch.float64)
    entering = embeddings(batch)
    expected = []
    for seen in images_of(batch):
        attention = last_cls_logits(batch, seen.pixels[:1])[0].softmax(-1)[:, 1:].mean(0)
        expected.append(sorted(seen.patch[slow(entering[seen.row, seen.positions], attention, 9)].tolist()))
    assert retained(batch, ToDRE(keep=9, tau=0.0)) == expected


def test_the_signal_is_the_cls_row_of_the_last_tower_layer():
    assert ToDRE().steps(LLAVA)[0].needs == (Signal("cls_row", layer=LLAVA.tower_layers - 1, tower=True),)
