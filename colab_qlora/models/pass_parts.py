"""What the decision whether to record a pass is made of: see `pass_graphs.py`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from colab_qlora.kernels.attention import AttentionShape
from colab_qlora.layers.layer_graph import LayerGraph, ShapeMemory
from colab_qlora.layers.layer_parts import LayerParts, Pass
from colab_qlora.layers.saved import SavedTensors

# hidden states' shape, dtype and device, and the plan of the pass
Key = tuple[torch.Size, torch.dtype, torch.device, Hashable]


class Flight:
    """A recorded pass that is under way: alive until its last backward pass."""


@dataclass(frozen=True)
class Room:
    """GPU memory for a pass, asked for when it begins.

    Attributes:
        left_bytes: that a budget leaves beside what is allocated, recordings' idle memory included.
        pass_bytes: that the pass takes if it runs as ever, by its plan; None if there is no plan.
        recording_bytes: that its recording takes on top, by its plan; 0 without one.
    """

    left_bytes: int
    pass_bytes: int | None
    recording_bytes: int = 0


@dataclass
class LayerPass:
    """One layer's part of a pass.

    Attributes:
        number: of the layer; is_last: of the model's.
        hidden: its input. parts: as it was read. run, store: as for `layer_forward`.
        choice, plan: what is decided for the layer, and for all of them.
        read_again: the parts once more, on another scratch memory.
        kind: of its rotation tables and masks: alike in layers of a kind.
        is_watched: whether somebody sees what goes from one of the model's layers to the next.
        saves_memory: layers recompute because somebody said so, and no plan knows what is free.
    """

    number: int
    is_last: bool
    hidden: torch.Tensor
    parts: LayerParts
    run: Pass
    store: Callable[[], SavedTensors]
    choice: Hashable
    plan: Hashable
    read_again: Callable[[Any], LayerParts]
    kind: tuple[Any, ...]
    is_watched: Callable[[], bool]
    saves_memory: bool = False


@dataclass
class Recorded:
    """The recorded layers of one shape.

    Attributes:
        memory: what they share. device: where all of it is.
        layers: by number; known: for each what has to be as it was.
        is_finished: nothing is added any more. is_stale: not all of it fits any more.
        uses: passes that ran from it. last_pass: number of the last one.
    """

    memory: ShapeMemory
    device: torch.device
    layers: dict[int, LayerGraph] = field(default_factory=dict)
    known: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    is_finished: bool = False
    is_stale: bool = False
    uses: int = 0
    last_pass: int = 0

    @property
    def is_whole(self) -> bool:
        return bool(self.layers) and all(graph.is_whole for graph in self.layers.values())


def is_of_one_batch(shape: AttentionShape) -> bool:
    """True if attention is over documents or a mask that other batches do not have."""
    return shape.packed or shape.mask is not None


def why_not_recorded(parts: LayerParts, shape: AttentionShape) -> str:
    """Why a layer cannot be recorded with this batch; empty if it can."""
    if is_of_one_batch(shape):
        return "documents or a mask of this batch alone"
    if any(group.has_modules for group in parts.groups()):
        return "a linear is called as it is"
    if any(block.dropout for group in parts.groups() for _, _, block in group.blocks):
        return "LoRA dropout draws new numbers in every pass"
    return ""
