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
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
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
        self._has_gaps = any(slot.end - slot.start > slot.numbers for slot in self.slots)
        self._gradient_views: list[Tensor] = []
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

    def gather(self, *, points_grads: bool = True) -> list[bool]:
        """Bring all gradients into `gradient`.

        Gradients that are views of it already are left alone, others are copied in (a few launches
        for all), and the place of a parameter without one is zero.

        Args:
            points_grads: point every `.grad` to its place there, so that what is done to `gradient`
                is done to them. Without it they may stay where they are, which saves hundreds of
                views.

        Returns:
            For each parameter whether it has a gradient; `gradient` is a tensor if any has.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        has_gradient = [gradient is not None for gradient in gradients]
        present = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]
        if not present:
            self.release()
        elif self.gradient is None:
            if self._has_gaps or len(present) < len(gradients):
                self._hold(torch.zeros_like(self.values))
                self._take_over(present, points_grads=points_grads)
            else:
                self._hold(_flatten_dense_tensors(gradients))
                if points_grads:
                    self._point(range(len(gradients)))
        else:
            first, size = self.gradient.data_ptr(), self.gradient.element_size()
            places = [first + size * slot.start for slot in self.slots]
            strangers = [(i, found) for i, found in present if found.data_ptr() != places[i]]
            # pointed in any case, so that attached gradients stay attached
            self._take_over(strangers, points_grads=True)
            if len(present) < len(gradients):
                pairs = zip(self._views(), has_gradient, strict=True)
                torch._foreach_zero_([view for view, has in pairs if not has])
        return has_gradient

    def _take_over(self, gradients: list[tuple[int, Tensor]], *, points_grads: bool) -> None:
        """Copy gradients of parameters at these places into `gradient`."""
        if not gradients:
            return
        places, found = zip(*gradients, strict=True)
        views = self._views()
        torch._foreach_copy_([views[index] for index in places], list(found))
        if points_grads:
            self._point(places)

    def _point(self, places: Iterable[int]) -> None:
        views = self._views()
        for index in places:
            self.parameters[index].grad = views[index]

    def attach(self) -> None:
        """Point every `.grad` to its view of a zero `gradient`, where autograd adds in place."""
        if self.gradient is None:
            self._hold(torch.zeros_like(self.values))
        else:
            self.gradient.zero_()
        for parameter, view in zip(self.parameters, self._views(), strict=True):
            if parameter.requires_grad:
                parameter.grad = view
        self._is_attached = True

    def release(self, *, keep_attached: bool = False) -> None:
        """Let go of `gradient`; its memory is free once no `.grad` points to it."""
        if keep_attached and self._is_attached:
            return
        self.gradient = None
        self._gradient_views = []
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
        self._gradient_views = []

    def _views(self) -> list[Tensor]:
        """Views of `gradient`, made when first asked for: hundreds of them take the host long."""
        if not self._gradient_views:
            assert self.gradient is not None
            self._gradient_views = self.views_of(self.gradient)
        return self._gradient_views


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
