"""Decoded weights that stay from one pass to the next, where a plan has memory left for them.

Every pass decodes a layer's NF4 weights into scratch memory, forward and backward: at 8B shapes on
an H200 0.37 ms a layer and step, of a step that takes 70 ms with 2 x 512 tokens and 240 with
2 x 2048. A group that is held is decoded once; only the borders, where its adapters stand, are
written anew in each pass. What is in the buffer is the same bit by bit.

A weight that is replaced, moved or written in place is decoded anew. What is written through
`weight.data` or a view of another library is not seen, as torch counts no such write:
`models.smart.free_recordings(model)` lets everything go.

Bytes held: those of the scratch buffers, 2 (rows + spare) (in + spare) a group in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.kernels.weight_products import hide_from_products
from colab_qlora.layers.standing import Signature

# the layer's number, and something that tells its groups apart
HoldKey = tuple[int, Hashable]


@dataclass(eq=False)
class HeldGroup:
    """The buffer of one group.

    Attributes:
        buffer: (rows + spare, in + spare), [W | B ; A].
        views: what GEMMs take of it, made by whoever asked for the buffer.
        signature: of the weights in it; None before it is filled.
        borders: which borders are in it, and in which layer's pass they were written.
    """

    buffer: torch.Tensor
    views: Any
    signature: Signature | None = None
    borders: tuple[int, bool] | None = None


class HeldWeights:
    """The held groups of one model.

    Attributes:
        layers: layers below this number are held.
        passes: layers' passes so far; borders that an earlier one wrote may be old.
    """

    def __init__(self) -> None:
        self.layers, self.passes = 0, 0
        self._groups: dict[HoldKey, HeldGroup] = {}

    def hold(self, layers: int) -> bool:
        """Hold the first so many layers from now on; True if others were let go.

        Their memory is free once no recording reads it.
        """
        kept = {key: held for key, held in self._groups.items() if key[0] < layers}
        is_less = len(kept) < len(self._groups)
        self._groups, self.layers = kept, layers
        return is_less

    def group(
        self,
        key: HoldKey,
        shape: tuple[int, int],
        like: torch.Tensor,
        views_of: Callable[[torch.Tensor], Any],
    ) -> HeldGroup | None:
        """The group's buffer in dtype and on the device of `like`; None if it is not held.

        While something is recorded no buffer is made: it would belong to the recording's memory.
        """
        if not self.wants(key):
            return None
        held = self._groups.get(key)
        if held is not None:
            buffer = held.buffer
            if (buffer.shape, buffer.dtype, buffer.device) == (shape, like.dtype, like.device):
                return held
        if is_recording(like):
            return None
        # let go of the old one first, so that both never stand side by side
        held = self._groups.pop(key, None)
        held = None
        with torch.inference_mode(False), torch.no_grad():
            buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
            hide_from_products(buffer)
            held = HeldGroup(buffer, views_of(buffer))
        self._groups[key] = held
        return held

    def wants(self, key: HoldKey) -> bool:
        """True if this group is to be held."""
        return key[0] < self.layers

    def find(self, key: HoldKey) -> HeldGroup | None:
        """The group's buffer, if there is one."""
        return self._groups.get(key)

    def free(self) -> None:
        """Give all memory back; it is taken again by the next pass whose plan holds weights."""
        self._groups.clear()

    def bytes_held(self) -> int:
        """Bytes of all buffers."""
        return sum(g.buffer.numel() * g.buffer.element_size() for g in self._groups.values())


def is_recording(like: torch.Tensor) -> bool:
    """True while a CUDA graph is recorded on the current stream."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()
