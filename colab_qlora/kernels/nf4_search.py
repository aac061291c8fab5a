"""Find the scale of every NF4 block that leaves the least weighted error, in one launch.

    error(s) = sum_j h_j (w_j - s c_j)^2        c_j: the NF4 level nearest to w_j / s

over the scales s = f * absmax with FACTORS factors f, or over scales given block by block; then
REFITS rounds of the least-squares scale of the levels chosen, s = sum h w c / sum h c c. The first
candidate is the stock one; another replaces it only if its error is lower by more than
`LEAST_GAIN`, so that rounding never makes a block worse. colab_qlora/quantization/scale_search.py
says why these scales, and has the same in torch.

A program keeps its weights in registers through all rounds. Bytes moved a weight of half precision,
blocks of 64: 2 in, 0.125 for absmax in and scale out, 1 out for the code. The arithmetic outweighs
them: each of the 22 roundings to a level is 15 comparisons and 15 selections, since a table look-up
a weight would be slower than registers.
"""

from __future__ import annotations

import torch

from colab_qlora.kernels.backend import tl, triton
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase

# float32 values of bitsandbytes' NF4 code, lowest first
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# a value above the k-th is nearer to level k + 1; the means of float32, as bitsandbytes has them
NF4_THRESHOLDS = tuple(
    ((torch.tensor(NF4_LEVELS[1:]) + torch.tensor(NF4_LEVELS[:-1])) / 2).tolist()
)

# factors of absmax, 0.70 to 1.50: few blocks are best below, and 1.44 puts the largest value on the
# last level but one; between the steps the refits find the rest
FIRST_FACTOR, FACTOR_STEP, FACTORS = 0.70, 0.05, 17

REFITS = 3

# sums of 64 float32 terms are off by about 1e-6
LEAST_GAIN = 1e-5

# below, a reciprocal or a square may overflow or vanish in float32; such blocks stay as they are
TINY = 1e-30

# 16 weights for each of a program's 128 threads, with as many column weights, stay in registers
PROGRAM_WEIGHTS = 2048


@triton.jit
def _nearest_level(v, LEVELS: tl.constexpr, THRESHOLDS: tl.constexpr):
    level = tl.zeros_like(v) + LEVELS[0]
    for k in tl.static_range(15):
        level = tl.where(v > THRESHOLDS[k], LEVELS[k + 1], level)
    return level


@triton.jit
def _inverse(s, TINY: tl.constexpr):
    # a scale of nothing leaves every weight at level 0
    is_tiny = tl.abs(s) < TINY
    return tl.where(is_tiny, 0.0, 1.0 / tl.where(is_tiny, 1.0, s))


@triton.jit
def _error(u, h, s, LEVELS: tl.constexpr, THRESHOLDS: tl.constexpr, TINY: tl.constexpr):
    c = _nearest_level(u * _inverse(s, TINY)[:, None], LEVELS, THRESHOLDS)  # [BLOCKS, BLOCKSIZE]
    difference = u - s[:, None] * c
    return tl.sum(h * difference * difference, axis=1)


