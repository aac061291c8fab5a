"""Tensors of all tokens of a batch, from and in pieces of a few tokens."""

from __future__ import annotations

import torch


def part_of(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some rows; the tensor itself if that is all of them, which saves the host a view."""
    return tensor if rows.start == 0 and rows.stop == tensor.shape[0] else tensor[rows]


class Pieces:
    """Collects as one tensor each, of what a plan names, what comes chunk by chunk."""

    def __init__(self, plan: frozenset[str], tokens: int) -> None:
        self._plan = plan
        self._tokens = tokens
        self.whole: dict[str, torch.Tensor] = {}

    def put(self, name: str, rows: slice, tensor: torch.Tensor) -> None:
        if name not in self._plan:
            return
        if name not in self.whole:
            self.whole[name] = tensor.new_empty((self._tokens, *tensor.shape[1:]))
        part_of(self.whole[name], rows).copy_(tensor)
