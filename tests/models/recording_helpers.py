"""Tiny fused models whose passes are recorded, on a CPU by a stand-in for CUDA graphs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent / "layers"))

from layer_helpers import batch, gradients, tiny_model  # noqa: E402

from colab_qlora.layers.graph_recorder import Rerun  # noqa: E402
from colab_qlora.models.fuse import fuse, state_of  # noqa: E402
from colab_qlora.models.pass_graphs import PassGraphs  # noqa: E402

IS_GPU = torch.cuda.is_available()
# a shape is recorded in its third pass, and runs from the recording in the fourth
PASSES = 5


class _Tape(TorchDispatchMode):
    """Notes every op with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = op(*args, **(kwargs or {}))
        self.ops.append((op, args, kwargs or {}, results))
        return results


class _Played:
    """Ops that were noted, done again at the same addresses."""

    def __init__(self, tape: _Tape, results: tuple[Any, ...]) -> None:
        self._tape, self.results, self._is_first = tape, results, True

    def __call__(self) -> None:
        # what was noted has run already
        if self._is_first:
            self._is_first = False
            return
        with torch.no_grad():
            for op, args, kwargs, results in self._tape.ops:
                again = tree_leaves(op(*args, **kwargs))
                for place, found in zip(tree_leaves(results), again, strict=True):
                    if torch.is_tensor(place) and place.data_ptr() != found.data_ptr():
                        place.copy_(found)


class Replay:
    """A recorder that does on a CPU what a CUDA graph does: the same ops, and no Python again.

    Attributes:
        is_recording: True while something is recorded.
    """

    runs_again = False

    def __init__(self) -> None:
        self.is_recording = False

    def record(self, work: Any) -> _Played:
        self.is_recording = True
        try:
            with _Tape() as tape:
                results = tuple(work())
        finally:
            self.is_recording = False
        return _Played(tape, results)

    def pool_bytes(self) -> tuple[int, int]:
        return 0, 0


def record(model: Any, said: list[str] | None = None, recorder: Any = None) -> PassGraphs:
    """Have every shape recorded at its third pass."""
    state = state_of(model)
    assert state is not None
    if recorder is None and not IS_GPU:
        recorder = Rerun()
    say = print if said is None else said.append
    state.graphs = PassGraphs(say, recorder=recorder, always=True)
    return state.graphs


def fused(family: str = "llama", dtype: Any = torch.float32, **lora: Any) -> Any:
    model = tiny_model(family, dtype, **lora)
    fuse(model)
    return model


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def passes(model: Any, inputs: dict[str, Any], count: int = PASSES) -> list[dict[str, Any]]:
    return [gradients(model, inputs) for _ in range(count)]


def recorded_model() -> tuple[Any, dict[str, Any], dict[str, Any], PassGraphs]:
    """A model with a recording of `batch()`, that batch, what it gives without one, and it."""
    model = fused()
    inputs = batch()
    expected = gradients(model, inputs)
    graphs = record(model)
    for found in passes(model, inputs):
        assert not differing(found, expected)
    assert len(graphs.shapes) == 1
    return model, inputs, expected, graphs
