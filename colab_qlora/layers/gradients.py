"""Gradients of parameters while a backward pass collects them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Gradients:
    """Gradients of parameters, summed when a parameter gets several."""

    def __init__(self) -> None:
        self._by_id: dict[int, torch.Tensor] = {}

    def add(self, parameter: torch.nn.Parameter, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            return
        have = self._by_id.get(id(parameter))
        self._by_id[id(parameter)] = gradient if have is None else have + gradient

    def add_all(
        self,
        parameters: Sequence[torch.nn.Parameter],
        gradients: Sequence[torch.Tensor | None],
    ) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            self.add(parameter, gradient)

    def of(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        return self._by_id.get(id(parameter))
