"""Calls that cannot be served under a reduction are refused with what to do instead; what is allowed comes out in the right shape."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

import vtr
from tests.fake_flash import flash_attention
from tests.probes import EveryNth, Freeze, MergePairs
from tests.tiny_models import batch_of, model_of
from vtr import Budget, VtrError

pytestmark = pytest.mark.usefixtures("no_gradients")

HALF = EveryNth(stride=2)
CHUNKED = (
    r"got rows with \[4\] placeholders for images of \[36\] tokens; pass every image .*, and no prefill_chunk_size \(a chunk would see part"
)


@pytest.fixture
def model():
    return model_of("llava")


# -- attention backends


@dataclass(frozen=True, kw_only=True)
class ProportionalMerge(MergePairs):
    default_budget: ClassVar[Budget | None] = None


def test_flash_attention_cannot_weigh_keys_by_size(model):
    with flash_attention(model), pytest.raises(VtrError, match=r"proportional.*attn_implementation='sdpa'"):
        vtr.apply(model, ProportionalMerge(stage="tower", layer=1)).remove()


def test_flash_attention_cannot_freeze_a_batch(model):
    batch = batch_of("llava")
    with flash_attention(model), pytest.raises(VtrError, match=r"attn_implementation='sdpa'"), vtr.reduced(model, [HALF, Freeze()]):
        model(**batch.inputs)
