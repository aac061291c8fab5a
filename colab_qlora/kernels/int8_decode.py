"""Decode an int8 weight with one scale a row in one launch, into rows of any stride.

    w[row, column] = codes[row, column] * (absmax[row] / 127)

The scale is a correctly rounded float32 quotient, the product is rounded to float32 and then to the
dtype asked for: bit by bit what `quantization/int8_weight.py` computes, on every device.

Bytes moved a weight of half precision: 1 in and 2 out; the scales are 4 bytes a row.

Eight codes are one 64-bit word and eight half values one 16-byte store. Rows that do not hold whole
words, and buffers whose rows do not begin at multiples of eight values, go byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import runs_triton, tl, triton
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase
from colab_qlora.kernels.launch import Launch, start_repeatable
from colab_qlora.kernels.misfit import check_out

# units for each of a program's 128 threads: 4 words hide the latency of the loads, as in nf4.py,
# and 8 bytes with a division each take no more registers
WORD_CODES = 8
PROGRAM_UNITS = {WORD_CODES: 512, 1: 1024}

# codes that the reference decodes at a time, about: 4 MB of float32 stay in a CPU's cache
CHUNK_CODES = 1 << 20


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """Codes and scales of a weight; the tensors of its module, nothing is copied.

    Attributes:
        codes: int8, contiguous, shape (rows, columns).
        absmax: the rows' largest absolute values, float32, contiguous, shape (rows,), on the
            codes' device.

    Raises:
        UserError: tensors of another kind.
    """

    codes: torch.Tensor
    absmax: torch.Tensor

    def __post_init__(self) -> None:
        codes, absmax = self.codes, self.absmax
        fits = (
            codes.ndim == 2
            and codes.dtype == torch.int8
            and absmax.shape == codes.shape[:1]
            and absmax.dtype == torch.float32
            and absmax.device == codes.device
            and codes.is_contiguous()
            and absmax.is_contiguous()
        )
        if not fits:
            got = f"{codes.dtype} {tuple(codes.shape)} on {codes.device}"
            raise UserError(
                "codes and absmax are no int8 weight",
                got=f"{got} and {absmax.dtype} {tuple(absmax.shape)} on {absmax.device}",
                allowed="contiguous int8 (rows, columns) and float32 (rows,) on one device",
            )

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def rows(self, part: slice) -> Int8Weight:
        """Some of the rows, as views."""
        return Int8Weight(self.codes[part], self.absmax[part])


@triton.jit
def decode_int8_program(
    program, codes, absmax, out, units, row_units, row_stride_units,
    CODES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """CODES stand in a unit, a byte or a word; a row holds row_units of them."""
    first = program.to(tl.int64) * UNITS
    unit = tl.arange(0, UNITS)  # [UNITS]
    lane = tl.arange(0, CODES)[None, :]  # [1, CODES]
    is_unit = first + unit < units
    bits = tl.load(codes + first + unit, mask=is_unit, other=0)
    # one division of 64 bits a program, and one of 32 bits a unit
    first_row = first // row_units
    step = unit + (first - first_row * row_units).to(tl.int32)
    row = step // row_units
    # "/" is an approximation on a GPU
    scale = tl.div_rn(tl.load(absmax + first_row + row, mask=is_unit, other=0.0), 127.0)
    code = (bits[:, None] >> (8 * lane)).to(tl.int8)  # [UNITS, CODES]
    value = code.to(tl.float32) * scale[:, None]
    start = (first_row + row) * row_stride_units + (step - row * row_units)
    place = start[:, None] * CODES + lane
    tl.store(out + place, value.to(out.dtype.element_ty), mask=is_unit[:, None])


# sizes differ from weight to weight, and nothing is gained by knowing what divides them; the
# alignment of `codes`: see nf4.py on `packed`
@triton.jit(
    do_not_specialize=["units", "row_units", "row_stride_units"],
    do_not_specialize_on_alignment=["codes"],
)
def _decode_kernel(
    codes, absmax, out, units, row_units, row_stride_units,
    CODES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    decode_int8_program(
        tl.program_id(0), codes, absmax, out, units, row_units, row_stride_units, CODES, UNITS
    )


def int8_units(weight: Int8Weight, out: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The codes as the kernel reads them, and how many of them are a unit."""
    codes, width = weight.codes.detach(), weight.shape[1]
    fits = width % WORD_CODES == 0 and out.stride(0) % WORD_CODES == 0
    # torch views words by their place in the storage, the GPU loads them by their address
    if fits and codes.storage_offset() % WORD_CODES == codes.data_ptr() % WORD_CODES == 0:
        return codes.view(torch.int64), WORD_CODES
    return codes, 1


def _launch(weight: Int8Weight, out: torch.Tensor) -> Launch | None:
    units, codes = int8_units(weight, out)
    numbers = (units.numel(), units.shape[1], out.stride(0) // codes)
    arguments = (units, weight.absmax, out, *numbers, codes, PROGRAM_UNITS[codes])
    # rounded up; on the host triton.cdiv takes 1.5 us a call
    grid = (-(-units.numel() // PROGRAM_UNITS[codes]),)
    return start_repeatable(_decode_kernel, grid, arguments)


def row_scales(absmax: torch.Tensor) -> torch.Tensor:
    """absmax / 127, float32, the same bits on every device.

    On a GPU torch divides by a Python number by multiplying with its reciprocal, which rounds
    otherwise; by a tensor it divides.
    """
    scales: torch.Tensor = absmax.float() / torch.full((), 127.0, device=absmax.device)
    return scales


@torch.no_grad()
def int8_decode_reference_(weight: Int8Weight, out: torch.Tensor) -> None:
    """`int8_decode_` in torch, a few rows at a time."""
    scales = row_scales(weight.absmax)
    step = max(1, CHUNK_CODES // max(weight.shape[1], 1))
    for first in range(0, weight.shape[0], step):
        part = slice(first, first + step)
        # computed in float32, whatever the buffer's dtype
        torch.mul(weight.codes[part], scales[part, None], out=out[part])


def int8_decode_(weight: Int8Weight, out: torch.Tensor) -> Launch | None:
    """Write the matrix that codes and scales stand for; no gradient flows.

    Args:
        weight: (rows, columns).
        out: (rows, columns) on the weight's device, float16, bfloat16, float32 or float64 (which
            holds the float32 values); last stride 1, any row stride, such as columns of a wider
            buffer.

    Returns:
        What does the same again, without a look at anything, for as long as the caller knows that
        all tensors stay at their addresses; None where no launch does.

    Raises:
        UserError: `out` has another shape, device, dtype or stride. Nothing is written then.
    """
    check_out(out, weight)
    if not out.numel():
        return None
    if runs_triton(out):
        return _launch(weight, out)
    int8_decode_reference_(weight, out)
    return None


def compile_cases() -> list[CompileCase]:
    """Rows of whole words, and rows that are read byte by byte."""
    return [
        _compile_case("int8_decode", "*i64", WORD_CODES),
        _compile_case("int8_decode odd rows", "*i8", 1),
    ]


def _compile_case(name: str, codes: str, count: int) -> CompileCase:
    sizes = ("units", "row_units", "row_stride_units")
    return CompileCase(
        name=name,
        kernel=_decode_kernel,
        signature={"codes": codes, "absmax": FLOAT, "out": HALF} | dict.fromkeys(sizes, "i32"),
        constexprs={"CODES": count, "UNITS": PROGRAM_UNITS[count]},
        divisible_by_16=("absmax", "out"),
    )
