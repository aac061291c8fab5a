"""What makes a matrix for a fused GEMM: decoding the 4-bit weights, writing LoRA beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_case import Build, Call, Case, Tensors, randoms
from colab_qlora.kernels.lora_borders import Border, lora_borders_, lora_borders_reference_
from colab_qlora.kernels.nf4 import nf4_dequantize, nf4_state
from colab_qlora.kernels.nf4_many import nf4_dequantize_many

# gate and up of a Llama 3 8B layer, each
NF4_SIZE, NF4_SIZE_DRY = (14336, 4096), (96, 64)
# rows of q, k and v, and the width
QKV_ROWS, QKV_WIDTH = (4096, 1024, 1024), 4096
QKV_ROWS_DRY, QKV_WIDTH_DRY = (64, 32, 32), 64
RANK, SPARE, SCALE = 16, 64, 2.0


def cases(*, is_dry: bool) -> list[Case]:
    """All of this file."""
    qkv = (QKV_ROWS_DRY, QKV_WIDTH_DRY) if is_dry else (QKV_ROWS, QKV_WIDTH)
    return [_nf4(NF4_SIZE_DRY if is_dry else NF4_SIZE), _borders(*qkv)]


def _nf4(size: tuple[int, int]) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        import bitsandbytes

        found = randoms(device, dtype, gate=size, up=size)
        for name, dense in found.items():
            weight = bitsandbytes.nn.Params4bit(
                dense, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            found[name] = weight.to(device)
        return found | {"out": torch.empty(2, *size, dtype=dtype, device=device)}

    def together(t: Tensors) -> Call:
        def call() -> list[Tensor]:
            nf4_dequantize_many([t["gate"], t["up"]], list(t["out"]))
            return list(t["out"])

        return call

    return Case(
        op="nf4 decode, nested",
        size=f"2x{size[0]}x{size[1]}",
        make=make,
        sides={
            "ours": together,
            "ours one by one": _one_by_one(nf4_dequantize),
            "bitsandbytes": _one_by_one(_bitsandbytes_decode),
            "unsloth": _one_by_one(_unsloth_decode),
        },
        truth=lambda t: [_true_weight(t["gate"]), _true_weight(t["up"])],
        # half a byte of code, a byte of absmax a block of 64, two bytes out
        bytes_moved=int(2 * size[0] * size[1] * (0.5 + 1 / 64 + 2)),
    )


def _one_by_one(decode: Callable[[Any], Tensor]) -> Build:
    return lambda t: lambda: [decode(t["gate"]), decode(t["up"])]


def _bitsandbytes_decode(weight: Any) -> Tensor:
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


def _unsloth_decode(weight: Any) -> Tensor:
    from unsloth.kernels import fast_dequantize

    return fast_dequantize(weight.data, weight.quant_state)


def _true_weight(weight: Any) -> Tensor:
    state = nf4_state(weight)
    assert state.nested_absmax is not None and state.nested_code is not None
    assert state.offset is not None
    nested = state.nested_absmax.double().repeat_interleave(state.nested_blocksize)
    levels = state.nested_code.double()[state.absmax.int()]
    absmax = levels * nested[: levels.numel()] + state.offset.double()
    codes = torch.stack((state.packed >> 4, state.packed & 15), dim=1).reshape(-1).int()
    values = state.code.double()[codes].view(-1, state.blocksize) * absmax[:, None]
    return values.reshape(state.shape)


def _borders(rows: tuple[int, ...], width: int) -> Case:
    """q, k and v with an adapter each, side by side in the spare columns."""
    height = sum(rows)
    shapes = {f"a{i}": (RANK, width) for i in range(len(rows))}
    shapes |= {f"b{i}": (count, RANK) for i, count in enumerate(rows)}

    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        buffer = torch.zeros(height + SPARE, width + SPARE, dtype=dtype, device=device)
        return randoms(device, torch.float32, **shapes) | {"buffer": buffer}

    def writes(write: Callable[..., None]) -> Build:
        def build(t: Tensors) -> Call:
            blocks = _blocks(t, rows)

            def call() -> list[Tensor]:
                write(t["buffer"], height, width, blocks)
                return [t["buffer"]]

            return call

        return build

    def truth(t: Tensors) -> list[Tensor]:
        buffer = t["buffer"].double()
        for first, column, a, b, scale, _ in _blocks(t, rows):
            buffer[first : first + len(b), width + column : width + column + RANK] = b * scale
            buffer[height + column : height + column + RANK, :width] = a
        return [buffer]

    adapters = sum(4 * first * second for first, second in shapes.values())
    return Case(
        op="lora borders",
        size=f"{height}+{SPARE} x {width}+{SPARE}",
        make=make,
        sides={"ours": writes(lora_borders_), "torch": writes(lora_borders_reference_)},
        truth=truth,
        bytes_moved=2 * SPARE * (height + width) + adapters,
    )


def _blocks(t: Tensors, rows: tuple[int, ...]) -> list[Border]:
    return [
        Border(sum(rows[:i]), i * RANK, t[f"a{i}"], t[f"b{i}"], SCALE, True)
        for i in range(len(rows))
    ]
