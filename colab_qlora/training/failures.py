"""Recognise that memory ran out, whoever reports it; a full disk is `disk.is_disk_full`."""

from __future__ import annotations

import torch

from colab_qlora.errors import error_chain


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host."""
    return any(
        isinstance(seen, (torch.OutOfMemoryError, MemoryError))
        # torch reports the host's memory as a plain RuntimeError
        or "can't allocate memory" in str(seen)
        or "CUDA out of memory" in str(seen)
        for seen in error_chain(error)
    )
