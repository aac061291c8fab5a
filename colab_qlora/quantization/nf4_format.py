"""From codes and scales to a 4-bit weight of bitsandbytes, laid out byte by byte as its own.

    packed[i] = 16 * q[2 i] + q[2 i + 1]                    an odd weight's last half byte is a zero
    absmax[b] = nested_code[level[b]] * nested_absmax[b // 256] + offset        if double-quantised

bitsandbytes quantises absmax around its mean, `offset`, in blocks of 256 whose largest magnitude is
`nested_absmax`. Which of the 256 levels a block gets is free: every choice decodes alike. So the
search can choose levels by the error of the weights instead of that of absmax.

Bytes a weight: 0.5 packed; for blocks of 64, 0.0625 of absmax, or 0.0159 if double-quantised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.models.quiet_import import import_bitsandbytes

BLOCKSIZES = (32, 64)
NESTED_BLOCKSIZE = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# bitsandbytes fills the last byte of an odd weight with the code of 0.0
_ZERO_CODE = 7

# codes packed at a time, so that what is copied on the way stays below 64 MiB; even
_CHUNK_CODES = 1 << 25


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """Absmax in 8 bits, as bitsandbytes double-quantises it.

    Attributes:
        levels: uint8, (blocks,), an index into `code` for every absmax.
        code: float32, (256,), ascending.
        absmax: float32, one for every 256 levels.
        offset: float32, without dimensions.
    """

    levels: torch.Tensor
    code: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor

    def decode(self, levels: torch.Tensor) -> torch.Tensor:
        """float32: the absmax that levels (blocks, any number) stand for, as it will be decoded."""
        spread = self.absmax.repeat_interleave(NESTED_BLOCKSIZE)[: levels.shape[0], None]
        # two roundings, as in bitsandbytes: a product, then a sum
        return (self.code[levels.int()] * spread).add_(self.offset)

    def largest(self) -> torch.Tensor:
        """float32, (blocks,): the absmax of the highest level."""
        return self.decode(torch.full_like(self.levels, 255)[:, None]).squeeze(1)

    def levels_around(self, absmax: torch.Tensor) -> torch.Tensor:
        """uint8, (blocks, 4): each block's own level; the nearest to `absmax`, and those beside it.

        Args:
            absmax: float32, (blocks,), wanted.
        """
        spread = self.absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
        # where all 256 are alike, every level decodes to the offset
        wanted = (absmax - self.offset) / spread.clamp(min=torch.finfo(torch.float32).tiny)
        nearest = torch.bucketize(wanted, (self.code[1:] + self.code[:-1]) / 2, out_int32=True)
        around = [(nearest + step).clamp_(0, 255) for step in (0, -1, 1)]
        return torch.stack([self.levels, *[level.to(torch.uint8) for level in around]], dim=1)

    def with_levels(self, levels: torch.Tensor) -> NestedAbsmax:
        """The same with other levels, uint8, (blocks,)."""
        return NestedAbsmax(levels, self.code, self.absmax, self.offset)


def nest_absmax(absmax: torch.Tensor) -> NestedAbsmax:
    """Double-quantise absmax, float32, (blocks,), with bitsandbytes' own code."""
    offset = absmax.mean()
    quantize = import_bitsandbytes().functional.quantize_blockwise
    levels, state = quantize(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return NestedAbsmax(levels, state.code, state.absmax, offset)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8, (half as many, rounded up, 1): two codes a byte, the first in the high half.

    Args:
        codes: uint8, (weights,), each below 16.
    """
    packed = codes.new_empty((codes.numel() + 1) // 2, 1)
    for first in range(0, codes.numel(), _CHUNK_CODES):
        chunk = codes[first : first + _CHUNK_CODES]
        out = packed[first // 2 : (first + chunk.numel() + 1) // 2, 0]
        out.copy_(chunk[::2]).mul_(16)
        out[: chunk.numel() // 2].bitwise_or_(chunk[1::2])
        if chunk.numel() % 2:
            out[-1:].bitwise_or_(_ZERO_CODE)
    return packed


def nf4_weight(
    codes: torch.Tensor,
    absmax: torch.Tensor | NestedAbsmax,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    blocksize: int = 64,
) -> Any:
    """A bitsandbytes `Params4bit`, quantised and frozen, that decodes to code * absmax.

    Args:
        codes: uint8, (weights,), each below 16, on any device.
        absmax: one for every `blocksize` weights of the flat weight, the last block may be short:
            float32, (blocks,), kept as it is; or double-quantised already, by `nest_absmax`.
        shape: of the weight.
        dtype: that bitsandbytes decodes to: float16, bfloat16 or float32.
        blocksize: 32 or 64.

    Raises:
        UserError: sizes, dtypes or the blocksize do not fit.
    """
    nested = absmax if isinstance(absmax, NestedAbsmax) else None
    values = absmax.levels if isinstance(absmax, NestedAbsmax) else absmax
    _check_fit(codes, values, nested is not None, torch.Size(shape), dtype, blocksize)
    bitsandbytes = import_bitsandbytes()
    functional = bitsandbytes.functional
    state2 = None
    if nested is not None:
        state2 = functional.QuantState(
            absmax=nested.absmax,
            code=nested.code,
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
    state = functional.QuantState(
        absmax=values,
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=blocksize,
        code=functional.get_4bit_type("nf4", device=codes.device),
        quant_type="nf4",
        offset=None if nested is None else nested.offset,
        state2=state2,
    )
    return quantised_parameter(pack_codes(codes), state)


def quantised_parameter(packed: torch.Tensor, state: Any) -> Any:
    """The `Params4bit` of packed codes, uint8, (bytes, 1), and their `QuantState`."""
    return import_bitsandbytes().nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        bnb_quantized=True,
    )


def check_blocksize(blocksize: int) -> None:
    """Raise UserError unless blocks of this many weights are made here."""
    if blocksize not in BLOCKSIZES:
        raise UserError("blocksize is not understood", got=blocksize, allowed="32 or 64")


def _check_fit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    is_nested: bool,
    shape: torch.Size,
    dtype: torch.dtype,
    blocksize: int,
) -> None:
    check_blocksize(blocksize)
    if dtype not in DTYPES:
        allowed = "float16, bfloat16 or float32"
        raise UserError("bitsandbytes decodes to no such dtype", got=dtype, allowed=allowed)
    weights = shape.numel()
    blocks = -(-weights // blocksize)
    if codes.dtype != torch.uint8 or codes.shape != (weights,):
        got = f"{codes.dtype}, shape {tuple(codes.shape)}"
        allowed = f"torch.uint8, shape ({weights},)"
        raise UserError(f"codes do not fit a weight {tuple(shape)}", got=got, allowed=allowed)
    kind = torch.uint8 if is_nested else torch.float32
    if absmax.dtype != kind or absmax.shape != (blocks,) or absmax.device != codes.device:
        got = f"{absmax.dtype}, shape {tuple(absmax.shape)} on {absmax.device}"
        allowed = f"{kind}, shape ({blocks},) on {codes.device}"
        raise UserError(f"absmax does not fit blocks of {blocksize}", got=got, allowed=allowed)
