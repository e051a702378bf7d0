import pytest
import torch

import vtr.ops.prompt_rows as module
from vtr.ops.prompt_rows import causal_text, last_text, prompt_rows

HEADS, WIDTH = 4, 8


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("chunk", [128, 2])
def test_rows_are_those_of_the_full_causal_softmax(key_heads, chunk, monkeypatch):
    """One prompt of two words, an image, two words, an image, three words, and another of one image; padding everywhere."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    random = torch.Generator().manual_seed(0)
    label = torch.tensor([0, 0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0, 0])
    q = torch.randn(len(label), HEADS, WIDTH, generator=random, dtype=torch.float64)
    k = torch.randn(len(label), key_heads, WIDTH, generator=random, dtype=torch.float64)
    repeated = k.repeat_interleave(HEADS // key_heads, 1)
    logits = torch.einsum("ihd,jhd->hij", q, repeated) * WIDTH**-0.5
    full = logits.masked_fill(torch.ones(len(label), len(label)).triu(1).bool(), -torch.inf).softmax(-1).mean(0)

    text, images = label == 0, [label == 1, label == 2]
    m, n = int(text.sum()) + 1, 6  # a padded text column and padded visual tokens
    query, text_key = torch.full((3, m, HEADS, WIDTH), 9.0).double(), torch.full((3, m, key_heads, WIDTH), 9.0).double()
    visual_key = torch.full((3, n, key_heads, WIDTH), 9.0).double()
    real, text_real = torch.zeros(3, n, dtype=torch.bool), torch.zeros(3, m, dtype=torch.bool)
    sees_visual = torch.zeros(3, m, n, dtype=torch.bool)
    for g, image in enumerate([*images, images[0]]):
        size = int(image.sum())
        query[g, : m - 1], text_key[g, : m - 1], text_real[g, : m - 1] = q[text], k[text], True
        visual_key[g, -size:], real[g, -size:] = k[image], True
        sees_visual[g, : m - 1, -size:] = text.nonzero() > image.nonzero()[:, 0]
    got = prompt_rows(
        query, visual_key, text_key, real, text_real, torch.tensor([4, 4, 7]), sees_text=causal_text(text_real), sees_visual=sees_visual
    )
    for g, image in enumerate(images):
        torch.testing.assert_close(got[g, : m - 1, -int(image.sum()) :], full[text][:, image])
        assert not got[g, :, : n - int(image.sum())].any()
    assert (got[2, -2] > got[0, -2])[-3:].all(), "the third group is a prompt of its own, without the second image"


def test_without_masks_everything_real_is_seen():
    random = torch.Generator().manual_seed(1)
    q, k, t = (torch.randn(1, s, 2, 4, generator=random) for s in (1, 5, 3))
    seen = torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    expected = (torch.einsum("gihd,gjhd->ghij", q, torch.cat([k, t], 1)) / 2).softmax(-1).mean(1)[..., :5]
    torch.testing.assert_close(prompt_rows(q, k, t, *seen, torch.tensor([0])), expected)
    nothing = prompt_rows(q[:, :0], k, t, *seen, torch.tensor([0]))
    assert nothing.shape == (1, 0, 5)


def test_last_text_is_the_last_real_one():
    assert last_text(torch.tensor([[True, True, False], [True, False, True], [False] * 3])).tolist() == [[1], [2], [0]]
    assert last_text(torch.zeros(2, 0, dtype=torch.bool)).tolist() == [[0], [0]]
