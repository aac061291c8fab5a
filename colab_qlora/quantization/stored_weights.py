"""What a model's weights are stored as, for a model that nobody measured."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization.activation_statistics import WeightItem, weight_items
from colab_qlora.quantization.budget import INT8, NF4_64, SIXTEEN_BIT, rung_bytes
from colab_qlora.quantization.placing import rung_of, shape_of


@dataclass(frozen=True)
class StoredWeight:
    """A weight as it is stored.

    Attributes:
        name: of the module.
        rung: one of `budget.RUNGS`, or the name of another format.
        plain_rung: what plain NF4 has it on.
        bits: a weight, scales included.
        bytes, plain_bytes: of the whole matrix; weights of 32 bits count as 16, as on a rung.
        is_4bit: whether it is, in any format of bitsandbytes.
    """

    name: str
    rung: str
    plain_rung: str
    bits: float
    bytes: int
    plain_bytes: int
    is_4bit: bool


def stored_weights(model: Any) -> list[StoredWeight]:
    """Linears, embedding and head of a model, with or without PEFT's wrappers, in its order."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    # PEFT wraps a head that is trained as a whole, and puts the copy beside the frozen original
    heads = set() if head is None else set(head.modules())
    return [
        _stored(item, is_16_bit=item.is_table or not heads.isdisjoint(item.modules))
        for item in weight_items(model)
        if "modules_to_save" not in item.name.split(".")
    ]


def weight_count(rung: str, size: int) -> int:
    """How many numbers a matrix of `size` bytes has on nf4_64 or in 16 bit."""
    if rung == SIXTEEN_BIT:
        return size // 2

    def bytes_of(numbers: int) -> int:
        return rung_bytes((1, numbers), rung)

    # bytes rise with the numbers, two of which share one
    return bisect.bisect_right(range(2 * size + 1), size, key=bytes_of) - 1


def _stored(item: WeightItem, *, is_16_bit: bool) -> StoredWeight:
    rows, columns = shape = shape_of(item)
    # plain NF4 leaves embedding and head alone
    plain = SIXTEEN_BIT if is_16_bit else NF4_64
    state = getattr(item.weight, "quant_state", None)
    try:
        rung = rung_of(item)
    except UserError:  # a format that is no rung can be named all the same
        rung = _format_of(item, state)
    # a 4-bit weight is counted as it lies there: its scales need not be nested
    is_counted = rung in (INT8, SIXTEEN_BIT)
    size = rung_bytes(shape, rung) if is_counted else _bytes_of(item.weight, state)
    return StoredWeight(
        item.name.removesuffix(".original_module"),
        rung,
        plain,
        8 * size / max(1, rows * columns),
        size,
        rung_bytes(shape, plain),
        state is not None,
    )


def _format_of(item: WeightItem, state: Any) -> str:
    if state is not None:
        return f"{state.quant_type}_{state.blocksize}"
    return f"{type(item.modules[0]).__name__} {str(item.weight.dtype).removeprefix('torch.')}"


def _bytes_of(weight: torch.Tensor, state: Any) -> int:
    """Codes and scales; bitsandbytes' lookup tables are left out, as in `rung_bytes`."""
    parts = [weight]
    if state is not None:
        parts.append(state.absmax)
        if state.nested:
            parts.append(state.state2.absmax)
    return sum(part.numel() * part.element_size() for part in parts)
