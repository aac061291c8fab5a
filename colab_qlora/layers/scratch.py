"""Buffers that are used again and again: decoded weights, inputs with room for LoRA.

All work of a model runs on one stream in one order, so a buffer is free as soon as the op that
reads it is queued. A slot grows to the largest request and stays, since asking the allocator for
100 MB at every layer would fragment the memory that the kept tensors need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch

from colab_qlora.kernels.weight_products import hide_from_products
from colab_qlora.layers.held_weights import HeldWeights

T = TypeVar("T")

# views of one slot in as many shapes; batches of ever new lengths add some
MOST_VIEWS = 4096


class Wide(NamedTuple):
    """Rows with room beside them for rank-r products: (tokens, width + spare) and its two parts."""

    whole: torch.Tensor
    main: torch.Tensor
    spare: torch.Tensor


def wide_of(whole: torch.Tensor, width: int) -> Wide:
    """The parts of a tensor whose first `width` columns are the main ones."""
    return Wide(whole, whole[:, :width], whole[:, width:])


def new_rows(like: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """New memory in dtype and on the device of `like`, of which products may read parts of rows."""
    made = like.new_empty(shape)
    hide_from_products(made)
    return made


class Scratch:
    """Named buffers of one model; what a slot holds is undefined when it is asked for.

    Attributes:
        held: decoded weights that stay, where a plan says so: they are not free after a pass.
    """

    def __init__(self) -> None:
        self.held = HeldWeights()
        self._slots: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self._contents: dict[str, Hashable] = {}
        # views cost the host a few microseconds each, and every layer asks for the same ones
        self._views: dict[Hashable, Any] = {}
        self._offered: tuple[int, tuple[int, ...]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies start empty: nothing in here outlives a pass."""
        return vars(Scratch())

    def get(
        self, slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A contiguous buffer of that shape, in the memory that the slot had before."""
        self._contents.pop(slot, None)
        return self.view(
            (slot, shape, dtype, device), lambda: self._new(slot, shape, dtype, device)
        )

    def wide(self, slot: str, tokens: int, width: int, spare: int, like: torch.Tensor) -> Wide:
        """A buffer (tokens, width + spare) in dtype and on the device of `like`, and its parts."""
        self._contents.pop(slot, None)
        dtype, device = like.dtype, like.device
        return self.view(
            (slot, tokens, width, spare, dtype, device),
            lambda: wide_of(self.get(slot, (tokens, width + spare), dtype, device), width),
        )

    def offer(self, like: torch.Tensor, spare: int) -> torch.Tensor:
        """A new tensor as `like` (tokens, width), with `spare` columns more beside it in memory.

        It is handed to whatever computes next; if that is a fused layer again, `taken` finds the
        room beside it, and a copy is saved.
        """
        whole = new_rows(like, (like.shape[0], like.shape[1] + spare))
        self._offered = (whole.data_ptr(), tuple(whole.shape))
        return whole[:, : like.shape[1]]

    def taken(self, tensor: torch.Tensor, spare: int) -> Wide | None:
        """`tensor` with the room beside it, if it is the one that was offered last."""
        offered, self._offered = self._offered, None
        rows, width = tensor.shape
        shape = (rows, width + spare)
        if offered != (tensor.data_ptr(), shape) or tensor.stride() != (shape[1], 1):
            return None
        return wide_of(tensor.as_strided(shape, tensor.stride()), width)

    def view(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned for this key; it is made again once any slot has been moved."""
        found = self._views.get(key)
        if found is None:
            # views made in inference mode could not be written to outside of it
            with torch.inference_mode(False), torch.no_grad():
                found = make()  # may move a slot, and with it clear the views
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            self._views[key] = found
        made: T = found
        return made

    def _new(
        self, slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        key = (slot, dtype, device)
        numbers = math.prod(shape)
        held = self._slots.get(key)
        if held is None or held.numel() < numbers:
            # let go of the old one first, so that both never stand side by side
            self._slots.pop(key, None)
            self._views.clear()
            held = None
            held = torch.empty(numbers, dtype=dtype, device=device)
            hide_from_products(held)
            self._slots[key] = held
        return held[:numbers].view(shape)

    def label(self, slot: str, content: Hashable) -> None:
        """Remember what was written into the slot, until it is asked for again."""
        self._contents[slot] = content

    def content(self, slot: str) -> Hashable | None:
        """What the slot was labelled with, if it was not asked for since."""
        return self._contents.get(slot)

    def peek(
        self, slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The slot's present content, which `content` has named."""
        key = (slot, dtype, device)
        return self.view(
            (slot, shape, dtype, device),
            lambda: self._slots[key][: math.prod(shape)].view(shape),
        )

    def forget_contents(self) -> None:
        """Trust no slot's content any more: weights may have changed since."""
        self._contents.clear()
        self.held.passes += 1

    def free(self) -> None:
        """Give all memory of the slots back (evaluation, or after running out of memory)."""
        self._slots.clear()
        self._contents.clear()
        self._views.clear()

    def bytes_held(self) -> int:
        """Bytes of all slots."""
        return sum(t.numel() * t.element_size() for t in self._slots.values())
