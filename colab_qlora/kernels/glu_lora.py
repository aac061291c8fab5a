"""The backward pass of a gated linear unit with the LoRA gradients that contract its results.

    m = act(gate) * up        d_gate, d_up as in swiglu.py
    d_a = ds^T m        d_b_gate = d_gate^T xg        d_b_up = d_up^T xu

ds = dY sB is down_proj's, xg and xu = X sA^T are those of gate and up. All three products contract
over the tokens. A program owns a block of columns and walks over a share of the tokens, so that m,
d_gate and d_up meet their factors on the way, rounded to half precision as GEMMs of their own would
read them; m is never written. The shares' sums are float32 and are added in a fixed order: a result
is the same every time.

Bytes moved a value of half precision: 10 (dm, gate and up in, both gradients out), where
`glu_backward` with m and three GEMMs move 18. The factors come from the L2 cache, for every block
of columns anew; the sums are 8 bytes a share for each number of the results, 4 if there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import has_tensor_core_dot, runs_triton, triton
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase
from colab_qlora.kernels.glu_lora_kernel import backward_kernel
from colab_qlora.kernels.glu_lora_reference import Sums, glu_lora_reference_backward
from colab_qlora.kernels.launch import ReadyLaunches, address, layout
from colab_qlora.kernels.swiglu import ACTIVATIONS, check_glu

MAX_RANK = 64

# tl.dot's shortest side
_MIN_RANK = 16


class Form(NamedTuple):
    """How the work is cut up.

    Attributes:
        tokens, columns: of a program's tile.
        stages: of the pipeline; two tiles are under way while a third is computed, and so on.
        programs: for each multiprocessor. All run at once if there are no more than that; of a
            second round few would be left, which would not keep the memory busy.
    """

    tokens: int
    columns: int
    stages: int
    programs: int


WARPS = 4

# the fastest of those tried on an H100 at 4,096 tokens of 14,336 and rank 16 (benchmarks/LOG.md,
# `python -m benchmarks.glu_lora_forms`). It fills the registers, so that larger ranks would spill
LARGE = Form(tokens=32, columns=128, stages=3, programs=2)
SMALL = Form(tokens=16, columns=64, stages=4, programs=5)
MOST_RANKS_OF_LARGE = 48

# the sums of three times 16 ranks are 38 tokens' worth of bytes: a share has several times that
MIN_SHARE_TOKENS = 128

_launches = ReadyLaunches()


@functools.cache
def _processors(device_index: int) -> int:
    # a negative one is the CPU's, for Triton's interpreter
    if device_index < 0:
        return 2
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def form_for(padded_ranks: Sequence[int]) -> Form:
    """The form for these ranks, each a multiple of 16 or 0."""
    return LARGE if sum(padded_ranks) <= MOST_RANKS_OF_LARGE else SMALL


def share_of_tokens(tokens: int, width: int, processors: int, form: Form) -> int:
    """How many tokens a program walks over, a multiple of its tile."""
    blocks = triton.cdiv(width, form.columns)
    shares = max(1, processors * form.programs // blocks)
    share = max(triton.cdiv(tokens, shares), min(tokens, MIN_SHARE_TOKENS))
    return triton.cdiv(share, form.tokens) * form.tokens


def _rank(factor: torch.Tensor | None) -> int:
    return 0 if factor is None else factor.shape[1]


def padded_rank(rank: int) -> int:
    """Columns of a factor's tile: a power of two, 16 at least; 0 without a factor."""
    return max(_MIN_RANK, triton.next_power_of_2(rank)) if rank else 0


def _start(
    key: Hashable, tensors: tuple[torch.Tensor | None, ...], activation: str
) -> torch.Tensor:
    gate, factors = tensors[0], tensors[5:]
    assert gate is not None
    tokens, width = gate.shape
    ranks = [_rank(factor) for factor in factors]
    padded = [padded_rank(rank) for rank in ranks]
    form = form_for(padded)
    share = share_of_tokens(tokens, width, _processors(gate.get_device()), form)
    grid = (triton.cdiv(width, form.columns), triton.cdiv(tokens, share))
    sums = gate.new_empty((grid[1], sum(ranks) * width), dtype=torch.float32)
    strides = [0 if tensor is None else tensor.stride(0) for tensor in tensors]
    constants = (tokens, width, share, *strides, *ranks, activation, *padded)
    constants = (*constants, form.tokens, form.columns)
    options = {"num_warps": WARPS, "num_stages": form.stages}
    _launches.start(key, backward_kernel, grid, (*tensors, sums), constants, **options)
    return sums


def _results(sums: torch.Tensor, factors: Sums, width: int) -> Sums:
    """The sum over the shares, as d_a, d_b_gate and d_b_up."""
    total = sums[0] if sums.shape[0] == 1 else sums.sum(0)
    sizes = [_rank(factor) * width for factor in factors]
    parts = zip(total.split(sizes), factors, (False, True, True), strict=True)
    d_a, d_b_gate, d_b_up = (
        None if factor is None else part.view((width, -1) if is_b else (-1, width))
        for part, factor, is_b in parts
    )
    return d_a, d_b_gate, d_b_up


