"""What the process's settings have to be while a fused layer computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

# entered where there is nothing to set, which is nearly always: setting costs the host 10 us
_NOTHING: AbstractContextManager[Any] = nullcontext()


def no_autocast(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off for the tensor's device, if it is on."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def float32_sums(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Keep cuBLAS from adding partial sums in float16, where the largest number is 65,504."""
    return _float32_sums() if tensor.is_cuda and tensor.dtype == torch.float16 else _NOTHING


@contextmanager
def _float32_sums() -> Iterator[None]:
    # torch allows such sums by default. The switch is the process's, so it is put back as it was
    switches = torch.backends.cuda.matmul
    before = switches.allow_fp16_reduced_precision_reduction
    switches.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        switches.allow_fp16_reduced_precision_reduction = before
