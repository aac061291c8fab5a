"""Recognise the two failures that end most runs: memory and disk, whoever reports them."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import torch


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host."""
    return any(
        isinstance(seen, (torch.OutOfMemoryError, MemoryError))
        # torch reports the host's memory as a plain RuntimeError
        or "can't allocate memory" in str(seen)
        or "CUDA out of memory" in str(seen)
        for seen in _chain(error)
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space."""
    return any(
        getattr(seen, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        # safetensors and torch's archive writer report a failed write in words of their own
        or "No space left on device" in str(seen)
        or "os error 28" in str(seen)
        or "file write failed" in str(seen)
        for seen in _chain(error)
    )
