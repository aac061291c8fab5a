"""Decode a group's 4-bit weights and write their LoRA beside and under them, in one launch.

    buffer = [W | s B ; A]        W: up to three weights, one above the other

The first programs decode, as in `nf4_many.py`, the last write borders, as in `lora_borders.py`:
formulas, roundings and bytes moved are theirs. A layer does this eight times in a training step, so
a launch less is 8 x 5 us of an H100, and 8 x 10 to 20 us of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from colab_qlora.kernels.backend import runs_triton, tl, triton
from colab_qlora.kernels.compile_case import FLOAT, CompileCase
from colab_qlora.kernels.launch import Launch, start_repeatable
from colab_qlora.kernels.lora_borders import (
    POINTERS,
    TILE_COLUMNS,
    TILE_ROWS,
    VARYING,
    Border,
    border_arguments,
    border_programs,
    border_signature,
    check_borders,
    fits_kernel,
    write_border_tile,
)
from colab_qlora.kernels.misfit import check_out
from colab_qlora.kernels.nf4 import FUSES_MULTIPLY_ADD
from colab_qlora.kernels.nf4_many import (
    NUMBERS,
    PACKED,
    dequantize_one_of_three,
    together,
)
from colab_qlora.kernels.nf4_many import compile_cases as weight_cases
from colab_qlora.kernels.nf4_state import nf4_state

_NUMBERS = [*NUMBERS, "borders", "height", *VARYING]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=[*PACKED, *POINTERS])
def _group_kernel(
    packed0, code0, absmax0, nested_absmax0, nested_code0, offset0, out0, weights0,
    packed1, code1, absmax1, nested_absmax1, nested_code1, offset1, out1, weights1,
    packed2, code2, absmax2, nested_absmax2, nested_code2, offset2, out2, weights2,
    second, third, row_steps, row_stride_steps,
    BLOCK_SHIFT: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    CODES: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr,
    borders, buffer, height, width, spare, row_stride,
    a0, b0, first0, last0, left0, rank0, a_rank0, scale0, a_scale0,
    a1, b1, first1, last1, left1, rank1, a_rank1, scale1, a_scale1,
    a2, b2, first2, last2, left2, rank2, a_rank2, scale2, a_scale2,
    a3, b3, first3, last3, left3, rank3, a_rank3, scale3, a_scale3,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`borders`: the first program that writes borders."""
    program = tl.program_id(0)
    if program < borders:
        dequantize_one_of_three(
            program,
            packed0, code0, absmax0, nested_absmax0, nested_code0, offset0, out0, weights0,
            packed1, code1, absmax1, nested_absmax1, nested_code1, offset1, out1, weights1,
            packed2, code2, absmax2, nested_absmax2, nested_code2, offset2, out2, weights2,
            second, third, row_steps, row_stride_steps,
            BLOCK_SHIFT, NESTED_BLOCKSIZE, CODES, STEP, UNITS,
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


def nf4_group_(
    weights: Sequence[Any],
    outs: Sequence[torch.Tensor],
    buffer: torch.Tensor,
    height: int,
    width: int,
    blocks: Sequence[Border],
) -> tuple[bool, Launch | None]:
    """Fill a whole buffer, if one launch can: else nothing is written.

    Args:
        weights: bitsandbytes.nn.Params4bit with quant_type "nf4".
        outs: their places in `buffer`, rows of its first `width` columns.
        buffer, height, width, blocks: as `lora_borders_` takes them.

    Returns:
        Whether it was done; and what does the same again, without a look at anything, for as long
        as the caller knows that all tensors stay at their addresses, if there is such a launch.

    Raises:
        UserError: as `nf4_dequantize_many` and `lora_borders_`. Nothing is written then.
    """
    if not runs_triton(buffer) or not fits_kernel(buffer, blocks) or buffer.shape[1] == width:
        return False, None
    states = [nf4_state(weight) for weight in weights]
    for state, out in zip(states, outs, strict=True):
        check_out(out, state)
    check_borders(buffer, height, width, blocks)
    found = together(states, outs)
    if found is None:
        return False, None
    decoding, borders = found
    arguments = [*decoding, borders, *border_arguments(buffer, height, width, blocks)]
    grid = (borders + border_programs(buffer, height, width),)
    options = {"enable_fp_fusion": FUSES_MULTIPLY_ADD}
    return True, start_repeatable(_group_kernel, grid, arguments, **options)


def compile_cases() -> list[CompileCase]:
    """Weights of each form, with adapters of float32."""
    return [_compile_case(weights) for weights in weight_cases()]


def _compile_case(weights: CompileCase) -> CompileCase:
    sizes = ("width", "spare", "row_stride")
    return CompileCase(
        name=weights.name.replace("nf4_dequantize_many", "nf4_group"),
        kernel=_group_kernel,
        signature=weights.signature | {"borders": "i32"} | border_signature(FLOAT),
        constexprs=weights.constexprs | {"ROWS": TILE_ROWS, "COLUMNS": TILE_COLUMNS},
        divisible_by_16=(*weights.divisible_by_16, "buffer", *sizes),
        options=weights.options,
    )
