"""The error of a kernel for a tensor that does not fit, and checks that several kernels share."""

from __future__ import annotations

from typing import Protocol

import torch

from colab_qlora.errors import UserError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def misfit(problem: str, x: torch.Tensor, allowed: str) -> UserError:
    """The error that says what was got instead of what is allowed."""
    got = f"{x.dtype}, shape {tuple(x.shape)}, strides {x.stride()} on {x.device}"
    return UserError(problem, got=got, allowed=allowed)


class Decodable(Protocol):
    """A quantised weight: what it decodes to is a matrix of this shape, on this device."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def device(self) -> torch.device: ...


def check_out(out: torch.Tensor, weight: Decodable, dtype: torch.dtype | None = None) -> None:
    """Raise UserError unless the weight can be decoded into `out`.

    Args:
        out: any row stride, such as columns of a wider buffer.
        weight: an `NF4State` or an `Int8Weight`.
        dtype: what `out` has to have; None for any floating dtype.
    """
    if out.shape != weight.shape or out.device != weight.device:
        got = f"{tuple(out.shape)} on {out.device}"
        allowed = f"{tuple(weight.shape)} on {weight.device}"
        raise UserError("out does not fit the weight", got=got, allowed=allowed)
    if out.dtype not in FLOAT_DTYPES or (dtype is not None and out.dtype != dtype):
        allowed = "float16, bfloat16, float32, float64" if dtype is None else str(dtype)
        raise UserError("out has another dtype", got=out.dtype, allowed=allowed)
    if out.shape[1] > 1 and out.stride(1) != 1:
        got = f"strides {out.stride()}"
        raise UserError("out has gaps inside its rows", got=got, allowed="a last stride of 1")


def check_rotation_table(
    name: str, table: torch.Tensor, x: torch.Tensor, x_name: str, cos: torch.Tensor
) -> None:
    """Raise UserError unless a table of rotations fits heads x, (tokens, heads, head_dim).

    Args:
        name: "cos" or "sin".
        table: (table_tokens, head_dim), where table_tokens divides x's tokens.
        x_name: of x, for the message.
        cos: the first of the two tables, whose shape and dtype both have.
    """
    tokens, _, head_dim = x.shape
    fits = table.dim() == 2 and table.shape[1] == head_dim and table.stride(1) == 1
    if not fits or table.dtype not in FLOAT_DTYPES or table.device != x.device:
        shape = f"shape (table_tokens, {head_dim}), last stride 1 on {x.device}"
        raise misfit(f"{name} does not fit {x_name}", table, f"a float dtype, {shape}")
    if (table.shape, table.dtype) != (cos.shape, cos.dtype):
        raise misfit(f"{name} does not fit cos", table, f"{cos.dtype}, shape {tuple(cos.shape)}")
    if tokens and (len(table) == 0 or tokens % len(table)):
        allowed = f"a number of rows that divides {x_name}'s {tokens} tokens"
        raise misfit(f"{name} does not cover the tokens of {x_name}", table, allowed)
