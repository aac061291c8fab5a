"""Decode up to three 4-bit weights (NF4) in one launch, such as those of q, k and v.

A program decodes a piece of one weight, as in `nf4_dequantize`, whose formula, roundings and bytes
moved these are. For q, k and v of an 8B model, 25 million weights, that is 63 MB, or 20 us of an
H100; each launch that is saved is another 3 us there, and 10 to 20 us of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import runs_triton, tl, triton
from colab_qlora.kernels.compile_case import CompileCase
from colab_qlora.kernels.launch import Launch, start_repeatable
from colab_qlora.kernels.misfit import check_out
from colab_qlora.kernels.nf4 import (
    FUSES_MULTIPLY_ADD,
    decode,
    dequantize_program,
    form_arguments,
    packed_units,
    programs_of,
    weight_arguments,
)
from colab_qlora.kernels.nf4 import compile_cases as single_cases
from colab_qlora.kernels.nf4_state import NF4State, nf4_state

# as many as the kernel has arguments for: no group of a decoder layer's linears is larger
MOST_WEIGHTS = 3


# the programs' numbers differ with every group of linears and are only compared
NUMBERS = ["second", "third"]
# alignment: as in nf4.py
PACKED = ["packed0", "packed1", "packed2"]


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=PACKED)
def _dequantize_many_kernel(
    packed0, code0, absmax0, nested_absmax0, nested_code0, offset0, out0, weights0,
    packed1, code1, absmax1, nested_absmax1, nested_code1, offset1, out1, weights1,
    packed2, code2, absmax2, nested_absmax2, nested_code2, offset2, out2, weights2,
    second, third, row_steps, row_stride_steps,
    BLOCK_SHIFT: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    CODES: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    dequantize_one_of_three(
        tl.program_id(0),
        packed0, code0, absmax0, nested_absmax0, nested_code0, offset0, out0, weights0,
        packed1, code1, absmax1, nested_absmax1, nested_code1, offset1, out1, weights1,
        packed2, code2, absmax2, nested_absmax2, nested_code2, offset2, out2, weights2,
        second, third, row_steps, row_stride_steps,
        BLOCK_SHIFT, NESTED_BLOCKSIZE, CODES, STEP, UNITS,
    )  # fmt: skip


@triton.jit
def dequantize_one_of_three(
    program,
    packed0, code0, absmax0, nested_absmax0, nested_code0, offset0, out0, weights0,
    packed1, code1, absmax1, nested_absmax1, nested_code1, offset1, out1, weights1,
    packed2, code2, absmax2, nested_absmax2, nested_code2, offset2, out2, weights2,
    second, third, row_steps, row_stride_steps,
    BLOCK_SHIFT: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    CODES: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """`second` and `third`: the programs that the second and the third weight start with."""
    # pointers that are chosen instead of branches would lose their alignment, and the wide stores
    if program < second:
        dequantize_program(
            program,
            packed0, code0, absmax0, nested_absmax0, nested_code0, offset0, out0, weights0,
            row_steps, row_stride_steps, BLOCK_SHIFT, NESTED_BLOCKSIZE, CODES, STEP, UNITS,
        )  # fmt: skip
    elif program < third:
        dequantize_program(
            program - second,
            packed1, code1, absmax1, nested_absmax1, nested_code1, offset1, out1, weights1,
            row_steps, row_stride_steps, BLOCK_SHIFT, NESTED_BLOCKSIZE, CODES, STEP, UNITS,
        )  # fmt: skip
    else:
        dequantize_program(
            program - third,
            packed2, code2, absmax2, nested_absmax2, nested_code2, offset2, out2, weights2,
            row_steps, row_stride_steps, BLOCK_SHIFT, NESTED_BLOCKSIZE, CODES, STEP, UNITS,
        )  # fmt: skip


def together(
    states: Sequence[NF4State], outs: Sequence[torch.Tensor]
) -> tuple[list[Any], int] | None:
    """What `dequantize_one_of_three` is told, and how many programs decode all weights.

    None where there are too many weights, or they differ in more than their rows.
    """
    if not 1 <= len(outs) <= MOST_WEIGHTS:
        return None
    units = [packed_units(state) for state in states]
    form, *others = map(form_arguments, states, units, outs)
    if any(other != form for other in others) or len({(o.dtype, o.device) for o in outs}) > 1:
        return None
    ends = list(accumulate(map(programs_of, outs)))
    weights = list(map(weight_arguments, states, units, outs))
    # an absent weight is the first one again, whose programs do not exist: kernels for one or two
    # weights are compiled as those for three
    absent = MOST_WEIGHTS - len(weights)
    weights += weights[:1] * absent
    ends += [ends[-1]] * absent
    arguments = [argument for weight in weights for argument in weight]
    return [*arguments, ends[0], ends[1], *form.values()], ends[-1]


def nf4_dequantize_many(
    weights: Sequence[Any], outs: Sequence[torch.Tensor]
) -> tuple[Launch, ...] | None:
    """Decode each weight into its buffer, bit by bit as `nf4_dequantize` does.

    Two or three weights on a GPU take one launch if they have the same number of columns and the
    same block sizes, and their buffers the same dtype and row stride, such as rows of one buffer.
    All others take a launch each, and so do weights of which only some can be read as words.

    Args:
        weights: bitsandbytes.nn.Params4bit with quant_type "nf4", each (rows, columns).
        outs: as many buffers (rows, columns), last stride 1, any row stride, any floating dtype,
            none overlapping another.

    Returns:
        Launches that do the same again, without a look at anything: for as long as the caller knows
        that weights and buffers stay at their addresses. None where there are no such launches.

    Raises:
        UserError: as `nf4_dequantize`, or another number of buffers. Nothing is written then.
    """
    if len(weights) != len(outs):
        raise UserError("outs do not fit the weights", got=len(outs), allowed=len(weights))
    states = [nf4_state(weight) for weight in weights]
    for state, out in zip(states, outs, strict=True):
        check_out(out, state)
    if len(outs) > 1 and runs_triton(outs[0]):
        found = together(states, outs)
        if found is not None:
            arguments, programs = found
            if not programs:
                return None
            options = {"enable_fp_fusion": FUSES_MULTIPLY_ADD}
            grid = (programs,)
            launch = start_repeatable(_dequantize_many_kernel, grid, arguments, **options)
            return None if launch is None else (launch,)
    launches = [decode(state, out) for state, out in zip(states, outs, strict=True)]
    ready = tuple(launch for launch in launches if launch is not None)
    return ready if len(ready) == len(launches) else None


def compile_cases() -> list[CompileCase]:
    """Three weights of each form that one weight is compiled for."""
    return [_compile_case(single) for single in single_cases()]


def _compile_case(single: CompileCase) -> CompileCase:
    sizes = ("BLOCK_SHIFT", "NESTED_BLOCKSIZE", "CODES", "STEP", "UNITS")
    shared = ("row_steps", "row_stride_steps", *sizes)

    def thrice(values: dict[str, Any]) -> dict[str, Any]:
        own = [name for name in values if name not in shared]
        repeated = {f"{name}{i}": values[name] for i in range(MOST_WEIGHTS) for name in own}
        return repeated | {name: values[name] for name in values if name in shared}

    aligned = thrice(dict.fromkeys(single.divisible_by_16))
    return CompileCase(
        name=single.name.replace("nf4_dequantize", "nf4_dequantize_many"),
        kernel=_dequantize_many_kernel,
        signature=thrice(single.signature) | {"second": "i32", "third": "i32"},
        constexprs=thrice(single.constexprs),
        divisible_by_16=tuple(aligned),
        options=single.options,
    )
