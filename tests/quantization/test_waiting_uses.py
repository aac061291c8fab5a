"""Micro-batches that are priced together, in the backward pass of the last one, where room is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from dynamic_llama import BATCHES as WHOLE_BATCHES
from dynamic_llama import nf4_llama
from tiny_llama import BATCHES, frozen, tiny_llama

from colab_qlora.quantization import dynamic
from colab_qlora.quantization.budget import Budget
from colab_qlora.quantization.dynamic import quantize_dynamically
from colab_qlora.quantization.memory_room import Room
from colab_qlora.quantization.plain_rungs import plain_quantize
from colab_qlora.quantization.prices import PriceMeter, measure_prices
from colab_qlora.quantization.weight_reader import WeightReader

AMPLE = 2**30


class Watched:
    """Counts what is rounded and read."""

    def __init__(self, model):
        from colab_qlora.quantization.activation_statistics import weight_items

        self.weights = {item.name: item.weight.detach() for item in weight_items(model)}
        self.reads, self.rounded = Counter(), Counter()

    def source(self, name):
        self.reads[name] += 1
        return self.weights[name]

    def quantize(self, weight, rung, columns):
        self.rounded[rung] += 1
        return plain_quantize(weight, rung)


def measured(room, *, tied=False, checkpointing=False, dtype=torch.float64, **options):
    model = frozen(tiny_llama(tied=tied, dtype=dtype))
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    watched = Watched(model)
    found = measure_prices(
        model, BATCHES, source=watched.source, quantize=watched.quantize, room=room, **options
    )
    return found, watched


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
# none, some of the uses of one micro-batch, some of those of the second, and all
@pytest.mark.parametrize("room", [0, 20_000, 300_000, AMPLE])
def test_prices_are_the_same_numbers(tied, checkpointing, room):
    expected, _ = measured(None, tied=tied)
    found, _ = measured(Room(room), tied=tied, checkpointing=checkpointing)
    assert found.keys() == expected.keys()
    for name, rungs in expected.items():
        for rung, price in rungs.items():
            ours = found[name][rung]
            assert len(ours.row_changes) == len(price.row_changes)
            for mine, theirs in zip(ours.row_changes, price.row_changes, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-15)
            assert ours.guard == pytest.approx(price.guard, rel=1e-12)
            assert ours.output_error == pytest.approx(price.output_error, rel=1e-12)


def test_each_weight_is_read_and_rounded_once_where_there_is_room():
    _, alone = measured(None)
    _, together = measured(Room(AMPLE))
    assert set(alone.reads.values()) == {len(BATCHES)}
    assert set(together.reads.values()) == {1}
    linears = len(together.reads) - 1
    # of the table, each use has its own rows
    assert together.rounded["int8"] == linears + len(BATCHES)
    assert alone.rounded["int8"] == (linears + 1) * len(BATCHES)
    assert alone.rounded["nf4_32"] == len(BATCHES) * together.rounded["nf4_32"] > 0
    _, partly = measured(Room(20_000))
    assert set(partly.reads.values()) == {len(BATCHES) - 1, len(BATCHES)}


def test_no_more_waits_than_there_is_room_for_and_all_of_it_is_given_back():
    class Noted(Room):
        held = most = 0

        def claim(self, nbytes):
            is_free = super().claim(nbytes)
            self.held += nbytes * is_free
            self.most = max(self.most, self.held)
            return is_free

        def give_back(self, nbytes):
            super().give_back(nbytes)
            self.held -= nbytes

    for nbytes in (0, 20_000, 300_000, AMPLE):
        room = Noted(nbytes)
        measured(room)
        assert room.held == 0
        assert room.most <= nbytes
        assert room.claim(nbytes)
    assert room.most > 300_000


def test_a_loss_scale_that_overflows_leaves_nothing_behind(monkeypatch):
    expected, _ = measured(None, dtype=torch.float16)
    monkeypatch.setattr("colab_qlora.quantization.prices._FLOAT16_LOSS_SCALES", (2.0**60, 2.0**13))
    room = Room(AMPLE)
    found, watched = measured(room, dtype=torch.float16)
    assert found == expected
    assert set(watched.reads.values()) == {2}
    assert room.claim(AMPLE)


class TwoExperts(torch.nn.Module):
    """Of which a micro-batch takes one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 6, bias=False) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x, expert):
        return self.experts[expert](x)


def test_a_weight_that_the_last_micro_batch_does_not_use_is_priced_as_well():
    x = torch.randn(3, 1, 4, 8, requires_grad=True)
    found = []
    for room in (None, Room(AMPLE)):
        with PriceMeter(TwoExperts(), room=room) as meter:
            for index, expert in enumerate((0, 0, 1)):
                meter.is_waiting = index < 2
                meter._model(x[index], expert).square().sum().backward()
        found.append(meter.prices())
    assert found[0] == found[1]
    assert found[1].keys() == {"experts.0", "experts.1"}
    assert len(found[1]["experts.0"]["int8"].row_changes) == 2


@pytest.mark.parametrize("has_data", [False, True])
def test_a_model_comes_out_the_same_by_way_of_staging_and_room(has_data, monkeypatch):
    def made():
        model, source = nf4_llama()
        batches = WHOLE_BATCHES[:2] if has_data else []
        state = quantize_dynamically(
            model, source, batches, Budget(share=0.1), torch.float32, say=lambda line: None
        )
        return model, state

    plain, expected = made()
    begin = WeightReader.__init__

    def stage(self, *args, **options):
        begin(self, *args, **options, is_staged=True, piece_bytes=1000)

    monkeypatch.setattr(WeightReader, "__init__", stage)
    for nbytes in (0, 100_000, AMPLE):
        monkeypatch.setattr(dynamic.Room, "of", lambda device, nbytes=nbytes: Room(nbytes))
        model, state = made()
        assert state.map.rungs == expected.map.rungs
        assert len(set(state.map.rungs.values())) > 1
        ours, theirs = model.state_dict(), plain.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
