"""Which shapes are recorded on a GPU: by the clock, and by the memory that there is."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from colab_qlora.layers.graph_recorder import Rerun  # noqa: E402
from colab_qlora.models import kept_recordings, pass_sights  # noqa: E402
from colab_qlora.models.pass_graphs import PassGraphs  # noqa: E402
from colab_qlora.models.pass_parts import Room  # noqa: E402
from colab_qlora.models.pass_sights import LAST_LOOK, MARGIN_BYTES, Sight  # noqa: E402

GPU = torch.device("cuda:1")
MIB = 2**20
PLENTY = Room(10**12, None)


class Gpu:
    """Stands in for `torch.cuda`.

    Attributes:
        forward_ms: that the layers' forward pass takes.
        device: the current one; waits: how often the host has waited for all work.
        allocated: bytes.
        idle, owned: bytes of the recordings' pool.
    """

    def __init__(self) -> None:
        self.forward_ms, self.device, self.waits = 1.0, 0, 0
        self.allocated = self.idle = self.owned = 0
        self.recorded_on: list[int] = []

    @contextlib.contextmanager
    def device_of(self, tensor: Any) -> Any:
        before, self.device = self.device, tensor.device.index
        yield
        self.device = before

    def event(self, enable_timing: bool) -> Any:
        return SimpleNamespace(
            record=lambda: self.recorded_on.append(self.device),
            query=lambda: True,
            elapsed_time=lambda end: self.forward_ms,
        )

    def synchronize(self, device: Any = None) -> None:
        self.waits += 1


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    made = Gpu()

    class Recorder(Rerun):
        def __init__(self, device: Any) -> None:
            pass

        def pool_bytes(self) -> tuple[int, int]:
            return made.idle, made.owned

    monkeypatch.setattr(kept_recordings, "GraphRecorder", Recorder)
    monkeypatch.setattr(torch.cuda, "device_of", made.device_of)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: made.allocated)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    # the host's clock: 10 ms from one look to the next
    clock = SimpleNamespace(perf_counter=iter(i / 100 for i in range(10_000)).__next__)
    monkeypatch.setattr(pass_sights, "time", clock)
    return made


def layer_of(length: int = 8, *, saves_memory: bool = False) -> Any:
    """The only layer of a model, as `PassGraphs` looks at it while it decides."""
    hidden = SimpleNamespace(
        is_cuda=True, device=GPU, dtype=torch.float16, shape=torch.Size((1, length, 4))
    )
    return SimpleNamespace(
        number=0,
        is_last=True,
        hidden=hidden,
        parts=SimpleNamespace(groups=tuple),
        run=SimpleNamespace(attention=SimpleNamespace(packed=False, mask=None)),
        plan="a plan",
        is_watched=lambda: False,
        saves_memory=saves_memory,
    )


def decide(
    gpu: Gpu,
    graphs: PassGraphs,
    length: int = 8,
    room: Room = PLENTY,
    grown: int = 0,
    *,
    saves_memory: bool = False,
) -> bool:
    """One pass, whose layers keep `grown` bytes; True if they are recorded, now or before."""
    layer = layer_of(length, saves_memory=saves_memory)
    graphs._decide(layer, lambda: room)
    if graphs._now is not None:
        # as if its layers were recorded by now
        graphs._now.is_finished = True
        graphs._now.layers[0] = SimpleNamespace(is_whole=True)
        graphs.new_batch()
        return True
    gpu.allocated += grown
    graphs.layer_ran(layer, 0)
    return False


@pytest.mark.parametrize(("forward_ms", "is_recorded"), [(1, True), (19, True), (21, False)])
def test_shapes_that_wait_for_the_host_are_recorded_at_the_third_pass(gpu, forward_ms, is_recorded):
    gpu.forward_ms = forward_ms
    graphs = PassGraphs()
    assert [decide(gpu, graphs) for _ in range(5)] == [False, False, *[is_recorded] * 3]
    # one pass is looked at, with the queue empty
    assert gpu.waits == 1
    assert graphs.shapes == [(1, 8, 4)] * is_recorded


@pytest.mark.parametrize(("forward_ms", "is_recorded"), [(9, True), (11, False)])
def test_full_checkpointing_is_recorded_if_the_gpu_waits_for_certain(gpu, forward_ms, is_recorded):
    gpu.forward_ms = forward_ms
    graphs = PassGraphs()
    found = [decide(gpu, graphs, saves_memory=True) for _ in range(4)]
    assert found == [False, False, is_recorded, is_recorded]


def test_a_pass_is_timed_on_the_models_device(gpu):
    graphs = PassGraphs()
    layer = layer_of()
    for _ in range(2):
        with gpu.device_of(layer.hidden):
            graphs._decide(layer, lambda: PLENTY)
        graphs.layer_ran(layer, 0)
    assert gpu.recorded_on == [1, 1]


def test_a_model_whose_last_layer_never_asks_is_not_waited_for_ever(gpu):
    graphs = PassGraphs()
    for _ in range(20):
        graphs._decide(layer_of(), lambda: PLENTY)
    assert gpu.waits == LAST_LOOK - 1


@pytest.mark.parametrize("spare", [0, -1])
def test_without_a_plan_there_has_to_be_room_for_the_pass_and_its_recording(gpu, spare):
    graphs = PassGraphs()
    need = 2 * int(1.3 * 100 * MIB) + MARGIN_BYTES
    room = Room(need + spare, None)
    found = [decide(gpu, graphs, room=room, grown=100 * MIB) for _ in range(3)]
    assert found[2] == (spare == 0)


@pytest.mark.parametrize("spare", [0, -1])
def test_with_a_plan_its_peak_and_what_recordings_take_on_top(gpu, spare):
    """Memory of the pool that tensors own is not there for this pass."""
    graphs = PassGraphs()
    for _ in range(3):
        decide(gpu, graphs, 16)
    assert graphs.shapes == [(1, 16, 4)]
    gpu.idle, gpu.owned = 30 * MIB, 5 * MIB
    ample = Room(10**12, 100 * MIB, 7 * MIB)
    tight = Room(112 * MIB + spare, 100 * MIB, 7 * MIB)
    assert [
        decide(gpu, graphs, 8, ample),
        decide(gpu, graphs, 8, ample),
        decide(gpu, graphs, 8, tight),
    ] == [
        False,
        False,
        spare == 0,
    ]


@pytest.mark.parametrize("spare", [0, -1])
def test_recordings_make_way_for_a_pass_that_has_no_room_beside_them(gpu, spare):
    graphs = PassGraphs()
    for _ in range(3):
        decide(gpu, graphs, 16)
    gpu.idle, gpu.owned = 30 * MIB, 5 * MIB
    decide(gpu, graphs, 8, Room(135 * MIB + spare, 100 * MIB, 7 * MIB))
    assert bool(graphs.shapes) == (spare == 0)


def test_a_shape_that_was_refused_is_not_asked_for_again(gpu):
    graphs = PassGraphs()
    decide(gpu, graphs)
    decide(gpu, graphs)
    asked: list[bool] = []

    def room() -> Room:
        asked.append(True)
        return Room(0, None)

    for _ in range(3):
        graphs._decide(layer_of(), room)
    assert len(asked) == 1 and not graphs.shapes


def test_a_time_that_was_not_taken_says_nothing():
    assert not Sight(count=9).waits_for_host()
    late = SimpleNamespace(query=lambda: False)
    assert not Sight(count=9, host_s=1.0, events=(late, late)).waits_for_host()
