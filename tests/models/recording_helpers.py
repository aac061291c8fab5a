"""Tiny fused models whose passes are recorded, on a CPU by a stand-in for CUDA graphs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "layers"))

from layer_helpers import batch, gradients, tiny_model  # noqa: E402

from colab_qlora.layers.graph_recorder import Rerun  # noqa: E402
from colab_qlora.models.fuse import fuse, state_of  # noqa: E402
from colab_qlora.models.pass_graphs import PassGraphs  # noqa: E402

IS_GPU = torch.cuda.is_available()
# a shape is recorded in its third pass, and runs from the recording in the fourth
PASSES = 5


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
