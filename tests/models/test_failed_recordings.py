"""A recording for which there is no memory: the pass goes on as ever, and so does the training."""

from __future__ import annotations

import gc
import weakref
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

from colab_qlora.kernels.attention import AttentionShape  # noqa: E402
from colab_qlora.layers import layer_graph  # noqa: E402
from colab_qlora.layers.graph_recorder import Rerun  # noqa: E402
from colab_qlora.models import kept_recordings  # noqa: E402
from colab_qlora.models.fuse import state_of  # noqa: E402
from colab_qlora.models.pass_graphs import PassGraphs  # noqa: E402
from colab_qlora.models.smart import plan_batches, runtime_of  # noqa: E402
from colab_qlora.training.micro_batch import with_less_memory  # noqa: E402

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB"


class Failing(Rerun):
    """Fails at one of its recordings, as a GPU that runs out of memory.

    Attributes:
        made: recordings that were asked for.
    """

    def __init__(self, at: int) -> None:
        self.at, self.made = at, 0

    def record(self, work: Any) -> Any:
        self.made += 1
        if self.made > self.at:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return super().record(work)


class FailingInside(Failing):
    """Fails when half of it is recorded: what was to be computed by then never is."""

    def record(self, work: Any) -> Any:
        if self.made < self.at:
            return super().record(work)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AttentionShape, "kept", _never_computed)
            work()
        return super().record(work)


def _never_computed(shape: AttentionShape, key: Any, make: Any) -> Any:
    if key not in shape._kept:
        found = make()
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            found.fill_(float("nan"))
        shape._kept[key] = found
    return shape._kept[key]


@pytest.mark.parametrize("at", range(7))
def test_a_recording_that_fails_costs_nothing(at):
    """A model of three layers has six recordings; with the seventh nothing fails."""
    model = fused()
    expected = gradients(model, batch())
    said: list[str] = []
    recorder = Failing(at)
    graphs = record(model, said, recorder)
    assert not any(differing(found, expected) for found in passes(model, batch()))
    assert graphs.is_on == (at == 6)
    assert len(said) == (at < 6)
    assert at == 6 or "CUDA out of memory" in said[0]
    assert recorder.made == min(at + 1, 6), "nothing is tried after one that failed"


@pytest.mark.parametrize("family", ["mistral_window", "gemma2"])
def test_what_a_failed_recording_has_not_computed_is_not_read(family):
    """The mask of a window is made once a pass, by the first layer that asks for it."""
    model = fused(family)
    expected = gradients(model, batch())
    graphs = record(model, [], FailingInside(0))
    assert not any(differing(found, expected) for found in passes(model, batch()))
    assert not graphs.is_on


def test_nor_by_the_backward_pass(monkeypatch):
    model = fused()
    expected = gradients(model, batch())
    record(model, [], Failing(4))
    kept: list[dict[Any, Any]] = []
    own = layer_graph.layer_backward

    def seen(dh: Any, parts: Any, run: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(dict(run.attention._kept))
        return own(dh, parts, run, *args, **kwargs)

    monkeypatch.setattr(layer_graph, "layer_backward", seen)
    assert not any(differing(found, expected) for found in passes(model, batch()))
    # recorded, then as ever after the next one's failed
    assert [bool(each) for each in kept] == [True, False, False]


@pytest.mark.parametrize("at", [1, 4])
def test_its_memory_is_free_with_the_next_pass(at):
    model = fused()
    graphs = record(model, [], Failing(at))
    passes(model, batch(), 2)
    loss = model(**batch()).loss
    ((_, found),) = graphs._recorded.items()
    memory = weakref.ref(found.memory)
    del found
    loss.backward()
    del loss
    assert memory() is not None
    gradients(model, batch())
    gc.collect()
    assert memory() is None
    assert not graphs.is_on and not graphs.shapes


@pytest.mark.parametrize("at", [1, 4])
def test_a_pass_that_runs_out_of_memory_after_that_is_repeated_on_the_same_budget(at):
    """What it lacked, its recordings had."""
    model = fused()
    plan_batches(model)
    runtime = runtime_of(model)
    expected = gradients(model, batch())
    told: list[str] = []
    graphs = record(model, told, Failing(at))
    passes(model, batch(), 2)
    said: list[str] = []
    tries: list[bool] = []

    def step() -> Any:
        tries.append(graphs.is_on)
        loss = model(**batch()).loss
        loss.backward()
        if len(tries) == 1:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return loss.detach()

    model.zero_grad()
    found = {"loss": with_less_memory(model, step, said.append)}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert not differing(found, expected)
    assert tries == [True, False]
    assert len(said) == 1 and "once more without recorded layers" in said[0]
    assert len(told) == 1 and "CUDA out of memory" in told[0]
    assert runtime is not None and runtime.share == 1.0
    # planned anew, for layers that run as ever
    assert not runtime.workload.settings.records_layers
    assert runtime.current is not None and runtime.current.step is not None
    assert not runtime.current.step.batch.settings.records_layers


def test_no_memory_for_the_first_recorder(monkeypatch):
    def fails(device: Any) -> Any:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(kept_recordings, "GraphRecorder", fails)
    model, said = fused(), []
    expected = gradients(model, batch())
    state = state_of(model)
    assert state is not None
    state.graphs = graphs = PassGraphs(said.append, always=True)
    graphs.takes = lambda hidden: graphs.is_on
    assert not any(differing(found, expected) for found in passes(model, batch()))
    assert not graphs.is_on and len(said) == 1


def test_out_of_memory_lets_recordings_go_before_anything_is_planned_anew():
    model, _, _, graphs = recorded_model()
    plan_batches(model)
    runtime = runtime_of(model)
    assert runtime is not None
    passes(model, batch())
    assert graphs.shapes
    said: list[str] = []
    seen: list[int] = []

    def step() -> str:
        seen.append(len(graphs.shapes))
        if len(seen) < 3:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return "done"

    assert with_less_memory(model, step, said.append) == "done"
    assert seen == [1, 0, 0]
    assert "once more without recorded layers" in said[0]
    assert "planning again with 90% of the memory" in said[1]
