"""The hash behind every random choice: the published splitmix64, uniform enough, and blind to batch and device."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.ops.hashing import checksum, mix, random_key


def splitmix64(x: int) -> int:
    """Steele, Lea and Flood 2014, in Python's own integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_mix_is_splitmix64() -> None:
    values = [0, 1, 2, -1, 12345678901234567, -(2**63), 2**63 - 1]
    assert [v % 2**64 for v in mix(torch.tensor(values)).tolist()] == [splitmix64(v % 2**64) for v in values]
    assert mix(torch.tensor(0)).item() % 2**64 == 0xE220A8397B1DCDAF  # the generator's first number from seed 0


def test_keys_are_exact_in_float64_and_do_not_depend_on_the_batch() -> None:
    sums, patch = torch.tensor([5, -7, 5]), torch.arange(300).expand(3, -1)
    key = random_key(3, sums, patch)
    assert key.min() >= 0 and key.max() < 2**53 and torch.equal(key.double().long(), key)
    assert torch.equal(key[0], key[2]) and not torch.equal(key[0], key[1])
    assert torch.equal(key[1:2], random_key(3, sums[1:2], patch[:1]))
    assert torch.equal(key[:, 100:], random_key(3, sums, patch[:, 100:])), "a key belongs to its patch, whatever else is there"
    assert not torch.equal(key, random_key(4, sums, patch))


def test_keys_are_spread_evenly() -> None:
    key = random_key(0, torch.arange(64), torch.arange(576).expand(64, -1)).double() / 2**53
    assert key.mean().sub(0.5).abs() < 0.01
    assert torch.histc(key.float(), 10, 0, 1).sub(key.numel() / 10).abs().max() < 0.05 * key.numel() / 10
    assert key.flatten().unique().numel() == key.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_checksum_sees_every_value_and_their_order(dtype: torch.dtype) -> None:
    image = torch.arange(24, dtype=dtype).view(1, 2, 3, 4)
    swapped, changed = image.flip(-1), image.clone()
    changed[0, 1, 2, 3] = 7
    assert len({checksum(i).item() for i in (image, swapped, changed)}) == 3
    assert checksum(torch.cat([swapped, image]))[1] == checksum(image)[0]


@pytest.mark.gpu
def test_the_same_on_cpu_and_cuda() -> None:
    image, patch = torch.randn(2, 3, 8, 8), torch.arange(64).expand(2, -1)
    sums = checksum(image)
    assert torch.equal(sums, checksum(image.cuda()).cpu())
    assert torch.equal(random_key(1, sums, patch), random_key(1, sums.cuda(), patch.cuda()).cpu())


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_mix_is_splitmix64_of_any_number(values: list[int]) -> None:
    assert [v % 2**64 for v in mix(torch.tensor(values)).tolist()] == [splitmix64(v % 2**64) for v in values]
