"""What makes a matrix for a fused GEMM: decoding the 4-bit weights, writing LoRA beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_case import Build, Call, Case, Tensors, randoms
from colab_qlora.kernels.backend import runs_triton
from colab_qlora.kernels.int8_decode import Int8Weight, int8_decode_
from colab_qlora.kernels.lora_borders import Border, lora_borders_, lora_borders_reference_
from colab_qlora.kernels.mixed_group import mixed_group_
from colab_qlora.kernels.nf4 import nf4_dequantize, nf4_state
from colab_qlora.kernels.nf4_group import nf4_group_
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
    size = NF4_SIZE_DRY if is_dry else NF4_SIZE
    gate_up = ((size[0], size[0]), size[1])
    return [
        _nf4(size),
        _borders(*qkv),
        _group(*qkv),
        _group(*gate_up),
        _group(*qkv, kinds=("nf4", "int8", "16 bit")),
        _group(*gate_up, kinds=("nf4", "int8")),
    ]


def _nf4(size: tuple[int, int]) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        found = _weights(device, dtype, gate=size, up=size)
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
        bytes_moved=_decoded_bytes(2 * size[0] * size[1]),
    )


def _weights(device: torch.device, dtype: torch.dtype, **shapes: tuple[int, ...]) -> Tensors:
    import bitsandbytes

    found = randoms(device, dtype, **shapes)
    for name, dense in found.items():
        weight = bitsandbytes.nn.Params4bit(
            dense, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        found[name] = weight.to(device)
    return found


def _decoded_bytes(weights: int) -> int:
    # half a byte of code, a byte of absmax a block of 64, two bytes out
    return int(weights * (0.5 + 1 / 64 + 2))


def _stored_bytes(kind: str, weights: int) -> int:
    """What reading a weight stored so, and writing it in 16 bit, moves; scales of rows aside."""
    return {"nf4": _decoded_bytes(weights), "int8": 3 * weights, "16 bit": 4 * weights}[kind]


def _one_by_one(decode: Callable[[Any], Tensor]) -> Build:
    return lambda t: lambda: [decode(t["gate"]), decode(t["up"])]


def _bitsandbytes_decode(weight: Any) -> Tensor:
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


def _unsloth_decode(weight: Any) -> Tensor:
    from unsloth.kernels import fast_dequantize

    return fast_dequantize(weight.data, weight.quant_state)


def _int8(dense: Tensor) -> Int8Weight:
    absmax = dense.float().abs().amax(1)
    codes = (dense.float() * (127 / absmax[:, None])).round().to(torch.int8)
    return Int8Weight(codes, absmax)


def _true_weight(weight: Any) -> Tensor:
    if isinstance(weight, Int8Weight):
        return weight.codes.double() * (weight.absmax.double() / 127)[:, None]
    if not hasattr(weight, "quant_state"):
        return weight.double()
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

    def writes(write: Callable[..., object]) -> Build:
        def build(t: Tensors) -> Call:
            blocks = _blocks(t, rows)

            def call() -> list[Tensor]:
                write(t["buffer"], height, width, blocks)
                return [t["buffer"]]

            return call

        return build

    return Case(
        op="lora borders",
        size=f"{height}+{SPARE} x {width}+{SPARE}",
        make=lambda device, dtype: _buffer_and_adapters(rows, width, device, dtype),
        sides={"ours": writes(lora_borders_), "torch": writes(lora_borders_reference_)},
        truth=lambda t: [_true_borders(t, rows, width)],
        bytes_moved=_border_bytes(rows, width),
    )


def _buffer_and_adapters(
    rows: tuple[int, ...], width: int, device: torch.device, dtype: torch.dtype
) -> Tensors:
    buffer = torch.zeros(sum(rows) + SPARE, width + SPARE, dtype=dtype, device=device)
    shapes = _adapter_shapes(rows, width)
    return randoms(device, torch.float32, **shapes) | {"buffer": buffer}


def _adapter_shapes(rows: tuple[int, ...], width: int) -> dict[str, tuple[int, int]]:
    shapes = {f"a{i}": (RANK, width) for i in range(len(rows))}
    return shapes | {f"b{i}": (count, RANK) for i, count in enumerate(rows)}


def _border_bytes(rows: tuple[int, ...], width: int) -> int:
    adapters = sum(4 * first * second for first, second in _adapter_shapes(rows, width).values())
    return 2 * SPARE * (sum(rows) + width) + adapters


def _true_borders(t: Tensors, rows: tuple[int, ...], width: int) -> Tensor:
    """The buffer with its borders, and no weight in it."""
    buffer, height = t["buffer"].double(), sum(rows)
    for first, column, a, b, scale, *_ in _blocks(t, rows):
        buffer[first : first + len(b), width + column : width + column + RANK] = b * scale
        buffer[height + column : height + column + RANK, :width] = a
    return buffer


def _blocks(t: Tensors, rows: tuple[int, ...]) -> list[Border]:
    return [
        Border(sum(rows[:i]), i * RANK, t[f"a{i}"], t[f"b{i}"], SCALE, True)
        for i in range(len(rows))
    ]


Fill = Callable[[list[Any], list[Tensor], Tensor, int, int, list[Border]], None]


def _group(rows: tuple[int, ...], width: int, kinds: tuple[str, ...] = ()) -> Case:
    """The weights of a fused GEMM, one above the other, and an adapter for each.

    `kinds`: how each is stored, "nf4", "int8" or "16 bit"; all in NF4 if left out.
    """
    kinds = kinds or ("nf4",) * len(rows)
    height, names = sum(rows), [f"w{i}" for i in range(len(rows))]

    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        shapes = {name: (count, width) for name, count in zip(names, rows, strict=True)}
        adapters = _buffer_and_adapters(rows, width, device, dtype)
        found = randoms(device, dtype, **shapes)
        for name, kind in zip(names, kinds, strict=True):
            if kind == "nf4":
                found |= _weights(device, dtype, **{name: shapes[name]})
            elif kind == "int8":
                found[name] = _int8(found[name])
        return adapters | found

    def fills(fill: Fill) -> Build:
        def build(t: Tensors) -> Call:
            weights, blocks = [t[name] for name in names], _blocks(t, rows)
            outs = list(t["buffer"][:height, :width].split(rows))

            def call() -> list[Tensor]:
                fill(weights, outs, t["buffer"], height, width, blocks)
                return [t["buffer"]]

            return call

        return build

    def truth(t: Tensors) -> list[Tensor]:
        buffer = _true_borders(t, rows, width)
        buffer[:height, :width] = torch.cat([_true_weight(t[name]) for name in names])
        return [buffer]

    return Case(
        op=f"{' '.join(sorted(set(kinds)))} decode + lora borders",
        size=f"{'+'.join(map(str, rows))}+{SPARE} x {width}+{SPARE}",
        make=make,
        sides={
            "ours": fills(_fill_together),
            "ours one by one": fills(_fill_in_two),
            "bitsandbytes + torch": fills(_fill_by_others),
        },
        truth=truth,
        bytes_moved=_border_bytes(rows, width)
        + sum(_stored_bytes(kind, count * width) for kind, count in zip(kinds, rows, strict=True)),
        notes=lambda t: "" if runs_triton(t["buffer"]) else "ours is one by one",
    )


def _fill_together(weights, outs, buffer, height, width, blocks) -> None:
    if not runs_triton(buffer):
        return _fill_in_two(weights, outs, buffer, height, width, blocks)
    is_nf4 = all(hasattr(weight, "quant_state") for weight in weights)
    fill = nf4_group_ if is_nf4 else mixed_group_
    is_done, _ = fill(weights, outs, buffer, height, width, blocks)
    if not is_done:
        raise RuntimeError("no one launch can fill this buffer")


def _fill_in_two(weights, outs, buffer, height, width, blocks) -> None:
    nf4 = [(w, out) for w, out in zip(weights, outs, strict=True) if hasattr(w, "quant_state")]
    nf4_dequantize_many([weight for weight, _ in nf4], [out for _, out in nf4])
    for weight, out in zip(weights, outs, strict=True):
        if isinstance(weight, Int8Weight):
            int8_decode_(weight, out)
        elif not hasattr(weight, "quant_state"):
            out.copy_(weight)
    lora_borders_(buffer, height, width, blocks)


def _fill_by_others(weights, outs, buffer, height, width, blocks) -> None:
    for weight, out in zip(weights, outs, strict=True):
        if isinstance(weight, Int8Weight):
            torch.mul(weight.codes, (weight.absmax / 127)[:, None], out=out)
        elif hasattr(weight, "quant_state"):
            out.copy_(_bitsandbytes_decode(weight))
        else:
            out.copy_(weight)
    lora_borders_reference_(buffer, height, width, blocks)
