"""Matrices that are read ahead through staging buffers, on a CPU without streams."""

from __future__ import annotations

import threading

import pytest
import torch

from colab_qlora.quantization import weight_reader
from colab_qlora.quantization.memory_room import Room
from colab_qlora.quantization.pinned_copy import PinnedCopier
from colab_qlora.quantization.weight_reader import WeightReader

CPU = torch.device("cpu")
# shapes that no piece divides, one that is smaller than a piece, and one that is empty
WEIGHTS = {
    "first": torch.randn(37, 41),
    "second": torch.randn(5, 3).bfloat16(),
    "third": torch.randn(64, 129).half().T,
    "empty": torch.empty(0, 8),
    "last": torch.randn(11, 100).bfloat16(),
}
PIECE = 1000


class Counted:
    """A source that notes what it is asked for, and refuses some."""

    def __init__(self, refused=()):
        self.asked, self.refused = [], set(refused)

    def __call__(self, name):
        self.asked.append(name)
        if name in self.refused:
            raise FileNotFoundError(name)
        return WEIGHTS[name]


def staged(source, room=None, device=CPU):
    return WeightReader(source, device, room, is_staged=True, piece_bytes=PIECE)


def assert_is(found, name):
    expected = WEIGHTS[name]
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert found.data_ptr() != expected.data_ptr() or not expected.numel()


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


@pytest.mark.parametrize("order", [list(WEIGHTS), list(reversed(WEIGHTS)), ["third", "first"], []])
@pytest.mark.parametrize("piece", [1, 64, 10**6])
def test_bytes_are_the_sources_whatever_is_expected(order, piece):
    source = Counted()
    with WeightReader(source, CPU, is_staged=True, piece_bytes=piece) as reader:
        reader.expect(order)
        for name in WEIGHTS:
            assert_is(reader(name), name)
        assert_is(reader("second"), "second")
    assert set(source.asked) == set(WEIGHTS)


def test_the_next_one_is_read_while_the_present_one_is_used():
    source = Counted()
    with staged(source) as reader:
        reader.expect(["last", "first", "third"])
        assert not source.asked
        reader("last")
        assert source.asked == ["last", "first"]
        reader("first")
        assert source.asked == ["last", "first", "third"]
        reader("third")
    assert source.asked == ["last", "first", "third"]
    assert not workers()


def test_no_more_is_kept_than_there_is_room_for():
    source = Counted()
    room = Room(WEIGHTS["first"].nbytes + WEIGHTS["last"].nbytes)
    with staged(source, room) as reader:
        for _ in range(2):
            for name in ("first", "third", "last"):
                assert_is(reader(name), name)
        # "third" did not fit beside the first
        assert source.asked == ["first", "third", "last", "third"]
        assert reader("first") is reader("first")
        taken = reader.take("first")
        assert_is(taken, "first")
        assert source.asked == ["first", "third", "last", "third"]
        # what was taken is the caller's, and what it held is free again
        assert room.claim(taken.nbytes)
        assert not room.claim(1)
        assert reader("first") is not taken


def test_an_error_is_raised_when_the_matrix_is_asked_for():
    source = Counted(refused=["second"])
    with staged(source) as reader:
        reader.expect(["first", "second", "third"])
        assert_is(reader("first"), "first")
        assert source.asked == ["first", "second"]
        assert_is(reader("third"), "third")
        with pytest.raises(FileNotFoundError, match="second"):
            reader("second")
    assert not workers()


def test_a_failing_copy_of_another_matrix_is_nobodys_error(monkeypatch):
    copy = PinnedCopier._copy

    def failing(self, host, into, ready):
        if host.shape == WEIGHTS["second"].shape:
            raise OSError("a page that cannot be read")
        return copy(self, host, into, ready)

    monkeypatch.setattr(PinnedCopier, "_copy", failing)
    with staged(Counted()) as reader:
        reader.expect(["first", "second"])
        assert_is(reader("first"), "first")  # "second" is read ahead
        assert_is(reader("last"), "last")
    with pytest.raises(ValueError, match="of the block"), staged(Counted()) as reader:
        reader.expect(["first", "second"])
        reader("first")
        raise ValueError("of the block")
    assert not workers()
    with pytest.raises(OSError, match="a page"), staged(Counted()) as reader:
        reader("second")


def test_a_cpu_takes_matrices_as_the_source_has_them():
    source = Counted()
    with WeightReader(source, CPU, Room(2**30)) as reader:
        reader.expect(WEIGHTS)
        assert reader("first") is WEIGHTS["first"]
        assert reader.take("third") is WEIGHTS["third"]
    assert source.asked == ["first", "third"]
    assert not workers()


@pytest.mark.parametrize("share", [0.0, 3.9])
def test_a_full_gpu_moves_no_whole_matrix(share, monkeypatch):
    nbytes = WEIGHTS["first"].nbytes
    monkeypatch.setattr(weight_reader, "free_bytes", lambda device: int(share * nbytes))
    with staged(Counted(), Room(2**30), torch.device("cuda")) as reader:
        assert torch.equal(reader("first"), WEIGHTS["first"])
        assert reader("first").device == CPU
    assert not workers()


@pytest.mark.gpu
def test_a_gpu_gets_the_same_bytes_while_it_computes():
    device = torch.device("cuda", 0)
    room = Room(WEIGHTS["third"].nbytes)
    with staged(Counted(), room, device) as reader:
        reader.expect(list(WEIGHTS) * 2)
        busy = torch.randn(2048, 2048, device=device)
        for name in list(WEIGHTS) * 2:
            busy = busy @ busy / 2048
            found = reader(name)
            assert found.device == device
            assert torch.equal(found.cpu(), WEIGHTS[name])
