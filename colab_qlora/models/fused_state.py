"""What the fused layers of one model share: scratch memory, the batch's shape, and settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from colab_qlora.kernels.attention import AttentionShape
from colab_qlora.layers.saved import KEEP_ALL, KEEP_INPUT
from colab_qlora.layers.scratch import Scratch
from colab_qlora.models.documents import documents_of, is_stand_in

ATTRIBUTE = "colab_qlora_fused"


@dataclass(eq=False)
class FusedState:
    """Shared by the swapped modules of one model.

    Attributes:
        plan: names of what every layer keeps; None follows the layer's gradient_checkpointing
            flag: all tensors without it, the layer's input with it.
        mlp_tokens: token chunk of the MLP half, or None for the whole batch.
        max_weight_bytes: decode at most this much of a group of weights at a time.
        holds_gate_up: decode gate and up once per backward pass, at the price of their buffer.
        last_shape: what the attention of the present batch is computed over.
        stock_passes: reasons why layers ran the model's own code, and how often; generation with a
            key-value cache does not count.
    """

    scratch: Scratch = field(default_factory=Scratch)
    plan: frozenset[str] | None = None
    mlp_tokens: int | None = None
    max_weight_bytes: int | None = None
    holds_gate_up: bool = True
    stock_passes: dict[str, int] = field(default_factory=dict)
    _shape_key: Any = None
    last_shape: AttentionShape | None = None
    _mask: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to the present batch."""
        return {**vars(self), "last_shape": None, "_shape_key": None, "_mask": None}

    def plan_for(self, layer: Any) -> frozenset[str]:
        if self.plan is not None:
            return self.plan
        return KEEP_INPUT if getattr(layer, "gradient_checkpointing", False) else KEEP_ALL

    def attention_shape(
        self,
        lead: tuple[int, ...],
        heads: tuple[int, int, int],
        scale: float,
        mask: torch.Tensor | None,
        window: int | None,
    ) -> AttentionShape:
        """The shape of this batch; one object for all layers of a pass, which share its masks."""
        key = (lead, heads, scale, window)
        if self.last_shape is None or self._shape_key != key or self._mask is not mask:
            self.last_shape = self._new_shape(lead, heads, scale, mask, window)
            self._shape_key, self._mask = key, mask
        return self.last_shape

    def new_batch(self) -> None:
        """Let the last batch's shape and masks go."""
        self.last_shape, self._shape_key, self._mask = None, None, None

    def _new_shape(
        self,
        lead: tuple[int, ...],
        heads: tuple[int, int, int],
        scale: float,
        mask: torch.Tensor | None,
        window: int | None,
    ) -> AttentionShape:
        batch, length = lead
        documents = documents_of(mask)
        if documents is not None:
            return AttentionShape(
                batch,
                length,
                *heads,
                scale,
                window=window,
                cu_seqlens=documents.cu_seqlens,
                documents=documents.bounds,
                max_seqlen=documents.longest,
            )
        if is_stand_in(mask):
            mask = None
        if mask is not None:
            mask = mask.expand(batch, mask.shape[1], length, length)
        return AttentionShape(batch, length, *heads, scale, mask=mask, window=window)


def fused_state(module: Any) -> FusedState | None:
    """The state of a swapped module, or None."""
    found = module.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, FusedState) else None
