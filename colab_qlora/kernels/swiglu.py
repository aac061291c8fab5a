"""Gated linear units, the middle of a Llama-like MLP: SwiGLU, and GEGLU in both its forms.

    m = act(gate) * up          act(g) = g * s(g)
    d_gate = dm * up * act'(gate)      d_up = dm * act(gate)      act'(g) = s(g) + g * s'(g)

    "silu"       s(g) = sigmoid(g)
    "gelu"       s(g) = (1 + erf(g / sqrt(2))) / 2
    "gelu_tanh"  s(g) = (1 + tanh(z)) / 2 = sigmoid(2 z),  z = sqrt(2 / pi) (g + 0.044715 g^3)

All of it is float32 inside and rounded once, where `act(gate) * up` rounds act(gate) as well.

Bytes moved a value of half precision: forward 6 (gate and up in, m out); backward 12 (dm, gate and
up in, both gradients and m out), 10 without m. The backward pass writes m anew, since the LoRA
gradient of the projection behind it needs m, and keeping it would cost 2 bytes a value until then.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import runs_triton, triton
from colab_qlora.kernels.compile_case import HALF, CompileCase
from colab_qlora.kernels.launch import ReadyLaunches, address, layout
from colab_qlora.kernels.misfit import FLOAT_DTYPES
from colab_qlora.kernels.swiglu_kernels import backward_kernel, forward_kernel
from colab_qlora.kernels.swiglu_reference import glu_reference_backward, glu_reference_forward

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")

# transformers' names of the same functions. Not here: "gelu_fast", which rounds sqrt(2 / pi) to ten
# digits, and "quick_gelu" and "gelu_10", which are other functions
_TRANSFORMERS_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}

# two 16-byte loads of half values for each of a program's 128 threads and each tensor
TILE_ELEMENTS = 2048

_forward_launches = ReadyLaunches()
_backward_launches = ReadyLaunches()


def _start(
    launches: ReadyLaunches,
    key: Hashable,
    kernel: Any,
    tensors: tuple[torch.Tensor | None, ...],
    flags: tuple[Any, ...],
) -> None:
    """Launch over the shape of the first; a kernel takes tensors, tokens, width, row strides."""
    gate = tensors[0]
    assert gate is not None
    tokens, width = gate.shape
    block = min(TILE_ELEMENTS, triton.next_power_of_2(width))
    rows = TILE_ELEMENTS // block
    strides = [0 if tensor is None else tensor.stride(0) for tensor in tensors]
    grid = (triton.cdiv(tokens, rows), triton.cdiv(width, block))
    launches.start(key, kernel, grid, tensors, (tokens, width, *strides, *flags, rows, block))


class _GatedLinearUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu_forward(gate, up, activation=activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dm):
        gate, up = ctx.saved_tensors
        grads = glu_backward(_as_rows(dm), gate, up, activation=ctx.activation, rebuild=False)
        return *grads[:2], None


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(..., width) as (tokens, width) with last stride 1, copied only where no view is that."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _new_like(gate: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def check_glu(activation: str, gate: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise UserError unless the activation is known, and the tensors fit the gate."""
    if activation not in ACTIVATIONS:
        raise UserError(
            "activation is not known", got=repr(activation), allowed=", ".join(ACTIVATIONS)
        )
    for name, tensor in {"gate": gate, **others}.items():
        if tensor is None:
            continue
        if tensor.ndim != 2 or tensor.shape != gate.shape:
            problem, got = "has another shape", str(tuple(tensor.shape))
            allowed = f"(tokens, width), gate has {tuple(gate.shape)}"
        elif tensor.dtype not in FLOAT_DTYPES or tensor.device != gate.device:
            problem, got = "has another dtype or device", f"{tensor.dtype} on {tensor.device}"
            allowed = f"floating, on {gate.device}"
        elif tensor.shape[1] > 1 and tensor.stride(1) != 1:
            problem, got = "has gaps inside its rows", f"strides {tensor.stride()}"
            allowed = "a last stride of 1"
        else:
            continue
        raise UserError(f"{name} {problem}", got=got, allowed=allowed)


def activation_name(hidden_act: str) -> str | None:
    """The activation that a transformers config's `hidden_act` means, or None if it is not here.

    Example:
        >>> activation_name("gelu_pytorch_tanh"), activation_name("relu2")
        ('gelu_tanh', None)
    """
    return _TRANSFORMERS_NAMES.get(hidden_act)


