"""Write a group's weights, each stored in its own way, and their LoRA into one buffer at once.

    buffer = [W | s B ; A]        W: up to three weights, one above the other

A weight is NF4, int8 or plain, as a map of precisions leaves them: formulas, roundings and bytes
moved are those of `nf4.py`, `int8_decode.py` and a copy, and of `lora_borders.py`. What it saves is
launches: q in int8 beside k and v in NF4 took three, and a copy by torch had to be prepared anew
by the host in every pass. NF4 blocks may differ, since their size is a number here; groups whose
weights are all NF4 with equal blocks stay with `nf4_group.py`, which has it compiled in.

The weights' order in the launch is their kinds', so that at most ten kernels are compiled for the
groups of a model whose weights of a kind are stored alike, whichever of q, k and v has which kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from colab_qlora.kernels.backend import runs_triton
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase
from colab_qlora.kernels.int8_decode import WORD_CODES, Int8Weight, int8_units
from colab_qlora.kernels.launch import Launch, start_repeatable
from colab_qlora.kernels.lora_borders import (
    TILE_COLUMNS,
    TILE_ROWS,
    Border,
    border_arguments,
    border_programs,
    border_signature,
    check_borders,
    fits_kernel,
)
from colab_qlora.kernels.misfit import check_out
from colab_qlora.kernels.mixed_group_kernel import mixed_kernel
from colab_qlora.kernels.nf4 import (
    FUSES_MULTIPLY_ADD,
    PROGRAM_CODES,
    block_shift,
    packed_units,
    programs_of,
    weight_arguments,
)
from colab_qlora.kernels.nf4_many import MOST_WEIGHTS, NUMBERS
from colab_qlora.kernels.nf4_state import nf4_state

# the order in a launch
_KINDS = ("nf4", "int8", "plain")
# values of 16-byte stores; every kind's program writes PROGRAM_CODES of them
_STEP = 8
assert _STEP == WORD_CODES


class _Told(NamedTuple):
    """What `mixed_kernel` is told about one weight, and what all of a launch share."""

    kind: str
    arguments: tuple[Any, ...]
    nested_blocksize: int
    programs: int


def _told(weight: Any, out: torch.Tensor) -> _Told | None:
    """None where the weight cannot be read as widely as this kernel reads. Checks `out`."""
    if isinstance(weight, Int8Weight):
        check_out(out, weight)
        codes, in_unit = int8_units(weight, out)
        if in_unit != WORD_CODES:
            return None
        packed, absmax = codes, weight.absmax
        arguments = (packed, None, absmax, None, None, None, None, out, out.numel(), 0)
        return _Told("int8", arguments, 0, programs_of(out))
    if hasattr(weight, "quant_state"):
        state = nf4_state(weight)
        check_out(out, state)
        units = packed_units(state)
        if units.dtype != torch.int32:
            return None
        *leading, last, count = weight_arguments(state, units, out)
        shift = block_shift(state.blocksize, _STEP)
        arguments = (*leading, None, last, count, shift)
        return _Told("nf4", arguments, state.nested_blocksize, programs_of(out))
    # a subclass may keep its numbers elsewhere
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return None
    plain = weight.detach()
    fits = plain.shape == out.shape and plain.device == out.device and plain.is_contiguous()
    if not fits or plain.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    none = (None,) * 6
    return _Told("plain", (*none, plain, out, out.numel(), 0), 0, programs_of(out))


def _together(weights: Sequence[Any], outs: Sequence[torch.Tensor]) -> tuple[list[Any], int] | None:
    """The kernel's arguments up to `UNITS`, and the programs that write all weights."""
    found = [_told(weight, out) for weight, out in zip(weights, outs, strict=True)]
    told = [one for one in found if one is not None]
    nested = {one.nested_blocksize for one in told if one.kind == "nf4"} or {0}
    columns, row_stride = outs[0].shape[1], outs[0].stride(0)
    strides = {(out.stride(0), out.dtype, out.device) for out in outs}
    is_wide = columns % _STEP == row_stride % _STEP == 0
    if len(told) < len(found) or len(nested) > 1 or len(strides) > 1 or not is_wide:
        return None
    told.sort(key=lambda one: _KINDS.index(one.kind))
    # an absent weight is the first one again, without programs
    told = [told[0]._replace(programs=0)] * (MOST_WEIGHTS - len(told)) + told
    ends = list(accumulate(one.programs for one in told))
    sizes = (ends[0], ends[1], columns // _STEP, row_stride // _STEP)
    forms = (*(one.kind for one in told), *nested, _STEP, PROGRAM_CODES // _STEP)
    return [*(x for one in told for x in one.arguments), *sizes, *forms], ends[-1]


def mixed_group_(
    weights: Sequence[Any],
    outs: Sequence[torch.Tensor],
    buffer: torch.Tensor,
    height: int,
    width: int,
    blocks: Sequence[Border],
) -> tuple[bool, Launch | None]:
    """Fill a whole buffer, if one launch can: else nothing is written.

    Args:
        weights: each a bitsandbytes.nn.Params4bit with quant_type "nf4", an `Int8Weight`, or a
            float tensor (rows, width).
        outs: their places in `buffer`, rows of its first `width` columns.
        buffer, height, width, blocks: as `lora_borders_` takes them.

    Returns:
        Whether it was done; and what does the same again, without a look at anything, for as long
        as the caller knows that all tensors stay at their addresses, if there is such a launch.

    Raises:
        UserError: as `nf4_dequantize`, `int8_decode_` and `lora_borders_`. Nothing is written then.
    """
    if not runs_triton(buffer) or not fits_kernel(buffer, blocks) or buffer.shape[1] == width:
        return False, None
    if not 1 <= len(weights) <= MOST_WEIGHTS:
        return False, None
    check_borders(buffer, height, width, blocks)
    found = _together(weights, outs)
    if found is None:
        return False, None
    writing, borders = found
    arguments = [*writing, borders, *border_arguments(buffer, height, width, blocks)]
    grid = (borders + border_programs(buffer, height, width),)
    options = {"enable_fp_fusion": FUSES_MULTIPLY_ADD}
    return True, start_repeatable(mixed_kernel, grid, arguments, **options)


# what an 8B model's map leaves most often, and a group of each kind alone
_COMPILED = (
    ("nf4", "nf4", "int8"),
    ("nf4", "nf4", "plain"),
    ("nf4", "int8", "plain"),
    ("nf4", "nf4", "nf4"),
    ("int8", "int8", "int8"),
    ("plain", "plain", "plain"),
)


def compile_cases() -> list[CompileCase]:
    """Kinds alone and together, double-quantised, with adapters of float32."""
    return [_compile_case(kinds) for kinds in _COMPILED]


def _compile_case(kinds: tuple[str, str, str]) -> CompileCase:
    pointers: dict[str, str] = {}
    absent: dict[str, Any] = {}
    for i, kind in enumerate(kinds):
        nested = dict.fromkeys(("nested_absmax", "nested_code", "offset"), FLOAT)
        own = {
            "nf4": {"packed": "*i32", "code": FLOAT, "absmax": "*u8", **nested},
            "int8": {"packed": "*i64", "absmax": FLOAT},
            "plain": {"plain": HALF},
        }[kind]
        for name in ("packed", "code", "absmax", *nested, "plain"):
            if name in own:
                pointers[f"{name}{i}"] = own[name]
            else:
                absent[f"{name}{i}"] = None
        pointers |= {f"out{i}": HALF, f"weights{i}": "i32", f"shift{i}": "i32"}
    sizes = ("row_steps", "row_stride_steps", "width", "spare", "row_stride")
    numbers = dict.fromkeys((*NUMBERS, *sizes, "borders"), "i32")
    aligned = [
        name for name in pointers if name[:-1] in ("code", "absmax", "plain", "out", "weights")
    ]
    forms = {"NESTED_BLOCKSIZE": 256 if "nf4" in kinds else 0, "STEP": _STEP}
    return CompileCase(
        name=f"mixed_group {' '.join(kinds)}",
        kernel=mixed_kernel,
        signature=pointers | numbers | border_signature(FLOAT),
        constexprs={
            **{f"KIND{i}": kind for i, kind in enumerate(kinds)},
            **forms,
            "UNITS": PROGRAM_CODES // _STEP,
            "ROWS": TILE_ROWS,
            "COLUMNS": TILE_COLUMNS,
            **absent,
        },
        divisible_by_16=(*aligned, "buffer", "width", "spare", "row_stride"),
        options={"enable_fp_fusion": FUSES_MULTIPLY_ADD},
    )
