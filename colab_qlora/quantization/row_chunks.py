"""A few rows of a matrix at a time, so that what is made of them in float32 stays small.

A head of 128256 x 4096 is 1.05 GB in 16 bit; a float32 copy of it and two results would be 6.3 GB
more. Here each temporary is 16 MiB, and a GEMM of that many rows still fills a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

# numbers of a temporary
CHUNK = 2**22


def row_slices(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Slices that cover all rows, of at most `CHUNK` numbers each if `multiple` allows it.

    Args:
        rows, columns: of the matrix.
        multiple: each slice starts at a multiple of this many rows.
    """
    step = max(1, CHUNK // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