def glu_forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    activation: str = "silu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(gate) * up, outside autograd.

    Args:
        gate: (tokens, width), any floating dtype, last stride 1, any row stride.
        up: like gate; usually the two are the column halves of one buffer.
        activation: "silu", "gelu_tanh" or "gelu".
        out: written to if given: gate's shape, last stride 1, such as columns of a wider buffer.

    Returns:
        (tokens, width) in gate's dtype, or `out`.

    Raises:
        UserError: another activation, shapes or devices that differ, or gaps inside a row.
    """
    key = ready = None
    if runs_triton(gate):
        key = (activation, layout(gate), layout(up), layout(out))
        ready = _forward_launches.get(key)
    if ready is None:
        check_glu(activation, gate=gate, up=up, out=out)
    out = _new_like(gate) if out is None else out
    if ready is not None:
        ready(gate.data_ptr(), up.data_ptr(), out.data_ptr())
    elif key is not None and gate.numel():
        _start(_forward_launches, key, forward_kernel, (gate, up, out), (activation,))
    elif gate.numel():
        glu_reference_forward(gate, up, out, activation)
    return out


def glu_backward(
    dm: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    activation: str = "silu",
    d_gate: torch.Tensor | None = None,
    d_up: torch.Tensor | None = None,
    m: torch.Tensor | None = None,
    rebuild: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Both gradients of act(gate) * up, and that product once more, in one pass.

    It can work in place: `d_gate` may be `gate`, `d_up` may be `up` and `m` may be `dm`, each the
    very same view, since every value is read before its place is written.

    Args:
        dm: gradient of the product, (tokens, width), last stride 1, any row stride.
        gate, up: as in the forward pass.
        activation: "silu", "gelu_tanh" or "gelu".
        d_gate, d_up, m: written to if given: gate's shape, last stride 1.
        rebuild: also compute m = act(gate) * up.

    Returns:
        The gradients of gate and up, and m, or None in its place without `rebuild`. New tensors
        have gate's dtype.

    Raises:
        UserError: as `glu_forward`; or `m` is given although it is not to be rebuilt.
    """
    key = ready = None
    if runs_triton(gate):
        key = (activation, rebuild, *map(layout, (gate, up, dm, d_gate, d_up, m)))
        ready = _backward_launches.get(key)
    if ready is None:
        check_glu(activation, gate=gate, up=up, dm=dm, d_gate=d_gate, d_up=d_up, m=m)
        if m is not None and not rebuild:
            problem = "m is given but not to be rebuilt"
            raise UserError(problem, got="rebuild=False", allowed="m=None")
    d_gate = _new_like(gate) if d_gate is None else d_gate
    d_up = _new_like(gate) if d_up is None else d_up
    m = _new_like(gate) if m is None and rebuild else m
    tensors = (gate, up, dm, d_gate, d_up, m)
    if ready is not None:
        ready(*map(address, tensors))
    elif key is not None and gate.numel():
        _start(_backward_launches, key, backward_kernel, tensors, (activation, rebuild))
    elif gate.numel():
        glu_reference_backward(*tensors, activation)
    return d_gate, d_up, m


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up, differentiable once.

    Args:
        gate: (..., width), any floating dtype.
        up: like gate, of the same dtype.
        activation: "silu", "gelu_tanh" or "gelu".

    Returns:
        gate's shape and dtype. gate and up are kept for the backward pass, nothing else.

    Raises:
        UserError: another activation, or shapes, dtypes or devices that differ.
    """
    if gate.ndim < 1 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise UserError(
            "gate and up differ",
            got=f"{tuple(gate.shape)} in {gate.dtype} and {tuple(up.shape)} in {up.dtype}",
            allowed="one shape (..., width) and one dtype",
        )
    m = _GatedLinearUnit.apply(_as_rows(gate), _as_rows(up), activation)
    return m.view(gate.shape)


def compile_cases() -> list[CompileCase]:
    """Every activation, forward and backward, on a tile of the usual width."""
    cases = []
    for activation in ACTIVATIONS:
        for kernel, tensors in (
            (forward_kernel, ["gate", "up", "out"]),
            (backward_kernel, ["gate", "up", "dm", "d_gate", "d_up", "m"]),
        ):
            strides = [f"{name}_row" for name in tensors]
            flags = {"REBUILD": True} if "dm" in tensors else {}
            case = CompileCase(
                name=f"glu_{'backward' if flags else 'forward'} {activation}",
                kernel=kernel,
                signature=dict.fromkeys(tensors, HALF)
                | dict.fromkeys(["tokens", "width", *strides], "i32"),
                constexprs={"ACTIVATION": activation, "ROWS": 1, "BLOCK": TILE_ELEMENTS, **flags},
                divisible_by_16=(*tensors, "width", *strides),
            )
            cases.append(case)
    return cases
