"""Where recorded layers write the gradients of their parameters: in a row, copied out together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

Gradients = list[torch.Tensor | None]


@dataclass
class GradientRows:
    """Buffers that layers write their gradients to; each layer overwrites them.

    Attributes:
        buffers: one for each dtype and device.
    """

    buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = field(default_factory=dict)

    def get(self, dtype: torch.dtype, numbers: int, device: torch.device) -> torch.Tensor:
        """So many numbers. A larger request gets a new buffer; whoever has the old one keeps it."""
        held = self.buffers.get((dtype, device))
        if held is None or held.numel() < numbers:
            held = torch.empty(numbers, dtype=dtype, device=device)
            self.buffers[dtype, device] = held
        return held[:numbers]


class GradientLayout:
    """Where each parameter's gradient lies in the shared rows."""

    def __init__(self, parameters: list[torch.nn.Parameter], rows: GradientRows) -> None:
        self._by_dtype: dict[torch.dtype, list[int]] = {}
        for index, parameter in enumerate(parameters):
            self._by_dtype.setdefault(parameter.dtype, []).append(index)
        self._shapes = [parameter.shape for parameter in parameters]
        self._sizes: dict[torch.dtype, list[int]] = {}
        self._row: dict[torch.dtype, torch.Tensor] = {}
        self._has = [True] * len(parameters)
        for dtype, indices in self._by_dtype.items():
            self._sizes[dtype] = [parameters[index].numel() for index in indices]
            device = parameters[indices[0]].device
            self._row[dtype] = rows.get(dtype, sum(self._sizes[dtype]), device)

    def write(self, gradients: Gradients) -> None:
        """Copy gradients to their places."""
        self._has = [gradient is not None for gradient in gradients]
        for dtype, indices in self._by_dtype.items():
            places = self._row[dtype].split(self._sizes[dtype])
            pairs = [
                (place.view(gradient.shape), gradient)
                for place, index in zip(places, indices, strict=True)
                if (gradient := gradients[index]) is not None
            ]
            if pairs:
                torch._foreach_copy_([p for p, _ in pairs], [g for _, g in pairs])

    def taken(self) -> Gradients:
        """The gradients as tensors of the caller's own."""
        found: Gradients = [None] * len(self._shapes)
        for dtype, indices in self._by_dtype.items():
            pieces = self._row[dtype].clone().split(self._sizes[dtype])
            for piece, index in zip(pieces, indices, strict=True):
                if self._has[index]:
                    found[index] = piece.view(self._shapes[index])
        return found
