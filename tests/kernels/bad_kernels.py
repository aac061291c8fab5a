"""Kernels that compile_check has to refuse, one good one, and what it says of them, as JSON.

Run as a program, since Triton compiles nothing in a process that imported it as an interpreter.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import triton
import triton.language as tl

from colab_qlora.kernels.compile_case import FLOAT, CompileCase
from colab_qlora.kernels.compile_check import check, exit_status


@triton.jit
def copy_kernel(x, y, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tl.store(y + offset, tl.load(x + offset))


@triton.jit
def softmax_kernel(x, y, BLOCK: tl.constexpr):
    """A whole block in registers: 256 values a thread, of one warp."""
    offset = tl.arange(0, BLOCK)
    value = tl.load(x + offset)
    value = tl.exp(value - tl.max(value, axis=0))
    tl.store(y + offset, value / tl.sum(value, axis=0))


@triton.jit
def transpose_kernel(x, y, SIDE: tl.constexpr):
    """A whole tile in shared memory, to turn its layout."""
    row = tl.arange(0, SIDE)[:, None]
    column = tl.arange(0, SIDE)[None, :]
    tile = tl.load(x + row * SIDE + column)
    tl.store(y + row * SIDE + column, tl.trans(tile))


@triton.jit
def matmul_kernel(x, y, SIDE: tl.constexpr):
    offset = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tile = tl.load(x + offset)
    tl.store(y + offset, tl.dot(tile, tile))


@triton.jit
def refused_kernel(x, y, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 16, "a block this large is refused")


def case(name: str, kernel, num_warps: int = 4, **constexprs: int) -> CompileCase:
    tensors = dict.fromkeys(("x", "y"), FLOAT)
    return CompileCase(name, kernel, tensors, constexprs, num_warps, divisible_by_16=("x", "y"))


CASES = {
    "good": case("good", copy_kernel, BLOCK=128),
    "spills": case("spills", softmax_kernel, num_warps=1, BLOCK=8192),
    "shared memory": case("shared memory", transpose_kernel, num_warps=8, SIDE=256),
    "hidden dot": case("hidden dot", matmul_kernel, SIDE=16),
    "no code": case("no code", refused_kernel, BLOCK=128),
    "other arguments": case("other arguments", copy_kernel, SIZE=128),
}


def main(names: list[str]) -> int:
    """Check the cases of these names for sm_75; returns compile_check's exit status."""
    results = list(check([CASES[name] for name in names], 75))
    print(json.dumps([dataclasses.asdict(result) for result in results]))
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
