"""The borders of a decoded weight, [W | s B ; A] or [W | B ; s A], in one launch.

    right border    buffer[:height, width:]     0, and B * scale where a block has its rows
    bottom border   buffer[height:, :width]     0, and A * a_scale in the rows of a block's columns

W, a group's decoded weights, stands in buffer[:height, :width] and is left as it is, as is the
corner. Each product is float32 and rounded once.

Bytes moved: 2 * spare * (height + width) out in half precision, and A and B in. With 64 spare
columns, q, k and v of an 8B model and float32 adapters of rank 16 that is 1.3 MB + 1.2 MB, less
than a microsecond of an H100; zeros, scaled copies and copies of A were 8 launches for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import runs_triton, tl, triton
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase
from colab_qlora.kernels.launch import Launch, start_repeatable

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# as many as the kernel has arguments for: q, k and v, and one adapter more
MOST_BLOCKS = 4

# a program's tile: 64 columns, the whole right border as a rule, are 128 bytes of halves, the most
# that is stored at once; 32 rows of them are two 16-byte stores for each of 128 threads
TILE_ROWS = 32
TILE_COLUMNS = 64

# these numbers differ from group to group and from layer to layer, and adapters that an optimiser
# has laid out flat stand at any address; a kernel compiled for each of them would be hundreds
_NUMBERS = ("first", "last", "left", "rank", "a_rank")
VARYING = [f"{name}{i}" for i in range(MOST_BLOCKS) for name in _NUMBERS]
POINTERS = [f"{name}{i}" for i in range(MOST_BLOCKS) for name in ("a", "b")]


class Border(NamedTuple):
    """One adapter's place in the borders.

    Attributes:
        first_row: of `b` in the right border.
        column: of `b` in the right border's spare columns, and row of `a` in the bottom border's
            spare rows.
        a: (rank, width), any of the four float dtypes.
        b: (rows, rank), likewise; no rows (`b[:0]`) if its linear is not in this buffer.
        scale: multiplies b.
        has_a: False leaves zeros where `a` would stand.
        a_scale: multiplies a.
    """

    first_row: int
    column: int
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    has_a: bool
    a_scale: float = 1.0


@triton.jit
def _scaled_b(value, row, column, b, first, last, left, rank, scale):
    is_inside = (row >= first) & (row < last) & (column >= left) & (column < left + rank)
    place = (row - first).to(tl.int64) * rank + (column - left)  # [ROWS, COLUMNS]
    product = tl.load(b + place, mask=is_inside, other=0.0).to(tl.float32) * scale
    return tl.where(is_inside, product, value)


@triton.jit
def _scaled_a(value, row, column, a, left, rank, width, scale):
    is_inside = (row >= left) & (row < left + rank) & (column < width)
    place = (row - left).to(tl.int64) * width + column  # [ROWS, COLUMNS]
    product = tl.load(a + place, mask=is_inside, other=0.0).to(tl.float32) * scale
    return tl.where(is_inside, product, value)


@triton.jit
def write_border_tile(
    program, buffer, height, width, spare, row_stride,
    a0, b0, first0, last0, left0, rank0, a_rank0, scale0, a_scale0,
    a1, b1, first1, last1, left1, rank1, a_rank1, scale1, a_scale1,
    a2, b2, first2, last2, left2, rank2, a_rank2, scale2, a_scale2,
    a3, b3, first3, last3, left3, rank3, a_rank3, scale3, a_scale3,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """a_rank is rank, or 0 without A. Of blocks that overlap the last one counts."""
    tiles_across = tl.cdiv(spare, COLUMNS)
    right_programs = tl.cdiv(height, ROWS) * tiles_across
    is_right = program < right_programs
    if not is_right:
        program -= right_programs
        tiles_across = tl.cdiv(width, COLUMNS)
    row = program // tiles_across * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = program % tiles_across * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    dtype = buffer.dtype.element_ty
    if is_right:
        value = _scaled_b(value, row, column, b0, first0, last0, left0, rank0, scale0)
        value = _scaled_b(value, row, column, b1, first1, last1, left1, rank1, scale1)
        value = _scaled_b(value, row, column, b2, first2, last2, left2, rank2, scale2)
        value = _scaled_b(value, row, column, b3, first3, last3, left3, rank3, scale3)
        place = row.to(tl.int64) * row_stride + width + column
        tl.store(buffer + place, value.to(dtype), mask=(row < height) & (column < spare))
    else:
        value = _scaled_a(value, row, column, a0, left0, a_rank0, width, a_scale0)
        value = _scaled_a(value, row, column, a1, left1, a_rank1, width, a_scale1)
        value = _scaled_a(value, row, column, a2, left2, a_rank2, width, a_scale2)
        value = _scaled_a(value, row, column, a3, left3, a_rank3, width, a_scale3)
        place = (height + row).to(tl.int64) * row_stride + column
        tl.store(buffer + place, value.to(dtype), mask=(row < spare) & (column < width))


@triton.jit(do_not_specialize=["height", *VARYING], do_not_specialize_on_alignment=POINTERS)
def _borders_kernel(
    buffer, height, width, spare, row_stride,
    a0, b0, first0, last0, left0, rank0, a_rank0, scale0, a_scale0,
    a1, b1, first1, last1, left1, rank1, a_rank1, scale1, a_scale1,
    a2, b2, first2, last2, left2, rank2, a_rank2, scale2, a_scale2,
    a3, b3, first3, last3, left3, rank3, a_rank3, scale3, a_scale3,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    write_border_tile(
        tl.program_id(0), buffer, height, width, spare, row_stride,
        a0, b0, first0, last0, left0, rank0, a_rank0, scale0, a_scale0,
        a1, b1, first1, last1, left1, rank1, a_rank1, scale1, a_scale1,
        a2, b2, first2, last2, left2, rank2, a_rank2, scale2, a_scale2,
        a3, b3, first3, last3, left3, rank3, a_rank3, scale3, a_scale3,
        ROWS, COLUMNS,
    )  # fmt: skip


def _launch(
    buffer: torch.Tensor, height: int, width: int, blocks: Sequence[Border]
) -> Launch | None:
    programs = border_programs(buffer, height, width)
    if not programs:
        return None
    arguments = border_arguments(buffer, height, width, blocks)
    return start_repeatable(_borders_kernel, (programs,), arguments)


def border_arguments(
    buffer: torch.Tensor, height: int, width: int, blocks: Sequence[Border]
) -> list[Any]:
    """What `write_border_tile` is told after the program's number."""
    arguments: list[Any] = []
    for first, column, a, b, scale, has_a, a_scale in blocks:
        rank = b.shape[1]
        arguments += (a, b, first, first + b.shape[0], column, rank, rank * has_a)
        arguments += (float(scale), float(a_scale))
    # an absent block has rank 0, and pointers of a dtype that is compiled for anyway
    absent = (*(arguments[:2] or (buffer, buffer)), 0, 0, 0, 0, 0, 1.0, 1.0)
    arguments += absent * (MOST_BLOCKS - len(blocks))
    where = (buffer, height, width, buffer.shape[1] - width, buffer.stride(0))
    return [*where, *arguments, TILE_ROWS, TILE_COLUMNS]


