"""Which rungs a weight may stand on, and what it is there by plain rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.quantization.activation_statistics import WeightItem
from colab_qlora.quantization.budget import BLOCK_SIZES, INT8, RUNGS, SIXTEEN_BIT
from colab_qlora.quantization.int8_modules import Int8Embedding
from colab_qlora.quantization.int8_weight import decode_int8, encode_int8
from colab_qlora.quantization.nf4_format import NESTED_BLOCKSIZE
from colab_qlora.quantization.row_chunks import row_slices

# (weight, rung, E[x_j^2] or None) -> the weight as that rung would have it; int8 may be asked for a
# few rows at a time, since they do not depend on each other
Quantize = Callable[[torch.Tensor, str, "torch.Tensor | None"], torch.Tensor]


def plain_quantize(
    weight: torch.Tensor, rung: str, column_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight as a rung has it, by bitsandbytes' own rounding; `column_weights` go unused."""
    if rung == SIXTEEN_BIT:
        return weight
    found = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for part, rounded in rounded_rows(weight, rung, weight.dtype):
        found[part] = rounded
    return found


def rounded_rows(
    weight: torch.Tensor, rung: str, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """A few rows after the other as `plain_quantize` has them, decoded to a dtype.

    Beside the weight and the rows it takes 0.6 bytes a weight for NF4, and nothing for int8.

    Args:
        weight: (rows, columns), floating point.
        rung: one of `budget.RUNGS`.
        dtype: of the rows.
    """
    if rung in BLOCK_SIZES:
        yield from _nf4_rows(weight, BLOCK_SIZES[rung], dtype)
        return
    for part in row_slices(*weight.shape):
        own = weight[part]
        yield part, own.to(dtype) if rung == SIXTEEN_BIT else decode_int8(*encode_int8(own), dtype)


def _nf4_rows(
    weight: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """As bitsandbytes rounds the whole weight: the same blocks, and one offset of all their absmax.

    Where rows do not hold whole blocks it decodes wrongly on a CPU with AVX-512, unless the weight
    is one row (see `kernels.nf4`).
    """
    functional = import_bitsandbytes().functional
    rows, columns = weight.shape
    # slices that start where a block does
    parts = list(row_slices(rows, columns, blocksize // math.gcd(columns, blocksize)))
    if not parts:
        return
    # written into, since small results kept between large temporaries would hold heap
    codes = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-weight.numel() // blocksize), device=weight.device)
    for part in parts:
        packed, state = functional.quantize_4bit(
            _readable(weight[part]), blocksize=blocksize, quant_type="nf4"
        )
        codes[_places(part, columns, 2)] = packed
        absmax[_places(part, columns, blocksize)] = state.absmax
    offset = absmax.mean()
    levels, nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    absmax = functional.dequantize_blockwise(levels, nested) + offset
    # bitsandbytes decodes to no float64
    near = torch.float32 if dtype == torch.float64 else dtype
    code = functional.get_4bit_type("nf4", device=weight.device)
    for part in parts:
        shape = part.stop - part.start, columns
        state = functional.QuantState(
            absmax=absmax[_places(part, columns, blocksize)],
            shape=torch.Size(shape if columns % blocksize == 0 else (1, math.prod(shape))),
            dtype=near,
            blocksize=blocksize,
            code=code,
            quant_type="nf4",
        )
        # of one or two weights bitsandbytes returns the transpose
        packed = codes[_places(part, columns, 2)]
        yield part, functional.dequantize_4bit(packed, state).reshape(shape).to(dtype)


def _places(part: slice, columns: int, size: int) -> slice:
    """Where these rows are among groups of `size` weights; the last may be short."""
    return slice(part.start * columns // size, -(-part.stop * columns // size))


def _readable(weight: torch.Tensor) -> torch.Tensor:
    # bitsandbytes has no float64
    return (weight.float() if weight.dtype == torch.float64 else weight).contiguous()


def rungs_of(model: Any, item: WeightItem) -> tuple[str, ...]:
    """The rungs that a weight may stand on: embedding and head int8 and 16 bit, others all."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    # PEFT wraps it for `modules_to_save`, and where LoRA is on it
    head = getattr(head, "original_module", head)
    head = getattr(head, "base_layer", head)
    if any(_is_special(module) for module in item.modules):
        return (SIXTEEN_BIT,)
    if item.is_table or any(module is head for module in item.modules):
        return (INT8, SIXTEEN_BIT)
    return RUNGS


def _is_special(module: torch.nn.Module) -> bool:
    """An embedding that does more than look rows up (Gemma's scales them) keeps its own code."""
    is_table = isinstance(module, torch.nn.Embedding)
    return is_table and type(module).forward not in _PLAIN_TABLES


_PLAIN_TABLES = (torch.nn.Embedding.forward, Int8Embedding.forward)
