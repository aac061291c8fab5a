"""Many small parameters as views of one tensor, so that one launch reaches all of them.

    values    [ A of layer 0 | B of layer 0 | gap | A of layer 1 | ... ]     one dtype, one device
    gradient  [ its gradient | its gradient | gap | its gradient | ... ]     the same layout

A QLoRA model has hundreds of adapter matrices. An optimiser that goes from one to the next spends
its time on launching kernels; here every parameter is a view of `values`, and what is done to
`values` is done to all. Each tensor starts at a multiple of 256 numbers: 8-bit AdamW quantises in
blocks of 256, so no block spans two tensors, and every view is aligned for vector loads. Gaps begin
as zero, and so is the gradient there. They stay zero, but for the 8-bit rounding of bitsandbytes on
the CPU, which moves a zero by 2e-5 of its block's largest number; nothing reads a gap.

Memory: the parameters as before, plus the gaps. The gradient tensor exists from `gather` until the
gradients are dropped, so a forward and backward pass meets no more memory than without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

# bitsandbytes' blocks are 256 numbers; a view at such a start is 16-byte aligned in any dtype
ALIGNMENT = 256


class Slot(NamedTuple):
    """Where a parameter lies in the flat tensor; `end` counts the gap behind it."""

    start: int
    numbers: int
    end: int
    shape: torch.Size
    stride: tuple[int, ...]


class FlatParameters:
    """Parameters of one dtype and one device, re-pointed to views of one tensor.

    Args:
        parameters: at least one. Their values, shapes and identities are kept; only the memory
            that `.data` points to is another one, contiguous.

    Attributes:
        values: (numbers,) all parameters and the gaps.
        gradient: (numbers,) their gradients, or None while nobody needs them in one piece.
        slots: one for each parameter.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = list(parameters)
        self.slots = _slots(self.parameters)
        first = self.parameters[0]
        self.values = torch.zeros(self.slots[-1].end, dtype=first.dtype, device=first.device)
        self.gradient: Tensor | None = None
        self._gradient_views: list[Tensor] = []
        self._gradient_addresses: list[int] = []
        self._is_attached = False
        views = self.views_of(self.values)
        for view, parameter in zip(views, self.parameters, strict=True):
            view.copy_(parameter.detach())
        # only now, when nothing can fail any more
        for view, parameter in zip(views, self.parameters, strict=True):
            parameter.data = view

    def views_of(self, flat: Tensor) -> list[Tensor]:
        """Views of a (numbers,) tensor of this layout, in the parameters' shapes."""
        return [flat.as_strided(slot.shape, slot.stride, slot.start) for slot in self.slots]

    def gather(self) -> list[bool]:
        """Bring all gradients into `gradient` and point every `.grad` there.

        Gradients that are views of it already are left alone, others are copied in (a few launches
        for all), and the place of a parameter without one is zero.

        Returns:
            For each parameter whether it has a gradient; `gradient` is a tensor if any has.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        has_gradient = [gradient is not None for gradient in gradients]
        if not any(has_gradient):
            self.release()
            return has_gradient
        is_new = self.gradient is None
        if is_new:
            self._hold(torch.zeros_like(self.values))
        strangers = {
            index: gradient
            for index, gradient in enumerate(gradients)
            if gradient is not None and gradient.data_ptr() != self._gradient_addresses[index]
        }
        views = self._gradient_views
        if strangers:
            torch._foreach_copy_([views[i] for i in strangers], list(strangers.values()))
            for index in strangers:
                self.parameters[index].grad = views[index]
        absent = [views[i] for i, has in enumerate(has_gradient) if not has]
        if absent and not is_new:
            torch._foreach_zero_(absent)
        return has_gradient

    def attach(self) -> None:
        """Point every `.grad` to its view of a zero `gradient`, where autograd adds in place."""
        if self.gradient is None:
            self._hold(torch.zeros_like(self.values))
        else:
            self.gradient.zero_()
        for parameter, view in zip(self.parameters, self._gradient_views, strict=True):
            if parameter.requires_grad:
                parameter.grad = view
        self._is_attached = True

    def release(self, *, keep_attached: bool = False) -> None:
        """Let go of `gradient`; its memory is free once no `.grad` points to it."""
        if keep_attached and self._is_attached:
            return
        self.gradient = None
        self._gradient_views, self._gradient_addresses = [], []
        self._is_attached = False

    def spans(self, keys: Sequence[int | None]) -> Iterator[tuple[int, int, int]]:
        """Runs of neighbouring parameters with the same key, as (start, end, key).

        Args:
            keys: one for each parameter; a parameter whose key is None is in no run.
        """
        start = 0
        pairs = zip(self.slots, keys, strict=True)
        for key, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
            end = list(run)[-1][0].end
            if key is not None and end > start:
                yield start, end, key
            start = end

    def _hold(self, gradient: Tensor) -> None:
        self.gradient = gradient
        self._gradient_views = self.views_of(gradient)
        self._gradient_addresses = [view.data_ptr() for view in self._gradient_views]


def _slots(parameters: Sequence[Parameter]) -> list[Slot]:
    slots, start = [], 0
    for parameter in parameters:
        numbers, shape = parameter.numel(), parameter.shape
        end = start + -(-numbers // ALIGNMENT) * ALIGNMENT
        # the stride of a contiguous tensor of that shape, whatever the parameter's own
        stride = torch.empty(shape, device="meta").stride()
        slots.append(Slot(start, numbers, end, shape, stride))
        start = end
    return slots
