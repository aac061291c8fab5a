"""Buffers that are used again and again: decoded weights, inputs with room for LoRA.

All work of a model runs on one stream in one order, so a buffer is free as soon as the op that
reads it is queued. A slot grows to the largest request and stays, since asking the allocator for
100 MB at every layer would fragment the memory that the kept tensors need.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch


class Scratch:
    """Named buffers of one model; what a slot holds is undefined when it is asked for."""

    def __init__(self) -> None:
        self._slots: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self._contents: dict[str, Hashable] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies start empty: nothing in here outlives a pass."""
        return vars(Scratch())

    def get(
        self, slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A contiguous buffer of that shape, in the memory that the slot had before."""
        self._contents.pop(slot, None)
        key = (slot, dtype, device)
        numbers = math.prod(shape)
        held = self._slots.get(key)
        if held is None or held.numel() < numbers:
            self._slots.pop(key, None)
            held = None  # let go of the old one first, so that both never stand side by side
            # what is made in inference mode could not be written to outside of it
            with torch.inference_mode(False):
                held = torch.empty(numbers, dtype=dtype, device=device)
            self._slots[key] = held
        return held[:numbers].view(shape)

    def label(self, slot: str, content: Hashable) -> None:
        """Remember what was written into the slot, until it is asked for again."""
        self._contents[slot] = content

    def holds(self, slot: str, content: Hashable) -> bool:
        """True if the slot still holds what was labelled so."""
        return slot in self._contents and self._contents[slot] == content

    def peek(
        self, slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The slot's present content, which `holds` has confirmed."""
        return self._slots[(slot, dtype, device)][: math.prod(shape)].view(shape)

    def forget_contents(self) -> None:
        """Trust no slot's content any more: weights may have changed since."""
        self._contents.clear()

    def free(self) -> None:
        """Give all memory back (evaluation, or after running out of memory)."""
        self._slots.clear()
        self._contents.clear()

    def bytes_held(self) -> int:
        """Bytes of all slots."""
        return sum(t.numel() * t.element_size() for t in self._slots.values())
