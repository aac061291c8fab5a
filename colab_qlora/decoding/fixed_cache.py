"""A key-value cache of a fixed number of places, in buffers that never move.

transformers' own static cache counts its places in every layer; this one reads the place of the
next token from one tensor that all layers share, and takes a prompt as the empty dynamic cache
does: the prompt attends to itself by the fastest kernel, not to all places through a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache


class FixedCache(Cache):
    """Keys and values of `length` places a layer, (batch, heads, length, head width).

    Args:
        length: places, in tokens.
        slot: int64, (1,), on the model's device: the place of the token that is decoded next.

    Attributes:
        takes_prompt: what comes is a prompt from place 0 on, and sees itself alone; else one token
            for place `slot`, and it gets all places, which a mask has to choose from.
    """

    is_compileable = False

    def __init__(self, length: int, slot: torch.Tensor) -> None:
        # the parent's would make layers of transformers' own; all that models ask is answered here
        self.layers = []
        self.length, self.slot = length, slot
        self.takes_prompt = True
        self._stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, and return those that the queries may attend to.

        Args:
            key_states, value_states: (batch, heads, tokens, head width).
            layer_idx: the layer's number.
        """
        if layer_idx not in self._stored:
            self._stored[layer_idx] = self._zeros(key_states), self._zeros(value_states)
        keys, values = self._stored[layer_idx]
        if self.takes_prompt:
            keys[:, :, : key_states.shape[2]].copy_(key_states)
            values[:, :, : value_states.shape[2]].copy_(value_states)
            return key_states, value_states
        keys.index_copy_(2, self.slot, key_states)
        values.index_copy_(2, self.slot, value_states)
        return keys, values

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        batch, heads, _, width = like.shape
        return like.new_zeros(batch, heads, self.length, width)

    def clear(self) -> None:
        """Zeros everywhere: a mask does not hide what is not finite."""
        for pair in self._stored.values():
            for stored in pair:
                stored.zero_()

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys, once a prompt was there."""
        return self._stored[0][0].dtype

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # asked while a prompt's mask is made; a token comes with positions and a mask of its own
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.length
