"""How many recordings are kept, which of them go, and where their memory is."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from recording_helpers import (  # noqa: E402
    batch,
    differing,
    fused,
    gradients,
    passes,
    record,
    recorded_model,
)

from colab_qlora.layers.gradient_rows import GradientRows  # noqa: E402
from colab_qlora.layers.graph_recorder import Rerun  # noqa: E402
from colab_qlora.models import kept_recordings  # noqa: E402
from colab_qlora.models.kept_recordings import (  # noqa: E402
    LONG_UNUSED,
    MOST_RECORDED,
    KeptRecordings,
)
from colab_qlora.models.pass_graphs import MOST_TIMES, PAID_OFF  # noqa: E402

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


def key(number: int, device: Any = "cpu") -> Any:
    return (torch.Size((1, number, 8)), torch.float32, torch.device(device), None)


def move(model: Any) -> None:
    """New storages, as an optimiser makes that lays all adapters in a row."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def test_so_many_shapes_and_no_more():
    model = fused()
    graphs = record(model)
    for length in range(3, MOST_RECORDED + 6):
        passes(model, batch(length=length), 3)
    assert len(graphs.shapes) == MOST_RECORDED


def test_a_shape_that_no_longer_comes_makes_way():
    model = fused()
    lengths = range(3, 3 + MOST_RECORDED)
    new = batch(length=60)
    expected, again = gradients(model, new), gradients(model, batch(length=3))
    graphs = record(model)
    for length in lengths:
        passes(model, batch(length=length), 4)
    # all but two go on coming
    for _ in range(LONG_UNUSED // (MOST_RECORDED - 2) + 2):
        for length in lengths[2:]:
            gradients(model, batch(length=length))
    assert not any(differing(found, expected) for found in passes(model, new))
    kept = {shape[1] for shape in graphs.shapes}
    assert kept == {*lengths[1:], 60}, "the one that has not come for longest went"
    assert not any(differing(found, again) for found in passes(model, batch(length=3)))


def test_the_one_that_came_last_longest_ago_goes():
    recordings = KeptRecordings(Rerun())
    found = {}
    for number in range(MOST_RECORDED):
        recordings.new_pass()
        found[number] = recordings.new(key(number))
        recordings.use(found[number])
    recordings.new_pass()
    recordings.use(found[0])
    assert not recordings.has_place()
    for _ in range(LONG_UNUSED):
        recordings.new_pass()
    assert recordings.has_place()
    recordings.new(key(99))
    assert len(recordings) == MOST_RECORDED
    assert recordings.get(key(1)) is None
    assert recordings.get(key(0)) is found[0]


def test_a_shape_that_keeps_changing_is_given_up():
    model, inputs, _, graphs = recorded_model()
    for _ in range(12):
        move(model)
        gradients(model, inputs)
    assert not graphs.shapes


def test_recordings_that_have_to_go_every_time_are_given_up():
    """As where a batch of another shape runs out of memory beside them."""
    model, inputs, expected, graphs = recorded_model()
    for _ in range(MOST_TIMES):
        assert graphs.shapes
        graphs.clear()
        assert not any(differing(found, expected) for found in passes(model, inputs, 3))
    assert not graphs.shapes


def test_recordings_that_have_paid_off_are_made_again():
    model, inputs, expected, graphs = recorded_model()
    for _ in range(MOST_TIMES + 2):
        passes(model, inputs, PAID_OFF)
        graphs.clear()
        assert not any(differing(found, expected) for found in passes(model, inputs, 3))
        assert graphs.shapes


@pytest.fixture
def devices(monkeypatch) -> list[str]:
    """Recorders without GPUs; what they are made for, and what is waited for."""
    log: list[str] = []

    class Recorder(Rerun):
        def __init__(self, device: Any) -> None:
            self.device = device
            log.append(f"recorder of {device}")

    monkeypatch.setattr(kept_recordings, "GraphRecorder", Recorder)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append(f"{device} done"))
    return log


def test_a_model_that_was_moved_is_recorded_where_it_is(devices):
    recordings = KeptRecordings()
    first = recordings.new(key(1, FIRST))
    assert recordings.new(key(2, FIRST)).memory.recorder is first.memory.recorder
    second = recordings.new(key(1, SECOND))
    assert second.memory.recorder.device == second.device == SECOND
    assert [k for k, _ in recordings.items()] == [key(1, SECOND)]
    assert devices == ["recorder of cuda:0", "cuda:0 done", "recorder of cuda:1"]


def test_the_models_device_is_waited_for(devices):
    recordings = KeptRecordings()
    for number in range(3):
        recordings.new(key(number, SECOND))
    recordings.drop(key(1, SECOND))
    recordings.drop_all()
    recordings.drop_all()
    assert devices == ["recorder of cuda:1", "cuda:1 done", "cuda:1 done"]


def test_gradients_lie_on_their_parameters_device():
    rows = GradientRows()
    here = rows.get(torch.float32, 8, torch.device("cpu"))
    assert rows.get(torch.float32, 8, torch.device("meta")).device.type == "meta"
    assert rows.get(torch.float32, 4, torch.device("cpu")).data_ptr() == here.data_ptr()


def test_a_layer_elsewhere_is_no_part_of_the_pass():
    """Of a model over two GPUs only the layers on the first one's device can be recorded."""
    model, inputs, _, graphs = recorded_model()
    asked: list[Any] = []
    own = graphs.graph_of
    graphs.graph_of = lambda layer, room: (asked.append(layer), own(layer, room))[1]
    gradients(model, inputs)
    first, second, third = asked
    elsewhere = replace(second, hidden=second.hidden.to("meta"))
    assert own(first, lambda: None) is not None
    assert own(elsewhere, lambda: None) is None
    assert own(third, lambda: None) is not None


def test_memory_of_nothing(devices):
    recordings = KeptRecordings(SimpleNamespace(pool_bytes=lambda: (1, 2), runs_again=True))
    assert recordings.pool_bytes() == (0, 0)
    recordings.new(key(1))
    assert recordings.pool_bytes() == (1, 2)


def test_the_pool_goes_with_the_last_recording(devices):
    """Nobody else could use its memory, and what is free is asked of the GPU."""
    recordings = KeptRecordings()
    recorder = weakref.ref(recordings.new(key(1, FIRST)).memory.recorder)
    recordings.new(key(2, FIRST))
    recordings.drop(key(1, FIRST))
    assert recorder() is not None
    recordings.drop(key(2, FIRST))
    assert recorder() is None


class Forgetful(Rerun):
    """Keeps no more of what it records than a CUDA graph; its numbers are those of one pass."""

    def record(self, work: Any) -> Any:
        recording = super().record(work)
        nothing = (None,) * len(recording.results)
        recording._work = lambda: nothing
        return recording


def test_what_is_let_go_is_free_at_once():
    """Not when Python comes round to look for circles: a pass of another shape may want it now."""
    model = fused()
    graphs = record(model, recorder=Forgetful())
    passes(model, batch(), 4)
    ((_, found),) = graphs._recorded.items()
    held = [
        weakref.ref(each) for each in (found.memory, found.memory.scratch, *found.layers.values())
    ]
    assert len(held) == 5
    del found
    gc.collect()
    gc.disable()
    try:
        graphs.clear()
        assert not any(each() for each in held)
    finally:
        gc.enable()
