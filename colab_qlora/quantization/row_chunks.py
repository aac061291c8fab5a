"""A few rows of a matrix at a time, so that what is made of them in float32 stays small.

A head of 128256 x 4096 is 1.05 GB in 16 bit; a float32 copy of it and two results would be 6.3 GB
more. Here each temporary is 16 MiB, and a GEMM of that many rows still fills a GPU. Where many
matrices are gone through and memory is free, `memory_room.larger_chunks` takes more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# numbers of a temporary
CHUNK = 2**22
# instead of it, in this thread
_numbers: ContextVar[int | None] = ContextVar("numbers of a chunk", default=None)


@contextmanager
def chunks_of(numbers: int) -> Iterator[None]:
    """Have `row_slices` give slices of at most so many numbers, in this thread."""
    before = _numbers.set(numbers)
    try:
        yield
    finally:
        _numbers.reset(before)


def row_slices(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Slices that cover all rows, of at most `CHUNK` numbers each if `multiple` allows it.

    Args:
        rows, columns: of the matrix.
        multiple: each slice starts at a multiple of this many rows.
    """
    numbers = _numbers.get() or CHUNK
    step = max(1, numbers // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
