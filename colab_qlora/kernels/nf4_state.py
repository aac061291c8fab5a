"""What decoding a 4-bit weight of bitsandbytes (NF4) needs, read from it and checked.

A `Params4bit` holds flat bytes; all else stands in its quant_state, and in the quant_state of that
one's absmax where it is double-quantised. The formula is in `nf4.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.errors import UserError


@dataclass(frozen=True, eq=False)
class NF4State:
    """What decoding a weight needs; views of the weight's own tensors, nothing is copied.

    Attributes:
        packed: uint8, flat, two codes a byte.
        code: the 16 levels, float32.
        absmax: one a block; uint8 if double-quantised, otherwise float32.
        blocksize: weights that share one absmax, a power of 2 from 32 to 4096.
        shape: (rows, columns) of the weight.
        dtype: what bitsandbytes decodes to.
        nested_absmax: one a block of absmax values, float32; None if not double-quantised.
        nested_code: the 256 levels of absmax, float32; None likewise.
        nested_blocksize: absmax values that share one nested absmax; 0 likewise.
        offset: what was subtracted from every absmax, a tensor without dimensions; None likewise.
    """

    packed: torch.Tensor
    code: torch.Tensor
    absmax: torch.Tensor
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_blocksize: int = 0
    offset: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.packed.device


def nf4_state(weight: Any) -> NF4State:
    """What decoding needs of a bitsandbytes `Params4bit`; a few attribute reads, nothing copied.

    Raises:
        UserError: not a Params4bit; not quantised yet; of another 4-bit type; repacked by
            bitsandbytes for inference on a CPU; or only a part of a weight.
    """
    state = getattr(weight, "quant_state", None) if isinstance(weight, torch.Tensor) else None
    if state is None:
        raise _not_quantised(weight)
    _check_layout(state)
    packed = weight.data.reshape(-1).view(torch.uint8)
    shape, nested = state.shape, state.state2
    weights = shape.numel()
    if (
        len(shape) != 2
        or 2 * packed.numel() < weights
        or state.absmax.numel() * state.blocksize < weights
    ):
        raise UserError(
            "the 4-bit weight does not fit its quant_state",
            got=f"{packed.numel()} bytes, {state.absmax.numel()} absmax values, {tuple(shape)}",
            allowed=f"a matrix, half a byte a weight, an absmax for {state.blocksize} weights",
        )
    if nested is None:
        return NF4State(
            packed, state.code, state.absmax, state.blocksize, tuple(shape), state.dtype
        )
    return NF4State(
        packed=packed,
        code=state.code,
        absmax=state.absmax,
        blocksize=state.blocksize,
        shape=tuple(shape),
        dtype=state.dtype,
        nested_absmax=nested.absmax,
        nested_code=nested.code,
        nested_blocksize=nested.blocksize,
        offset=state.offset,
    )


def _not_quantised(weight: Any) -> UserError:
    got = f"{type(weight).__name__}, {getattr(weight, 'dtype', 'no dtype')}"
    if hasattr(weight, "bnb_quantized"):
        do = "Move its layer with .to(device), which quantises it"
        return UserError("the weight is not quantised yet", got=got, do=do)
    allowed = "bitsandbytes.nn.Params4bit"
    return UserError("the weight is not a 4-bit weight of bitsandbytes", got=got, allowed=allowed)


def _check_layout(state: Any) -> None:
    if getattr(state, "packing_format_for_cpu", False):
        raise UserError(
            "bitsandbytes has repacked the weight for inference on this CPU",
            got=f"packing_format_for_cpu, shape {tuple(state.shape)}",
            allowed="the layout that is trained and saved",
            do="Load the model again and call keep_weights_in_place(model) before it generates",
        )
    if state.quant_type != "nf4":
        raise UserError(
            "the weight is quantised to another 4-bit type",
            got=f"quant_type {state.quant_type!r}",
            allowed="'nf4'",
            do="Load the model with bnb_4bit_quant_type='nf4'",
        )
