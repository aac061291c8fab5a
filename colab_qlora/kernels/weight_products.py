"""x W^T and dy W of a weight too large to stand decoded as a whole, such as an int8 head.

    products          y = x W^T + b     tile by tile into columns of y: what one GEMM gives
    input gradient    dx = dy W         a sum over the tiles, in float32, rounded once

A tile is some rows of W, decoded into one buffer that all tiles share. Each walk over the tiles
begins where the last one ended, so that the tile in the buffer serves twice; a weight that fits
into the buffer is decoded once for all.

Bytes moved a walk: 3 a weight (half precision) for decoding, beside the GEMMs' own. A dense weight
has the same two functions, which are one GEMM each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from colab_qlora.kernels.int8_decode import Int8Weight, int8_decode_
from colab_qlora.kernels.launch import Launch

# rows of a tile are columns of y: with a multiple of 64 every tile's part of a row begins at a
# multiple of 128 bytes in half precision
TILE_ALIGNMENT = 64


def tile_rows(rows: int, row_bytes: int, most_bytes: int) -> int:
    """Rows of a tile of at most so many bytes: a multiple of 64, and 64 even where that is more.

    Tiles are as equal as the multiple allows, so that none is a sliver.
    """
    most = most_bytes // max(row_bytes, 1) // TILE_ALIGNMENT * TILE_ALIGNMENT
    most = max(TILE_ALIGNMENT, most)
    if rows <= most:
        return max(rows, 1)
    tiles = -(-rows // most)
    return -(-rows // (tiles * TILE_ALIGNMENT)) * TILE_ALIGNMENT


class DenseProducts(NamedTuple):
    """The products of a weight (rows, columns) that stands in memory as it is."""

    weight: torch.Tensor

    def products_(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = x W^T + bias."""
        if bias is None:
            torch.mm(x, self.weight.T, out=out)
        else:
            torch.addmm(bias, x, self.weight.T, out=out)

    def input_gradient_(self, dy: torch.Tensor, out: torch.Tensor) -> None:
        """out = dy W."""
        torch.mm(dy, self.weight, out=out)


class Int8Products:
    """The products of an int8 weight, as long as its tensors stay where they are.

    Args:
        weight: (rows, columns).
        dtype: of x, dy and the decoded tiles.
        most_bytes: for the decoded tile; 64 rows are held at least.
    """

    def __init__(self, weight: Int8Weight, dtype: torch.dtype, most_bytes: int) -> None:
        rows, columns = weight.shape
        step = tile_rows(rows, columns * dtype.itemsize, most_bytes)
        self.tiles = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        self._weight = weight
        self._buffer = torch.empty((min(step, rows), columns), dtype=dtype, device=weight.device)
        self._held: int | None = None
        self._launches: dict[int, Launch | None] = {}

    def products_(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = x W^T + bias: x (tokens, columns), bias (rows,), out (tokens, rows), one dtype."""
        for number in self._walk():
            tile, part = self._decoded(number), self.tiles[number]
            DenseProducts(tile).products_(x, None if bias is None else bias[part], out[:, part])

    def input_gradient_(self, dy: torch.Tensor, out: torch.Tensor) -> None:
        """out = dy W: dy (tokens, rows), out (tokens, columns), both of the tiles' dtype."""
        if len(self.tiles) == 1:
            return DenseProducts(self._decoded(0)).input_gradient_(dy, out)
        # half precision would round at every tile
        is_wide = out.dtype in (torch.float32, torch.float64)
        total = out if is_wide else torch.empty_like(out, dtype=torch.float32)
        total.zero_()
        for number in self._walk():
            columns, tile = dy[:, self.tiles[number]], self._decoded(number)
            if is_wide:
                total.addmm_(columns, tile)
            elif total.is_cuda:
                total += torch.mm(columns, tile, out_dtype=torch.float32)
            else:  # mm has no out_dtype there
                total.addmm_(columns.float(), tile.float())
        if not is_wide:
            out.copy_(total)
        return None

    def _walk(self) -> range:
        """All tiles, from the end where the last walk ended."""
        last = len(self.tiles) - 1
        return range(last, -1, -1) if last and self._held == last else range(last + 1)

    def _decoded(self, number: int) -> torch.Tensor:
        part = self.tiles[number]
        tile = self._buffer[: part.stop - part.start]
        if self._held != number:
            launch = self._launches.get(number)
            if launch is None:
                self._launches[number] = int8_decode_(self._weight.rows(part), tile)
            else:
                launch()
            self._held = number
        return tile


def hide_from_products(beside: torch.Tensor) -> None:
    """Zero new memory that may stand beside a matrix, where a product may read it.

    oneDNN's bfloat16 products for AMX (torch 2.13) read rows in steps of up to 32 columns and
    multiply what is too much by zero, which gives nan where the memory happens to hold one.
    """
    if beside.device.type == "cpu" and beside.dtype == torch.bfloat16:
        beside.zero_()
