"""Decode a 4-bit weight of bitsandbytes (NF4) in one launch, bit by bit as bitsandbytes does.

    w = code[q] * absmax[block]                     q: 4 bits, code: 16 levels, block = index // 64
    absmax[block] = nested_code[a] * nested_absmax[block // 256] + offset        if double-quantised

The weight is flat: blocks run over the ends of rows, and of the two codes in a byte the high half
is the first. Products are rounded to float32 and then to the dtype asked for. The offset is added
to a rounded product, since bitsandbytes dequantises absmax in one kernel and adds in another; a
fused multiply-add, which Triton makes of the two unless told not to, changes the last bit of one
absmax in 15. `FUSES_MULTIPLY_ADD` forbids it; tests/kernels/test_nf4.py looks for FFMA in the
machine code for sm_75, sm_80 and sm_90.

Bytes moved a weight of half precision, blocks of 64: 0.516 in, double-quantised (0.563 plain), and
2 out. Of a double-quantised weight bitsandbytes moves 0.25 more, in three launches.

Where the rows of a weight do not hold whole blocks, bitsandbytes 0.50 decodes wrongly on a CPU
with AVX-512 (it starts a block with every row). Here every device decodes as its GPU kernel does.
"""

from __future__ import annotations

from typing import Any

import torch

from colab_qlora.kernels.backend import runs_triton, tl, triton
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase
from colab_qlora.kernels.launch import Launch, start_repeatable
from colab_qlora.kernels.misfit import check_out
from colab_qlora.kernels.nf4_state import NF4State, nf4_state

# see the module's docstring; a launch option of Triton's
FUSES_MULTIPLY_ADD = False

# 8 codes are one 32-bit word, and 8 half values one 16-byte store; 4 words for each of a program's
# 128 threads hide the latency of the table look-ups
WORD_CODES = 8
PROGRAM_CODES = 4096

# codes that the reference decodes at a time, about: 4 MB of float32 stay in a CPU's cache
CHUNK_CODES = 1 << 20


