"""Triton or torch: which implementation of an op runs for a tensor.

Triton kernels run on CUDA tensors, and on CPU tensors under Triton's interpreter
(`TRITON_INTERPRET=1`, for tests: correct in float32 and float16, slow). Everywhere else the torch
reference runs. `use_backend` overrules the choice, for tests and benchmarks.

`tl.dot` has no tensor cores below compute capability 8.0 since Triton 3.3, so a kernel with a
`tl.dot` in it is asked for only where `has_tensor_core_dot` says so.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no wheel; the references run there

    def _no_jit(function: Callable | None = None, **options: Any) -> Any:
        return (lambda inner: inner) if function is None else function

    triton = SimpleNamespace(
        jit=_no_jit,
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << max(n - 1, 0).bit_length(),
    )
    tl = SimpleNamespace(constexpr=Any)
    HAS_TRITON = False
else:
    HAS_TRITON = True

Backend = Literal["triton", "torch"]

_forced: Backend | None = None


@functools.cache
def is_interpreting() -> bool:
    """True if kernels run under Triton's interpreter, on the CPU; set when kernels are defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(tensor: torch.Tensor) -> bool:
    """True if an op on `tensor` launches its Triton kernel, False if it runs the reference.

    The kernels compute in float32, so float64 runs the reference on every device.
    """
    if tensor.dtype == torch.float64:
        return False
    if _forced is not None:
        return _forced == "triton"
    return HAS_TRITON and tensor.is_cuda and not is_interpreting()


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run every op inside the block by Triton or by torch, whatever the tensor.

    Raises:
        ValueError: another name, or "triton" where Triton is not installed.
    """
    global _forced
    if name not in ("triton", "torch"):
        raise ValueError(f"backend is not understood: got {name!r}; allowed: 'triton', 'torch'")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@functools.cache
def compute_capability(device_index: int) -> tuple[int, int]:
    """(major, minor) of a CUDA device; asked once, since it is read at every attention call."""
    return torch.cuda.get_device_capability(device_index)


def has_tensor_core_dot(tensor: torch.Tensor) -> bool:
    """True if `tl.dot` may run for this tensor: compute capability 8.0 up, or the interpreter."""
    if tensor.is_cuda:
        index = tensor.device.index
        index = torch.cuda.current_device() if index is None else index
        return compute_capability(index) >= (8, 0)
    return is_interpreting()
