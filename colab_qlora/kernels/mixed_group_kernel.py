"""The kernel of `mixed_group.py`: programs that decode or copy a weight each, then the borders'.

How a weight is stored is compiled in; where its programs begin is a number.
"""

from __future__ import annotations

from colab_qlora.kernels.backend import tl, triton
from colab_qlora.kernels.int8_decode import decode_int8_program
from colab_qlora.kernels.lora_borders import POINTERS, VARYING, write_border_tile
from colab_qlora.kernels.nf4 import dequantize_program
from colab_qlora.kernels.nf4_many import NUMBERS

_SHIFTS = ["shift0", "shift1", "shift2"]
# as in nf4.py, narrow loads come in the layout that the stores need; plain weights are read as
# widely as they are written
_PACKED = ["packed0", "packed1", "packed2"]


@triton.jit
def _copy_program(
    program, plain, out, weights, row_steps, row_stride_steps,
    STEP: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Rows of row_steps steps of STEP values, without gaps, to rows further apart."""
    first = program.to(tl.int64) * UNITS
    unit = tl.arange(0, UNITS)  # [UNITS]
    lane = tl.arange(0, STEP)[None, :]  # [1, STEP]
    is_unit = ((first + unit) * STEP < weights)[:, None]
    value = tl.load(plain + (first + unit)[:, None] * STEP + lane, mask=is_unit, other=0.0)
    # one division of 64 bits a program, and one of 32 bits a unit
    first_row = first // row_steps
    step = unit + (first - first_row * row_steps).to(tl.int32)
    row = step // row_steps
    start = (first_row + row) * row_stride_steps + (step - row * row_steps)
    tl.store(out + start[:, None] * STEP + lane, value.to(out.dtype.element_ty), mask=is_unit)


@triton.jit
def _weight_program(
    program,
    packed, code, absmax, nested_absmax, nested_code, offset, plain, out, weights, shift,
    row_steps, row_stride_steps,
    KIND: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    if KIND == "nf4":
        dequantize_program(
            program,
            packed, code, absmax, nested_absmax, nested_code, offset, out, weights,
            row_steps, row_stride_steps,
            shift, NESTED_BLOCKSIZE, STEP, STEP, UNITS,
        )  # fmt: skip
    elif KIND == "int8":
        decode_int8_program(
            program, packed, absmax, out, weights // STEP, row_steps, row_stride_steps, STEP, UNITS
        )
    else:
        _copy_program(program, plain, out, weights, row_steps, row_stride_steps, STEP, UNITS)


@triton.jit(
    do_not_specialize=[*NUMBERS, *_SHIFTS, "borders", "height", *VARYING],
    do_not_specialize_on_alignment=[*_PACKED, *POINTERS],
)
def mixed_kernel(
    packed0, code0, absmax0, nested_absmax0, nested_code0, offset0, plain0, out0, weights0, shift0,
    packed1, code1, absmax1, nested_absmax1, nested_code1, offset1, plain1, out1, weights1, shift1,
    packed2, code2, absmax2, nested_absmax2, nested_code2, offset2, plain2, out2, weights2, shift2,
    second, third, row_steps, row_stride_steps,
    KIND0: tl.constexpr, KIND1: tl.constexpr, KIND2: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr,
    borders, buffer, height, width, spare, row_stride,
    a0, b0, first0, last0, left0, rank0, a_rank0, scale0, a_scale0,
    a1, b1, first1, last1, left1, rank1, a_rank1, scale1, a_scale1,
    a2, b2, first2, last2, left2, rank2, a_rank2, scale2, a_scale2,
    a3, b3, first3, last3, left3, rank3, a_rank3, scale3, a_scale3,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`second`, `third`, `borders`: the programs that these start with; `shift`: block_shift."""
    program = tl.program_id(0)
    if program < second:
        _weight_program(
            program,
            packed0, code0, absmax0, nested_absmax0, nested_code0, offset0,
            plain0, out0, weights0, shift0, row_steps, row_stride_steps,
            KIND0, NESTED_BLOCKSIZE, STEP, UNITS,
        )  # fmt: skip
    elif program < third:
        _weight_program(
            program - second,
            packed1, code1, absmax1, nested_absmax1, nested_code1, offset1,
            plain1, out1, weights1, shift1, row_steps, row_stride_steps,
            KIND1, NESTED_BLOCKSIZE, STEP, UNITS,
        )  # fmt: skip
    elif program < borders:
        _weight_program(
            program - third,
            packed2, code2, absmax2, nested_absmax2, nested_code2, offset2,
            plain2, out2, weights2, shift2, row_steps, row_stride_steps,
            KIND2, NESTED_BLOCKSIZE, STEP, UNITS,
        )  # fmt: skip
    else:
        write_border_tile(
            program - borders, buffer, height, width, spare, row_stride,
            a0, b0, first0, last0, left0, rank0, a_rank0, scale0, a_scale0,
            a1, b1, first1, last1, left1, rank1, a_rank1, scale1, a_scale1,
            a2, b2, first2, last2, left2, rank2, a_rank2, scale2, a_scale2,
            a3, b3, first3, last3, left3, rank3, a_rank3, scale3, a_scale3,
            ROWS, COLUMNS,
        )  # fmt: skip