def _check_factors(gate: torch.Tensor, **factors: torch.Tensor | None) -> None:
    for name, factor in factors.items():
        if factor is None:
            continue
        if factor.ndim != 2 or factor.shape[0] != gate.shape[0] or not factor.shape[1]:
            problem, got = "has another shape", str(tuple(factor.shape))
            allowed = f"({gate.shape[0]}, rank)"
        elif factor.dtype != gate.dtype or factor.device != gate.device:
            problem, got = "has another dtype or device", f"{factor.dtype} on {factor.device}"
            allowed = f"gate's, {gate.dtype} on {gate.device}"
        elif factor.shape[1] > 1 and factor.stride(1) != 1:
            problem, got = "has gaps inside its rows", f"strides {factor.stride()}"
            allowed = "a last stride of 1"
        else:
            continue
        raise UserError(f"{name} {problem}", got=got, allowed=allowed)


def can_fuse_glu_lora(gate: torch.Tensor, *factors: torch.Tensor | None) -> bool:
    """True if `glu_lora_backward` is one kernel for these; else it is slower than its parts.

    Args:
        gate: as given there.
        factors: ds, xg and xu, or those of them that there are.
    """
    return (
        gate.dtype in (torch.float16, torch.bfloat16)
        and runs_triton(gate)
        and has_tensor_core_dot(gate)
        and all(_rank(factor) <= MAX_RANK for factor in factors)
        and any(factor is not None for factor in factors)
    )


def glu_lora_backward(
    dm: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    ds: torch.Tensor | None,
    xg: torch.Tensor | None,
    xu: torch.Tensor | None,
    *,
    activation: str = "silu",
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
) -> Sums:
    """Both gradients of act(gate) * up, and their products with the LoRA factors beside them.

    It can work in place: `d_gate` may be `gate` and `d_up` may be `up`, the very same views.

    Args:
        dm: gradient of the product, (tokens, width), last stride 1, any row stride.
        gate, up: as in `glu_forward`, of one dtype with dm and the outputs where it is to be fast.
        ds: (tokens, rank) in gate's dtype, last stride 1, any row stride: dY sB of down_proj. None
            leaves its product out, as with the others.
        xg: likewise: X sA^T of gate_proj.
        xu: likewise: X sA^T of up_proj.
        activation: "silu", "gelu_tanh" or "gelu".
        d_gate, d_up: written to: gate's shape, last stride 1; the same bits as by `glu_backward`.

    Returns:
        ds^T m (rank, width), d_gate^T xg (width, rank) and d_up^T xu (width, rank) of the rounded
        m, d_gate and d_up; float32, or float64 for that. They may be views of one buffer.

    Raises:
        UserError: as `glu_backward`; or a factor has other tokens, another dtype or gaps in a row.
    """
    tensors, factors = (gate, up, dm, d_gate, d_up), (ds, xg, xu)
    key = ready = None
    if runs_triton(gate):
        key = (activation, *map(layout, tensors), *map(layout, factors))
        ready = _launches.get(key)
    if ready is not None:
        width = gate.shape[1]
        size = width * (_rank(ds) + _rank(xg) + _rank(xu))
        sums = gate.new_empty((ready.grid[1], size), dtype=torch.float32)
        ready(*map(address, (*tensors, *factors, sums)))
        return _results(sums, factors, width)
    check_glu(activation, gate=gate, up=up, dm=dm, d_gate=d_gate, d_up=d_up)
    _check_factors(gate, ds=ds, xg=xg, xu=xu)
    is_one_dtype = all(tensor.dtype == gate.dtype for tensor in tensors)
    if gate.numel() and is_one_dtype and can_fuse_glu_lora(gate, *factors):
        return _results(_start(key, (*tensors, *factors), activation), factors, gate.shape[1])
    return glu_lora_reference_backward(*tensors, *factors, activation)


def compile_cases() -> list[CompileCase]:
    """Every activation at the usual rank; the largest; factors at any address; one factor alone."""
    usual = [(f"{name} 16", name, (16, 16, 16), True) for name in ACTIVATIONS]
    kinds = [
        *usual,
        ("silu 64", "silu", (64, 64, 64), True),
        ("silu 16 unaligned", "silu", (16, 16, 16), False),
        ("silu 64 unaligned", "silu", (64, 64, 64), False),
        ("silu down alone 16", "silu", (16, 0, 0), True),
    ]
    return [_compile_case(*kind) for kind in kinds]


def _compile_case(
    name: str, activation: str, ranks: tuple[int, int, int], is_aligned: bool
) -> CompileCase:
    form = form_for(ranks)
    wide = ["gate", "up", "dm", "d_gate", "d_up"]
    factors, numbers = ["ds", "xg", "xu"], ["d_rank", "g_rank", "u_rank"]
    rows = [f"{tensor}_row" for tensor in (*wide, *factors)]
    divisible = [*wide, "sums", "width", *(f"{tensor}_row" for tensor in wide)]
    return CompileCase(
        name=f"glu_lora_backward {name}",
        kernel=backward_kernel,
        signature=dict.fromkeys((*wide, *factors), HALF)
        | {"sums": FLOAT}
        | dict.fromkeys(("tokens", "width", "share", *rows, *numbers), "i32"),
        constexprs=dict(zip(("D_RANK", "G_RANK", "U_RANK"), ranks, strict=True))
        | {"ACTIVATION": activation, "TOKENS": form.tokens, "COLUMNS": form.columns},
        divisible_by_16=(*divisible, *(factors + rows[5:] + numbers if is_aligned else ())),
        uses_dot=True,
        num_warps=WARPS,
        num_stages=form.stages,
    )