def border_programs(buffer: torch.Tensor, height: int, width: int) -> int:
    """Programs that write both borders."""
    spare = buffer.shape[1] - width
    return _tiles(height, spare) + _tiles(spare, width)


def _tiles(rows: int, columns: int) -> int:
    # rounded up; on the host triton.cdiv takes 1.5 us a call
    return (-rows // TILE_ROWS) * (-columns // TILE_COLUMNS)


@torch.no_grad()
def lora_borders_reference_(
    buffer: torch.Tensor, height: int, width: int, blocks: Sequence[Border]
) -> None:
    """`lora_borders_` in torch: two launches, and two more a block."""
    right, bottom = buffer[:height, width:], buffer[height:, :width]
    dtype = torch.float64 if buffer.dtype == torch.float64 else torch.float32
    right.zero_()
    bottom.zero_()
    for first, column, a, b, scale, has_a, a_scale in blocks:
        rows, rank = b.shape
        target = right[first : first + rows, column : column + rank]
        torch.mul(b.to(dtype), scale, out=target)
        if has_a:
            torch.mul(a.to(dtype), a_scale, out=bottom[column : column + rank])


def lora_borders_(
    buffer: torch.Tensor, height: int, width: int, blocks: Sequence[Border]
) -> Launch | None:
    """Write the LoRA matrices, and zeros, beside and under a decoded weight.

    On a GPU it is one launch, unless there are more than four blocks, their matrices are not
    contiguous, or they are not all of one dtype (float16, bfloat16 or float32). No gradient flows.

    Args:
        buffer: (height + spare, width + spare), float16, bfloat16, float32 or float64; last stride
            1, any row stride. Nothing is written if spare is 0.
        height: rows of the weight.
        width: columns of the weight.
        blocks: the adapters; of two that overlap the last one counts.

    Returns:
        What does the same again, without a look at anything, for as long as the caller knows that
        buffer and adapters stay at their addresses; None where no single launch does.

    Raises:
        UserError: buffer or a block does not fit. Nothing is written then.
    """
    check_borders(buffer, height, width, blocks)
    if buffer.shape[1] == width:
        return None
    if runs_triton(buffer) and fits_kernel(buffer, blocks):
        return _launch(buffer, height, width, blocks)
    lora_borders_reference_(buffer, height, width, blocks)
    return None


def fits_kernel(buffer: torch.Tensor, blocks: Sequence[Border]) -> bool:
    """True unless the kernel would round more (float64), miss strides or be compiled once more."""
    matrices = [matrix for block in blocks for matrix in (block.a, block.b)]
    dtypes = {matrix.dtype for matrix in matrices}
    return (
        len(blocks) <= MOST_BLOCKS
        and len(dtypes) <= 1
        and torch.float64 not in dtypes
        and buffer.dtype != torch.float64
        and all(matrix.is_contiguous() for matrix in matrices)
    )


def check_borders(buffer: torch.Tensor, height: int, width: int, blocks: Sequence[Border]) -> None:
    """Raise UserError unless the blocks fit into the buffer's borders."""
    _check_buffer(buffer, height, width)
    for number, block in enumerate(blocks):
        _check_block(f"blocks[{number}]", block, buffer, height, width)


def _check_buffer(buffer: torch.Tensor, height: int, width: int) -> None:
    fits = buffer.dim() == 2 and buffer.shape[0] - height == buffer.shape[1] - width >= 0
    if not fits or min(height, width) < 0:
        allowed = f"({height} + spare, {width} + spare)"
        raise UserError("buffer does not fit the weight", got=tuple(buffer.shape), allowed=allowed)
    if buffer.dtype not in _DTYPES:
        allowed = "float16, bfloat16, float32, float64"
        raise UserError("buffer has another dtype", got=buffer.dtype, allowed=allowed)
    if buffer.shape[1] > 1 and buffer.stride(1) != 1:
        got = f"strides {buffer.stride()}"
        raise UserError("buffer has gaps inside its rows", got=got, allowed="a last stride of 1")


def _check_block(name: str, block: Border, buffer: torch.Tensor, height: int, width: int) -> None:
    first, column, a, b, *_ = block
    if b.dim() != 2 or a.shape != (b.shape[1], width):
        got = f"a {tuple(a.shape)}, b {tuple(b.shape)}"
        allowed = f"a (rank, {width}), b (rows, rank)"
        raise UserError(f"{name} is no adapter of this width", got=got, allowed=allowed)
    (rows, rank), spare = b.shape, buffer.shape[1] - width
    if not (0 <= first <= height - rows and 0 <= column <= spare - rank):
        got = f"b {rows} x {rank} at row {first}, column {column}"
        raise UserError(
            f"{name} leaves the borders", got=got, allowed=f"{height} rows, {spare} columns"
        )
    for matrix in (a, b):
        if matrix.dtype not in _DTYPES or matrix.device != buffer.device:
            got = f"{matrix.dtype} on {matrix.device}"
            allowed = f"a float dtype on {buffer.device}"
            raise UserError(f"{name} does not fit buffer", got=got, allowed=allowed)


def compile_cases() -> list[CompileCase]:
    """Adapters of float32 and of the model's half type, in a buffer for tensor cores."""
    return [_compile_case("float adapters", FLOAT), _compile_case("half adapters", HALF)]


def _compile_case(name: str, adapter: str) -> CompileCase:
    sizes = ("width", "spare", "row_stride")
    return CompileCase(
        name=f"lora_borders {name}",
        kernel=_borders_kernel,
        signature=border_signature(adapter),
        constexprs={"ROWS": TILE_ROWS, "COLUMNS": TILE_COLUMNS},
        divisible_by_16=("buffer", *sizes),
    )


def border_signature(adapter: str) -> dict[str, str]:
    """Triton's types of `border_arguments`, but for the last two, with adapters of that type."""
    names = [f"{name}{i}" for i in range(MOST_BLOCKS) for name in ("scale", "a_scale")]
    return (
        {"buffer": HALF}
        | dict.fromkeys(POINTERS, adapter)
        | dict.fromkeys(("height", "width", "spare", "row_stride", *VARYING), "i32")
        | dict.fromkeys(names, "fp32")
    )
