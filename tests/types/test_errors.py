"""Errors say which setting they blame, also after a trip between processes."""

import pickle

import pytest
import torch

from vtr.types.errors import SettingError, VtrError, out_of_memory, setting_of


@pytest.mark.parametrize("kind", [VtrError, SettingError])
def test_the_setting_to_blame_is_kept(kind):
    error = pickle.loads(pickle.dumps(kind("fastv: keep=900 is above 36", setting="keep")))
    assert type(error) is kind and str(error) == "fastv: keep=900 is above 36" and setting_of(error) == "keep"


def test_other_errors_blame_no_setting():
    assert setting_of(ValueError("keep=900")) is None and setting_of(VtrError("no tower")) is None


def test_lack_of_memory_is_known_by_kind_and_on_a_cpu_by_what_torch_says():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert out_of_memory(caught.value) and out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert (
        not out_of_memory(RuntimeError("a size does not fit"))
        and not out_of_memory(KeyError("out of memory"))
        and not out_of_memory(VtrError())
    )
