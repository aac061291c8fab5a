"""What a GPU's memory allows, with a GPU that only answers questions."""

from __future__ import annotations

import threading

import pytest
import torch

from colab_qlora.quantization import memory_room
from colab_qlora.quantization.memory_room import Room, free_bytes, larger_chunks
from colab_qlora.quantization.row_chunks import CHUNK, chunks_of, row_slices

GIB = 2**30
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Set what a GPU would say, in GiB."""

    def answer(free, total, *, reserved=0.0, allocated=0.0, peak=0.0, fraction=1.0):
        stats = {
            "reserved_bytes.all.current": int(reserved * GIB),
            "allocated_bytes.all.current": int(allocated * GIB),
        }
        answers = {
            "mem_get_info": (int(free * GIB), int(total * GIB)),
            "memory_stats": stats,
            "memory_allocated": stats["allocated_bytes.all.current"],
            "max_memory_allocated": int(peak * GIB),
            "get_per_process_memory_fraction": fraction,
        }
        for name, value in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)

    return answer


def chunk():
    """Numbers of a slice, by what `row_slices` does."""
    first = next(row_slices(2**40, 1))
    return first.stop - first.start


def test_free_is_what_torch_can_still_hand_out(gpu):
    gpu(free=5, total=16, reserved=8, allocated=6)
    assert free_bytes(GPU) == 7 * GIB
    # other processes hold 3 of them, which a cap above that does not change
    gpu(free=5, total=16, reserved=8, allocated=6, fraction=0.9)
    assert free_bytes(GPU) == 7 * GIB
    gpu(free=5, total=16, reserved=8, allocated=6, fraction=0.5)
    assert free_bytes(GPU) == 2 * GIB
    gpu(free=5, total=16, reserved=8, allocated=6, fraction=0.25)
    assert free_bytes(GPU) == 0
    assert free_bytes(torch.device("cpu")) == 0


@pytest.mark.parametrize(
    ("free", "numbers"), [(0.5, CHUNK), (8, 2**25), (130, memory_room.LARGEST_CHUNK)]
)
def test_chunks_grow_with_free_memory_within_bounds(gpu, free, numbers):
    gpu(free=free, total=141)
    with larger_chunks(GPU):
        assert chunk() == numbers
        # six of them, in float32
        assert chunk() == CHUNK or 6 * 4 * chunk() <= free * GIB / 10
    assert chunk() == CHUNK


def test_chunks_stay_on_a_cpu():
    with larger_chunks(torch.device("cpu")):
        assert chunk() == CHUNK


def test_chunks_are_of_one_thread_and_end_with_an_error():
    seen = []
    with pytest.raises(KeyError), chunks_of(100):
        assert [part.stop for part in row_slices(25, 10)] == [10, 20, 25]
        with chunks_of(7):
            assert chunk() == 7
        thread = threading.Thread(target=lambda: seen.append(chunk()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [CHUNK]
    assert chunk() == CHUNK


def test_room_is_what_was_never_used_less_a_reserve(gpu):
    # an 8B on 16 GB, on 24 GB and on 141 GB; the same with a cap of 16 GB
    for total, fraction, expected in ((14.7, 1, 0), (22.5, 1, 5.5), (141, 1, 124), (141, 0.1, 0)):
        gpu(free=total - 6, total=total, reserved=6, allocated=6, peak=9, fraction=fraction)
        room = Room.of(GPU)
        assert not room.claim(int(expected * GIB) + 2**20)
        assert room.claim(int(expected * GIB))
        assert not room.claim(2**20)


def test_room_is_measured_at_the_first_claim(gpu):
    room = Room.of(GPU)
    gpu(free=100, total=141)
    assert room.claim(GIB)
    # what was claimed is in use by now, and is not to be counted twice
    gpu(free=99, total=141, reserved=1, allocated=1, peak=1)
    assert room.claim(91 * GIB)
    assert not room.claim(1)
    room.give_back(5)
    assert room.claim(5)
    assert not room.claim(1)


def test_there_is_no_room_on_a_cpu():
    assert not Room.of(torch.device("cpu")).claim(1)
    assert not Room().claim(1)
