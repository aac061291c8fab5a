"""The buffer [gate | up | spare] that gate_proj and up_proj write to in one GEMM.

Its spare columns have room for the LoRA products of gate and up, whose gradients take the places of
gate and up, and for those of down_proj, whose input may take the place of up.
"""

from __future__ import annotations

import torch

from colab_qlora.layers.layer_parts import LayerParts
from colab_qlora.layers.scratch import new_rows


def buffer_width(parts: LayerParts, like: torch.Tensor) -> int:
    """Columns of the buffer on the device of `like`."""
    spare = max(g.spare_columns(like.device) for g in (parts.gate_up, parts.down))
    return parts.gate_up.out_features + spare


def new_buffer(like: torch.Tensor, parts: LayerParts) -> torch.Tensor:
    """For the tokens of `like`; no scratch, since the attention half needs the memory too."""
    return new_rows(like, (like.shape[0], buffer_width(parts, like)))


def halves(buffer: torch.Tensor, parts: LayerParts) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up, (tokens, width) each, as columns of the buffer."""
    width = parts.down.in_features
    return buffer[:, :width], buffer[:, width : 2 * width]


def whole_buffer(
    gate: torch.Tensor | None, up: torch.Tensor | None, width: int
) -> torch.Tensor | None:
    """The buffer that both are columns of, if it is still one; a store may have moved them."""
    if gate is None or up is None:
        return None
    together = (
        gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        and gate.stride() == up.stride() == (width, 1)
        and up.storage_offset() == gate.storage_offset() + gate.shape[1]
    )
    if not together:
        return None
    return gate.as_strided((gate.shape[0], width), (width, 1), gate.storage_offset())
