"""Relevance to a question is a cosine: bounded, blind to length, and to text that was not asked."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.relevance import clip_relevance, text_similarity

seeds = st.integers(0, 10**6)


@given(seeds, st.integers(1, 6), st.integers(1, 5))
def test_text_similarity_is_bounded_and_blind_to_length_and_to_other_text(seed: int, n: int, words: int) -> None:
    random = torch.Generator().manual_seed(seed)
    visual, text = torch.randn(2, n, 3, generator=random), torch.randn(2, words, 3, generator=random)
    asked = torch.rand(2, words, generator=random) < 0.6
    found = text_similarity(visual, text, asked)
    assert float(found.abs().max()) <= 1 + 1e-6
    assert not found[~asked.any(1)].any()
    noise = torch.where(asked[..., None], text, torch.full_like(text, torch.nan))
    assert torch.equal(text_similarity(visual, noise, asked), found)
    torch.testing.assert_close(text_similarity(visual * 2.0 ** torch.arange(n)[:, None], text * 8, asked), found)
    exact = text_similarity(text, text, torch.ones(2, words, dtype=torch.bool)[:, :1] & (torch.arange(words) == 0))
    torch.testing.assert_close(exact[:, 0], torch.ones(2))


@given(seeds, st.integers(1, 6), st.integers(1, 4))
def test_clip_relevance_is_the_mean_over_the_segments_that_count(seed: int, n: int, segments: int) -> None:
    random = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, n, 5, generator=random), torch.randn(2, segments, 5, generator=random)
    real = torch.rand(2, segments, generator=random) < 0.5
    real[:, 0] = True
    found = clip_relevance(image, text, real)
    for g in range(2):
        cosine = F.cosine_similarity(image[g].double()[:, None], text[g, real[g]].double()[None], dim=-1)
        torch.testing.assert_close(found[g].double(), -cosine.mean(1), atol=1e-6, rtol=0)
        torch.testing.assert_close(clip_relevance(image[g : g + 1], text[g, real[g]]), found[g : g + 1])