@triton.jit
def dequantize_program(
    program,
    packed,
    code,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    out,
    weights,
    row_steps,
    row_stride_steps,
    BLOCK_SHIFT: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    CODES: tl.constexpr,
    STEP: tl.constexpr,
    UNITS: tl.constexpr,
):
    """CODES are packed in a unit, a byte or a word, and 2 ** BLOCK_SHIFT units make a block.

    A row holds row_steps steps of STEP weights.
    """
    first = program.to(tl.int64) * UNITS
    unit = tl.arange(0, UNITS)  # [UNITS]
    lane = tl.arange(0, CODES)[None, :]  # [1, CODES]
    is_unit = (first + unit) * CODES < weights

    bits = tl.load(packed + first + unit, mask=is_unit, other=0).to(tl.int32)
    # lane 0 is the high half of the lowest byte
    q = (bits[:, None] >> (4 * (lane ^ 1))) & 15  # [UNITS, CODES]
    block = (first + unit) >> BLOCK_SHIFT
    scale = tl.load(absmax + block, mask=is_unit, other=0)
    if NESTED_BLOCKSIZE > 0:
        nested = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=is_unit, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested + tl.load(offset).to(tl.float32)
    value = tl.load(code + q) * scale.to(tl.float32)[:, None]

    # one division of 64 bits a program, and one of 32 bits a unit: divisions outweigh the decoding
    first_step = first * (CODES // STEP)
    first_row = first_step // row_steps
    if STEP == 1:
        step = unit[:, None] * CODES + lane
        place = lane * 0
    else:
        step = unit[:, None]
        place = lane
    step += (first_step - first_row * row_steps).to(tl.int32)
    row = step // row_steps
    place += ((first_row + row) * row_stride_steps + (step - row * row_steps)) * STEP
    is_weight = (first + unit[:, None]) * CODES + lane < weights
    tl.store(out + place, value.to(out.dtype.element_ty), mask=is_weight)


# Triton would read an aligned `packed` 16 bytes a thread, then pass the words on through shared
# memory; 4 bytes a thread, 128 a warp, come in the layout that the stores need
@triton.jit(do_not_specialize_on_alignment=["packed"])
def _dequantize_kernel(
    packed, code, absmax, nested_absmax, nested_code, offset, out, weights,
    row_steps, row_stride_steps,
    BLOCK_SHIFT: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    CODES: tl.constexpr, STEP: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    dequantize_program(
        tl.program_id(0),
        packed, code, absmax, nested_absmax, nested_code, offset, out, weights,
        row_steps, row_stride_steps,
        BLOCK_SHIFT, NESTED_BLOCKSIZE, CODES, STEP, UNITS,
    )  # fmt: skip


def packed_units(state: NF4State) -> torch.Tensor:
    """The codes as the kernels read them: words of 8, or bytes of 2 where words do not fit."""
    packed = state.packed
    # torch views words by their place in the storage, the GPU loads them by their address
    if packed.numel() % 4 == packed.storage_offset() % 4 == packed.data_ptr() % 4 == 0:
        return packed.view(torch.int32)
    return packed


def programs_of(out: torch.Tensor) -> int:
    """Programs that decode a weight into `out`."""
    # rounded up; on the host triton.cdiv takes 1.5 us a call
    return -(-out.numel() // PROGRAM_CODES)


def weight_arguments(state: NF4State, units: torch.Tensor, out: torch.Tensor) -> tuple[Any, ...]:
    """What `dequantize_program` is told about one weight, from `packed` to `weights`."""
    nested = (state.nested_absmax, state.nested_code, state.offset)
    return (units, state.code, state.absmax, *nested, out, out.numel())


def form_arguments(state: NF4State, units: torch.Tensor, out: torch.Tensor) -> dict[str, Any]:
    """The arguments after them, in the kernel's order: what weights share in one launch."""
    columns, row_stride = state.shape[1], out.stride(0)
    codes = 2 if units.dtype == torch.uint8 else WORD_CODES
    step = codes if columns % codes == 0 and row_stride % codes == 0 else 1
    return {
        "row_steps": columns // step,
        "row_stride_steps": row_stride // step,
        "BLOCK_SHIFT": block_shift(state.blocksize, codes),
        "NESTED_BLOCKSIZE": state.nested_blocksize,
        "CODES": codes,
        "STEP": step,
        "UNITS": PROGRAM_CODES // codes,
    }


def block_shift(blocksize: int, codes: int) -> int:
    """A block is 2 to this power units of so many codes; block sizes are powers of 2."""
    return (blocksize // codes).bit_length() - 1


def _launch(state: NF4State, out: torch.Tensor) -> Launch | None:
    units = packed_units(state)
    arguments = [
        *weight_arguments(state, units, out),
        *form_arguments(state, units, out).values(),
    ]
    options = {"enable_fp_fusion": FUSES_MULTIPLY_ADD}
    return start_repeatable(_dequantize_kernel, (programs_of(out),), arguments, **options)


def _float_absmax(state: NF4State) -> torch.Tensor:
    """float32, one a block, with bitsandbytes' two roundings."""
    if state.nested_absmax is None:
        return state.absmax.float()
    assert state.nested_code is not None and state.offset is not None
    levels = state.nested_code.index_select(0, state.absmax.int())
    nested = state.nested_absmax.repeat_interleave(state.nested_blocksize)[: levels.numel()]
    return levels.mul_(nested).add_(state.offset)


def nf4_reference(state: NF4State, out: torch.Tensor) -> None:
    """Decode into `out` with torch: (rows, columns), any floating dtype, any strides.

    Two codes at a time: a byte picks 64 bits, two float32 levels, from a table of 256. On one core
    4096 x 4096 weights take 6 ms to float16 and 9 ms to float32, against 14 and 25 ms for
    bitsandbytes' AVX-512 kernel, whose output is always a new tensor.
    """
    rows, columns = state.shape
    block = state.blocksize
    levels = torch.stack((state.code.repeat_interleave(16), state.code.repeat(16)), dim=1)
    pairs = levels.view(torch.int64).reshape(256)
    absmax = _float_absmax(state)
    step = max(1, CHUNK_CODES // max(columns, 1))
    for first in range(0, rows, step):
        chunk = out[first : first + step]
        start, size = first * columns, chunk.numel()
        # whole blocks around the rows; only the weight's last one may be short
        low, high = start // block, -(-(start + size) // block)
        codes = state.packed[low * block // 2 : high * block // 2].int()
        values = pairs.index_select(0, codes).view(torch.float32)
        full = values.numel() // block * block
        values[:full].view(-1, block).mul_(absmax[low : low + full // block, None])
        values[full:].mul_(absmax[high - 1])
        skip = start - low * block
        chunk.copy_(values[skip : skip + size].view(chunk.shape))


def nf4_dequantize(
    weight: Any, *, out: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The matrix that a 4-bit weight stands for, bit by bit as bitsandbytes decodes it.

    Args:
        weight: bitsandbytes.nn.Params4bit with quant_type "nf4", (rows, columns).
        out: written to if given: (rows, columns), last stride 1, any row stride, such as columns
            of a wider buffer, any floating dtype.
        dtype: of a new tensor; the quant_state's own if neither is given. float64 holds the float32
            values.

    Returns:
        `out`, or a new tensor (rows, columns), on the weight's device and the current stream.

    Raises:
        UserError: as `nf4_state`; or `out` has another shape, device, stride or dtype.
    """
    state = nf4_state(weight)
    if out is None:
        out = torch.empty(state.shape, dtype=dtype or state.dtype, device=state.device)
    check_out(out, state, dtype)
    decode(state, out)
    return out


def decode(state: NF4State, out: torch.Tensor) -> Launch | None:
    """`nf4_dequantize` once everything is checked; what repeats it, if one launch does."""
    if not out.numel():
        return None
    if runs_triton(out):
        return _launch(state, out)
    nf4_reference(state, out)
    return None


def compile_cases() -> list[CompileCase]:
    """Nested and plain absmax, and rows that take no 16-byte stores."""
    return [
        _compile_case("nested", "*u8", 256, WORD_CODES),
        _compile_case("plain", FLOAT, 0, WORD_CODES),
        _compile_case("nested, odd rows", "*u8", 256, 1),
    ]


def _compile_case(name: str, absmax: str, nested_blocksize: int, step: int) -> CompileCase:
    pointers = {"packed": "*i32", "code": FLOAT, "absmax": absmax, "out": HALF}
    nested = ("nested_absmax", "nested_code", "offset")
    absent: dict[str, Any] = {}
    if nested_blocksize:
        pointers |= dict.fromkeys(nested, FLOAT)
    else:
        absent = dict.fromkeys(nested)
    constexprs = {
        "BLOCK_SHIFT": block_shift(64, WORD_CODES),
        "NESTED_BLOCKSIZE": nested_blocksize,
        "CODES": WORD_CODES,
    }
    return CompileCase(
        name=f"nf4_dequantize {name}",
        kernel=_dequantize_kernel,
        signature=pointers | dict.fromkeys(["weights", "row_steps", "row_stride_steps"], "i32"),
        constexprs={**constexprs, "STEP": step, "UNITS": PROGRAM_CODES // WORD_CODES, **absent},
        divisible_by_16=("code", "absmax", "out", "weights"),
        options={"enable_fp_fusion": FUSES_MULTIPLY_ADD},
    )
