"""Blocks of host memory: sizes, reuse, the cap, and a host that refuses."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

from colab_qlora.activations import host_pool
from colab_qlora.activations.host_pool import HostMemoryRefused, HostPool


def test_blocks_are_used_again() -> None:
    pool = HostPool(1000)
    first = pool.take(300)
    assert first.dtype == torch.uint8
    assert first.numel() == pool.bytes_held() == 300
    pool.give_back(first)
    assert pool.take(250).data_ptr() == first.data_ptr()
    assert pool.bytes_held() == 300
    assert pool.take(250).data_ptr() != first.data_ptr()
    assert pool.bytes_held() == 550


def test_the_smallest_that_is_large_enough() -> None:
    pool = HostPool(1000)
    pool.reserve([100, 300, 200])
    assert [pool.take(size).numel() for size in (150, 90, 201)] == [200, 100, 300]
    assert pool.bytes_held() == 600


def test_what_was_reserved_is_enough_for_anything_smaller_in_any_order() -> None:
    pick = random.Random(1)
    for _ in range(200):
        sizes = [pick.randint(1, 50) for _ in range(8)]
        pool = HostPool(sum(sizes))
        pool.reserve(sizes)
        pick.shuffle(sizes)
        blocks = [pool.take(pick.randint(1, size)) for size in sizes]
        assert pool.bytes_held() == sum(sizes)
        for block in blocks:
            pool.give_back(block)
        pool.reserve(sizes)
        assert pool.bytes_held() == sum(sizes)


def test_above_the_cap() -> None:
    pool = HostPool(500)
    pool.give_back(pool.take(400))
    # an earlier plan's block makes room for one that it cannot serve
    large = pool.take(450)
    assert pool.bytes_held() == 450
    with pytest.raises(HostMemoryRefused, match="used up"):
        pool.take(51)
    with pytest.raises(HostMemoryRefused):
        pool.reserve([20, 30, 40])
    pool.give_back(large)
    pool.free()
    assert pool.bytes_held() == 0


def test_a_host_that_locks_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(block: torch.Tensor) -> None:
        raise RuntimeError("cudaHostRegister failed with code 2")

    monkeypatch.setattr(host_pool, "_lock", refuses)
    pool = HostPool(500, is_locked=True)
    with pytest.raises(HostMemoryRefused, match="code 2, with 0.00 GiB in use.*host_budget_gib"):
        pool.reserve([100])
    assert pool.bytes_held() == 0


def test_locked_blocks_are_unlocked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unlocked: list[int] = []
    monkeypatch.setattr(host_pool, "_lock", lambda block: None)
    monkeypatch.setattr(
        host_pool, "_unlock", lambda blocks: unlocked.extend(b.numel() for b in blocks)
    )
    pool = HostPool(500, is_locked=True)
    block = pool.take(100)
    pool.give_back(pool.take(30))
    pool.free()
    assert unlocked == [30]
    assert [b.numel() for b in pool._registered] == [100]
    pool.give_back(block)
    pool.free()
    assert unlocked == [30, 100]
    assert not pool._registered


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copy_starts_empty(how) -> None:
    pool = HostPool(500)
    pool.take(100)
    twin = how(pool)
    assert (twin.cap_bytes, twin.bytes_held()) == (500, 0)
    assert twin.take(100).numel() == 100
