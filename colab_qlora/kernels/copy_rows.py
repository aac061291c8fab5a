"""Copy rows into rows that lie further apart, such as the columns of a wider buffer.

    out[row, :] = x[row, :]

Bytes moved a value of half precision: 4 (in and out). torch's own copy of 4,096 x 4,096 such values
into rows of 4,160 takes 46 us on an H100, where the 67 MB at 3 TB/s are 22 us: it works out the
place of every element. Here a program copies a tile, 16 bytes a thread and step.
"""

from __future__ import annotations

import torch

from colab_qlora.kernels.backend import runs_triton, tl, triton
from colab_qlora.kernels.compile_case import HALF, CompileCase
from colab_qlora.kernels.launch import ReadyLaunches, layout
from colab_qlora.kernels.misfit import misfit

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# four loads of 16 bytes for each of a program's 128 threads, all under way at once
TILE_BYTES = 4 * 16 * 128

# a width of 11,008 is 10.75 such tiles, so that few threads are beyond the end of a row, and 2 kB
# of half values are still a long run of memory
MOST_COLUMNS = 1024

_launches = ReadyLaunches()


@triton.jit(do_not_specialize=["rows"])
def _copy_rows_kernel(
    x, out, rows, width, x_row, out_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    program = tl.program_id(0)
    tiles = tl.cdiv(width, COLUMNS)  # side by side in a row
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    mask = (row < rows) & (column < width)  # [ROWS, COLUMNS]
    values = tl.load(x + row * x_row + column, mask=mask)
    tl.store(out + row * out_row + column, values, mask=mask)


def copy_rows(x: torch.Tensor, out: torch.Tensor) -> None:
    """Copy `x` into `out`, outside autograd.

    Args:
        x: float16, bfloat16, float32 or float64, shape (rows, width), last stride 1, any row
            stride; no rows are allowed.
        out: written to: x's shape, dtype and device, last stride 1, any row stride, such as columns
            of a wider buffer; overlapping x in no element.

    Raises:
        UserError: a tensor's shape, dtype, device or strides do not fit.

    Example:
        >>> wide = torch.zeros(1, 3)
        >>> copy_rows(torch.ones(1, 2), wide[:, 1:])
        >>> wide
        tensor([[0., 1., 1.]])
    """
    if not runs_triton(x):
        _check(x, out)
        return copy_rows_reference(x, out)
    key = (layout(x), layout(out))
    ready = _launches.get(key)
    if ready is not None:
        return ready(x.data_ptr(), out.data_ptr())
    _check(x, out)
    if not x.numel():
        return None
    rows, width = x.shape
    tile_rows, columns = _tile(width, x.element_size())
    programs = triton.cdiv(rows, tile_rows) * triton.cdiv(width, columns)
    constants = (rows, width, x.stride(0), out.stride(0), tile_rows, columns)
    return _launches.start(key, _copy_rows_kernel, (programs,), (x, out), constants)


def _tile(width: int, value_bytes: int) -> tuple[int, int]:
    """Rows and columns of a program's tile."""
    columns = min(MOST_COLUMNS, triton.next_power_of_2(width))
    return TILE_BYTES // value_bytes // columns, columns


def _check(x: torch.Tensor, out: torch.Tensor) -> None:
    if x.dim() != 2 or x.dtype not in _DTYPES:
        raise misfit("x cannot be copied", x, "a float dtype, shape (rows, width)")
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        allowed = f"{x.dtype}, shape {tuple(x.shape)} on {x.device}"
        raise misfit("out does not fit x", out, allowed)
    for name, tensor in (("x", x), ("out", out)):
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise misfit(f"{name} has gaps inside its rows", tensor, "a last stride of 1")


@torch.no_grad()
def copy_rows_reference(x: torch.Tensor, out: torch.Tensor) -> None:
    """`copy_rows` in torch."""
    out.copy_(x)


def compile_cases() -> list[CompileCase]:
    """Rows of a hidden state, and short ones, several of which make a tile's row."""
    return [_case(width) for width in (64, 4096)]


def _case(width: int) -> CompileCase:
    rows, columns = _tile(width, value_bytes=2)
    numbers = ("rows", "width", "x_row", "out_row")
    return CompileCase(
        name=f"copy_rows {width}",
        kernel=_copy_rows_kernel,
        signature={"x": HALF, "out": HALF} | dict.fromkeys(numbers, "i32"),
        constexprs={"ROWS": rows, "COLUMNS": columns},
        divisible_by_16=("x", "out", *numbers[1:]),
    )
