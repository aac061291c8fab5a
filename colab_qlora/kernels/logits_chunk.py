"""How many rows of logits are held at once, under a budget of bytes.

A dense head leaves the whole budget to the logits. An int8 head is decoded a tile of its rows at a
time, and the gradients of the labelled rows are added up over the tiles in float32; both are paid
from the same budget.
"""

from __future__ import annotations

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.int8_decode import Int8Weight

# 1,024 rows of Llama 3's 128,256 logits in half precision: few enough bytes for a T4, and enough
# rows that reading the head (1.05 GB) costs little beside multiplying by it
DEFAULT_MEMORY_BUDGET_BYTES = 256 * 2**20

# of the budget, for decoded rows of an int8 head: 8,192 of Llama 3 8B's 128,256, enough that their
# GEMM with some hundred labelled rows keeps a GPU busy
TILE_SHARE = 4

# a GEMM works in tiles of 128 or 64 rows, so other counts pay for rows that they do not have
_ROW_TILES = (128, 64, 16)
_MIN_ROWS = 16

# rows of logits start at multiples of 128 bytes in half precision, whatever the vocabulary: a
# tokenizer with one token added (32,001) would else lose vector loads and the fast GEMMs
_ROW_ALIGNMENT = 64


def logits_chunk_rows(vocab: int, itemsize: int, memory_budget_bytes: int | None = None) -> int:
    """How many rows of logits are held at once.

    Args:
        vocab: logits a row, 1 or more.
        itemsize: bytes of a logit: 2 in half precision, 4 in float32.
        memory_budget_bytes: for the chunk of logits; None for 256 MiB.

    Returns:
        A multiple of 128, 64 or 16, the first that fits; 16 where even that exceeds the budget.

    Raises:
        ValueError: a budget that is not positive.

    Example:
        >>> logits_chunk_rows(128_256, 2)
        1024
    """
    budget = DEFAULT_MEMORY_BUDGET_BYTES if memory_budget_bytes is None else memory_budget_bytes
    if budget <= 0:
        raise UserError("memory_budget_bytes is not positive", got=budget, allowed="1 or more")
    rows = int(budget) // (aligned_vocab(vocab) * itemsize)
    tile = next((tile for tile in _ROW_TILES if rows >= tile), _MIN_ROWS)
    return max(_MIN_ROWS, rows // tile * tile)


def head_chunk_rows(
    weight: torch.Tensor | Int8Weight, itemsize: int, memory_budget_bytes: int | None = None
) -> int:
    """`logits_chunk_rows` of a head (vocab, width); of an int8 one, beside its tile and sums."""
    vocab, width = weight.shape
    budget = DEFAULT_MEMORY_BUDGET_BYTES if memory_budget_bytes is None else memory_budget_bytes
    if isinstance(weight, torch.Tensor) or budget <= 0:
        return logits_chunk_rows(vocab, itemsize, budget)
    # float32 sums of a row's gradient, and what a tile adds to them
    sums = 2 * width * 4 // itemsize
    return logits_chunk_rows(vocab + sums, itemsize, budget - budget // TILE_SHARE)


def aligned_vocab(vocab: int) -> int:
    """Logits between the beginnings of two rows of the buffer."""
    return -(-vocab // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
