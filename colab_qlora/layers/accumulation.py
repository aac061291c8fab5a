"""Have GEMMs in float16 sum in float32 for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_sums(tensor: torch.Tensor) -> Iterator[None]:
    """Keep cuBLAS from adding partial sums in float16, where the largest number is 65,504.

    torch allows it by default. The switch is the process's, so it is put back as it was.
    """
    if not tensor.is_cuda or tensor.dtype != torch.float16:
        yield
        return
    switches = torch.backends.cuda.matmul
    before = switches.allow_fp16_reduced_precision_reduction
    switches.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        switches.allow_fp16_reduced_precision_reduction = before
