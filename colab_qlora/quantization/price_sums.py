"""Sums over micro-batches from which the price of a weight on a rung is made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from colab_qlora.quantization.first_order import both, steepness
from colab_qlora.quantization.module_use import Change, Use
from colab_qlora.quantization.rung_prices import RungPrice


class PriceSums:
    """Adds up changes by weight and rung; all of it stays on the device until a price is asked for.

    Args:
        loss_scale: what the loss was multiplied by. Sums are divided by it, since gradients would
            underflow in float16.

    Attributes:
        tokens: how many were counted, by weight.
    """

    def __init__(self, loss_scale: float = 1.0) -> None:
        self.tokens: dict[str, torch.Tensor | int] = {}
        self._loss_scale = loss_scale
        # by weight and rung, then by micro-batch
        self._changes: dict[tuple[str, str], dict[int, torch.Tensor]] = defaultdict(dict)
        self._guards: dict[tuple[str, str], torch.Tensor] = {}
        self._squares: dict[tuple[str, str], torch.Tensor] = {}

    def add(self, name: str, uses: Iterable[Use], changes: Iterable[Change]) -> None:
        """Add uses of a weight, each with all of its rungs."""
        steep = {}
        for use in uses:
            steep[id(use)] = steepness(use.gradient)
            self.tokens[name] = self.tokens.get(name, 0) + use.tokens
        for rung, use, rows, squares in changes:
            key, rows = (name, rung), rows / self._loss_scale
            before = self._changes[key].get(use.batch)
            # a tied tensor has one change: that of all its uses
            self._changes[key][use.batch] = rows if before is None else both(before, rows)
            for sums, value in (
                (self._guards, (steep[id(use)] * squares).sum() / self._loss_scale**2),
                (self._squares, squares.sum()),
            ):
                sums[key] = sums[key] + value if key in sums else value

    def price(self, name: str, rung: str) -> RungPrice:
        """0 for a rung without an error."""
        key = name, rung
        if key not in self._changes:
            return RungPrice()
        changes = tuple(tuple(rows.tolist()) for _, rows in sorted(self._changes[key].items()))
        guard = float(self._guards[key]) / len(changes)
        return RungPrice(changes, guard, float(self._squares[key]) / int(self.tokens[name]))