@triton.jit(do_not_specialize=["weights"])
def _search_kernel(
    weight, column_weights, absmax, cap, scales, codes, best, weights, columns,
    BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
    FIRST_FACTOR: tl.constexpr, FACTOR_STEP: tl.constexpr, FACTORS: tl.constexpr,
    REFITS: tl.constexpr, LEVELS: tl.constexpr, THRESHOLDS: tl.constexpr,
    LEAST_GAIN: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """CANDIDATES scales a block are read from `scales`; if 0, they are absmax times factors."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]  # [BLOCKS, BLOCKSIZE]
    left = weights - first * BLOCKSIZE
    is_weight = place < left
    is_block = block * BLOCKSIZE < left

    # in units of absmax, squares neither vanish nor overflow
    largest = tl.load(absmax + first + block, mask=is_block, other=0.0)
    unit = tl.maximum(largest, TINY)
    inverse_unit = 1.0 / unit
    w = tl.load(weight + first * BLOCKSIZE + place, mask=is_weight, other=0.0).to(tl.float32)
    u = w * inverse_unit[:, None]
    if column_weights is not None:
        # one division of 64 bits a program
        first_column = (first * BLOCKSIZE % columns).to(tl.int32)
        column = (first_column + place) % columns
        h = tl.load(column_weights + column, mask=is_weight, other=0.0)
    else:
        h = tl.full([BLOCKS, BLOCKSIZE], 1.0, tl.float32)

    limit = tl.full([BLOCKS], float("inf"), tl.float32)
    if cap is not None:
        limit = tl.load(cap + first + block, mask=is_block, other=0.0) * inverse_unit
    if CANDIDATES > 0:
        row = scales + (first + block) * CANDIDATES
        best_scale = tl.load(row, mask=is_block, other=0.0)
        best_s = best_scale * inverse_unit
    else:
        best_scale = largest
        best_s = tl.where(largest < TINY, largest * inverse_unit, 1.0)
    least = _error(u, h, best_s, LEVELS, THRESHOLDS, TINY) * (1 - LEAST_GAIN)

    if CANDIDATES > 0:
        for k in range(1, CANDIDATES):
            scale = tl.load(row + k, mask=is_block, other=0.0)
            s = scale * inverse_unit
            error = _error(u, h, s, LEVELS, THRESHOLDS, TINY)
            is_better = error < least
            least = tl.where(is_better, error, least)
            best_s = tl.where(is_better, s, best_s)
            best_scale = tl.where(is_better, scale, best_scale)
    else:
        # the refits start from the grid's best, be it below the stock scale's gain or not
        start = best_s
        start_error = tl.full([BLOCKS], float("inf"), tl.float32)
        # loops that stay loops: unrolled, this takes 10 s to compile
        for k in range(FACTORS):
            s = tl.minimum(FIRST_FACTOR + FACTOR_STEP * k, limit)
            error = _error(u, h, s, LEVELS, THRESHOLDS, TINY)
            is_better = error < start_error
            start_error = tl.where(is_better, error, start_error)
            start = tl.where(is_better, s, start)
        is_normal = largest >= TINY
        for _ in range(REFITS + 1):
            c = _nearest_level(u * _inverse(start, TINY)[:, None], LEVELS, THRESHOLDS)
            difference = u - start[:, None] * c
            error = tl.sum(h * difference * difference, axis=1)
            is_better = is_normal & (error < least)
            least = tl.where(is_better, error, least)
            best_s = tl.where(is_better, start, best_s)
            best_scale = tl.where(is_better, start * unit, best_scale)
            above = tl.sum(h * u * c, axis=1)
            below = tl.sum(h * c * c, axis=1)
            is_fit = (above > 0) & (below > 0)
            fit = above / tl.where(is_fit, below, 1.0)
            start = tl.where(is_fit, tl.minimum(fit, limit), start)

    tl.store(best + first + block, best_scale, mask=is_block)
    if codes is not None:
        v = u * _inverse(best_s, TINY)[:, None]
        code = tl.zeros_like(place)
        for k in tl.static_range(15):
            code += (v > THRESHOLDS[k]).to(tl.int32)
        tl.store(codes + first * BLOCKSIZE + place, code.to(tl.uint8), mask=is_weight)


_CONSTANTS = {
    "FIRST_FACTOR": FIRST_FACTOR,
    "FACTOR_STEP": FACTOR_STEP,
    "FACTORS": FACTORS,
    "REFITS": REFITS,
    "LEVELS": NF4_LEVELS,
    "THRESHOLDS": NF4_THRESHOLDS,
    "LEAST_GAIN": LEAST_GAIN,
    "TINY": TINY,
}


def launch_search(
    weight: torch.Tensor,
    column_weights: torch.Tensor | None,
    absmax: torch.Tensor,
    blocksize: int,
    *,
    cap: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
) -> torch.Tensor:
    """The best scale of every block, by the kernel; nothing is checked.

    Args:
        weight: (rows, columns), contiguous, float16, bfloat16 or float32, finite.
        column_weights: (columns,), float32, not negative; None for an unweighted error.
        absmax: (blocks,), float32, the largest magnitude in every block; the last may be short.
        blocksize: 32 or 64.
        cap: (blocks,), float32, the largest scale allowed; None for no limit.
        scales: (blocks, candidates), float32, the only scales to choose from, the stock one first;
            None to search.
        codes: written to if given: (weights,), uint8, the codes for the best scales.

    Returns:
        float32, (blocks,).
    """
    best = torch.empty_like(absmax)
    blocks = PROGRAM_WEIGHTS // blocksize
    _search_kernel[(triton.cdiv(absmax.numel(), blocks),)](
        weight, column_weights, absmax, cap, scales, codes, best,
        weight.numel(), weight.shape[1],
        BLOCKSIZE=blocksize, BLOCKS=blocks, CANDIDATES=0 if scales is None else scales.shape[1],
        **_CONSTANTS,
    )  # fmt: skip
    return best


def compile_cases() -> list[CompileCase]:
    """The search with and without column weights, and the choice among levels after it."""
    return [
        _case("weighted", 64, ("column_weights", "cap")),
        _case("weighted, blocks of 32", 32, ("column_weights", "cap")),
        _case("plain, with codes", 64, ("codes",)),
        _case("levels", 64, ("column_weights", "scales", "codes"), candidates=4),
    ]


def _case(name: str, blocksize: int, present: tuple[str, ...], candidates: int = 0) -> CompileCase:
    optional = ("column_weights", "cap", "scales", "codes")
    pointers = {key: "*u8" if key == "codes" else FLOAT for key in optional if key in present}
    pointers |= {"weight": HALF, "absmax": FLOAT, "best": FLOAT}
    return CompileCase(
        name=f"nf4_search {name}",
        kernel=_search_kernel,
        signature=pointers | {"weights": "i32", "columns": "i32"},
        constexprs={
            **{key: None for key in optional if key not in present},
            **_CONSTANTS,
            "BLOCKSIZE": blocksize,
            "BLOCKS": PROGRAM_WEIGHTS // blocksize,
            "CANDIDATES": candidates,
        },
        divisible_by_16=(*pointers, "columns"),
    )
