"""Write a group's weights, however they are stored, and its LoRA into one buffer of scratch memory.

A buffer is [W | B ; A], (rows + spare, in + spare). Which kernels fill it, and with which
arguments, is worked out once; while no tensor moves, the same launches are only repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from colab_qlora.kernels.int8_decode import int8_decode_
from colab_qlora.kernels.launch import Launch
from colab_qlora.kernels.lora_borders import Border, lora_borders_
from colab_qlora.kernels.mixed_group import mixed_group_
from colab_qlora.kernels.nf4_group import nf4_group_
from colab_qlora.kernels.nf4_many import nf4_dequantize_many
from colab_qlora.layers.held_weights import HeldGroup, HoldKey, is_recording
from colab_qlora.layers.linear import LinearPart, LoraBlock
from colab_qlora.layers.scratch import Scratch
from colab_qlora.layers.span import Span
from colab_qlora.layers.standing import BaseTensors, Signature, addresses

# a buffer that grows moves, and its launches are of no use any more
MOST_LAUNCHES = 16


class Decoded(NamedTuple):
    """A filled buffer and the views of it that GEMMs take.

    Attributes:
        buffer: (rows + spare, in + spare), [W | B ; A].
        beside_b: (in + spare, rows), the transpose of [W | B].
        above_a: (rows + spare, in), [W ; A].
        alone: (rows, in), W.
        b: (rows, spare), a: (spare, in), a_transposed: (in, spare).
    """

    buffer: torch.Tensor
    beside_b: torch.Tensor
    above_a: torch.Tensor
    alone: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor
    a_transposed: torch.Tensor


def decode_weights(
    parts: Sequence[LinearPart], outs: Sequence[torch.Tensor]
) -> tuple[Launch, ...] | None:
    """Fill each of `outs` (out_features, in_features; any row stride) with a part's base weight.

    Weights in NF4 are decoded together where they can be: see `kernels/nf4_many.py`. One in int8
    takes a launch of its own.

    Returns:
        Launches that do the same again as long as nothing moves; None if there are no such.
    """
    nf4 = [(part, out) for part, out in zip(parts, outs, strict=True) if part.kind == "nf4"]
    nf4_launches = nf4_dequantize_many([part.weight for part, _ in nf4], [out for _, out in nf4])
    launches: list[Launch | None] = [None] if nf4_launches is None else [*nf4_launches]
    for part, out in zip(parts, outs, strict=True):
        if part.kind == "int8":
            launches.append(int8_decode_(part.weight, out))
        elif part.kind == "fp4":
            bitsandbytes = sys.modules["bitsandbytes"]
            state = part.weight.quant_state
            out.copy_(bitsandbytes.functional.dequantize_4bit(part.weight.data, state))
            launches.append(None)
        elif part.kind == "dense":
            out.copy_(part.weight.detach())
            launches.append(None)
    ready = tuple(launch for launch in launches if launch is not None)
    return ready if len(ready) == len(launches) else None


class GroupDecoder:
    """Fills buffers with spans of one group's weights, and knows what they hold.

    Args:
        hold_key: the group's name in `scratch.held`; None: it is decoded into scratch memory.
    """

    def __init__(
        self,
        parts: Sequence[LinearPart],
        rows: Sequence[int],
        blocks: Sequence[tuple[int, int, LoraBlock]],
        scratch: Scratch,
        slot: str,
        hold_key: HoldKey | None = None,
    ) -> None:
        self._parts = parts
        self._rows = rows
        self._blocks = blocks
        self._width = parts[0].in_features
        self._scratch = scratch
        self._slot = slot
        self._hold_key, self._base = hold_key, BaseTensors(parts)
        self._launches: dict[object, tuple[Launch, ...]] = {}

    def decoded(self, span: Span, like: torch.Tensor, spare: int, *, is_backward: bool) -> Decoded:
        """[W | B ; A] of a span in the dtype of `like`, B scaled if `is_backward`, else A.

        Blocks with dropout have no A here: what they see of the input is not what the others see.
        """
        held = self._held(span, like, spare, is_backward=is_backward)
        if held is not None:
            return held
        scratch, dtype, device = self._scratch, like.dtype, like.device
        slot = self._slot if span.parts else "lora_a"
        height = span.last_row - span.first_row
        shape = (height + spare, self._width + spare)
        weights, borders = (id(self), span, shape, dtype), is_backward
        content: Any = scratch.content(slot)
        key = (slot, shape, height, dtype, device)
        if content is not None and content[0] == weights:
            views = scratch.view(
                key, lambda: _views(scratch.peek(slot, shape, dtype, device), height, spare)
            )
            if content[1] != borders:
                self._fill_borders(span, views.buffer, height, is_backward)
                scratch.label(slot, (weights, borders))
            return views
        scratch.label(slot, None)
        views = scratch.view(
            key, lambda: _views(scratch.get(slot, shape, dtype, device), height, spare)
        )
        self._fill(span, views.buffer, height, is_backward)
        scratch.label(slot, (weights, borders))
        return views

    def is_held_stale(self) -> bool:
        """True if the group's weights should be held, and those that are there are not these."""
        store = self._scratch.held
        if self._hold_key is None or not store.wants(self._hold_key):
            return False
        held = store.find(self._hold_key)
        return held is None or not self.is_current(held)

    def held_now(self) -> HeldGroup | None:
        """The buffer of the weights that are held; None if none are."""
        return None if self._hold_key is None else self._scratch.held.find(self._hold_key)

    def is_current(self, held: HeldGroup) -> bool:
        """True if the group's weights, as they are now, are what the buffer was filled with."""
        return held.signature is not None and held.signature.is_of(self._base.now())

    def _held(
        self, span: Span, like: torch.Tensor, spare: int, *, is_backward: bool
    ) -> Decoded | None:
        """As `decoded`, of a group that is held; None if it is not."""
        if self._hold_key is None or len(span.parts) != len(self._parts):
            return None
        store, height = self._scratch.held, span.last_row - span.first_row
        shape = (height + spare, self._width + spare)
        held: HeldGroup | None = store.group(
            self._hold_key, shape, like, lambda buffer: _views(buffer, height, spare)
        )
        if held is None:
            return None
        tensors = self._base.now()
        if held.signature is None or not held.signature.is_of(tensors):
            if is_recording(like):
                return None
            held.signature = None
            self._fill(span, held.buffer, height, is_backward)
            held.signature = Signature(tensors)
        elif held.borders != (store.passes, is_backward) and spare:
            self._fill_borders(span, held.buffer, height, is_backward)
        held.borders = (store.passes, is_backward)
        views: Decoded = held.views
        return views

    def _fill(self, span: Span, buffer: torch.Tensor, height: int, is_backward: bool) -> None:
        parts = [self._parts[index] for index in span.parts]
        # `.to()` may have moved what the parameters stand for
        key = (*self._border_key(span, buffer, is_backward), *addresses(self._base.now()))
        ready = self._launches.get(key)
        if ready is not None:
            for launch in ready:
                launch()
            return
        outs = []
        for index, part in zip(span.parts, parts, strict=True):
            first = self._rows[index] - span.first_row
            outs.append(buffer[first : first + part.out_features, : self._width])
        borders = self._borders(span, is_backward)
        launches: tuple[Launch | None, ...] = ()
        is_done = False
        kinds, weights = {part.kind for part in parts}, [part.weight for part in parts]
        if kinds == {"nf4"}:
            is_done, whole = nf4_group_(weights, outs, buffer, height, self._width, borders)
            launches = (whole,)
        if not is_done and kinds <= {"nf4", "int8", "dense"}:
            is_done, whole = mixed_group_(weights, outs, buffer, height, self._width, borders)
            launches = (whole,)
        if not is_done:
            decoding = decode_weights(parts, outs)
            launches = (None,) if decoding is None else decoding
            if buffer.shape[1] > self._width:
                launches = (*launches, lora_borders_(buffer, height, self._width, borders))
        self._keep(key, launches)

    def _fill_borders(
        self, span: Span, buffer: torch.Tensor, height: int, is_backward: bool
    ) -> None:
        key = self._border_key(span, buffer, is_backward)
        ready = self._launches.get(key)
        if ready is not None:
            ready[0]()
            return
        borders = self._borders(span, is_backward)
        self._keep(key, (lora_borders_(buffer, height, self._width, borders),))

    def _border_key(self, span: Span, buffer: torch.Tensor, is_backward: bool) -> tuple[Any, ...]:
        # an optimiser may have laid the adapters out anew
        pointers = [x.data_ptr() for _, _, block in self._blocks for x in (block.a, block.b)]
        return (span, buffer.data_ptr(), buffer.shape, buffer.dtype, is_backward, *pointers)

    def _keep(self, key: object, launches: tuple[Launch | None, ...]) -> None:
        """Keep what repeats a filling, if launches do all of it."""
        if len(self._launches) >= MOST_LAUNCHES:
            self._launches.clear()
        ready = tuple(launch for launch in launches if launch is not None)
        if len(ready) == len(launches):
            self._launches[key] = ready

    def _borders(self, span: Span, is_backward: bool) -> list[Border]:
        """Where the adapters stand beside and under the span's weight; all of them have an A."""
        borders = []
        for index, column, block in self._blocks:
            here = index in span.parts
            b = block.b.detach()
            borders.append(
                Border(
                    first_row=self._rows[index] - span.first_row if here else 0,
                    column=column,
                    a=block.a.detach(),
                    b=b if here else b[:0],
                    scale=block.scaling if is_backward else 1.0,
                    has_a=not block.dropout,
                    a_scale=1.0 if is_backward else block.scaling,
                )
            )
        return borders


def _views(buffer: torch.Tensor, height: int, spare: int) -> Decoded:
    width = buffer.shape[1] - spare
    a = buffer[height:, :width]
    return Decoded(
        buffer=buffer,
        beside_b=buffer[:height].t(),
        above_a=buffer[:, :width],
        alone=buffer[:height, :width],
        b=buffer[:height, width:],
        a=a,
        a_transposed=a.t(),
    )
