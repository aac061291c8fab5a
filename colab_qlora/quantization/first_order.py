"""What an error of a weight does to the loss at first, from what went through the weight's module.

    dL_r = sum over tokens t of row r of <dY_t, E x_t>,    |E x_t|^2,    |dY_t|^2 / outputs

E is made and met for a few output features at a time, in float32 (float64 for float64), and sums
are float64: neither E nor dY is ever copied whole. A table has no product: its E x_t is a row of E,
and only rows of tokens that occurred are rounded.

The product itself may be in 16 bit where that is what tensor cores take: bfloat16 where it is
native, float16 on older GPUs. E x of a linear fits into float16 (65504), as its output does; where
it does not, or x does not, the product is made again in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch

from colab_qlora.dtypes import has_native_bfloat16
from colab_qlora.quantization.budget import BLOCK_SIZES
from colab_qlora.quantization.plain_rungs import Quantize
from colab_qlora.quantization.row_chunks import row_slices

# E x of a slice of output features: (rows, tokens, features)
Shifted = Callable[[slice], torch.Tensor]


def product_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of E x on a device: 16 bit on a GPU; None is float32."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if has_native_bfloat16(capability) else torch.float16


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shifted_outputs(
    weight: torch.Tensor,
    rungs: Iterable[str],
    quantize: Quantize,
    column_weights: torch.Tensor | None,
    x: torch.Tensor,
    gradient: torch.Tensor,
    low: torch.dtype | None,
) -> Iterator[tuple[str, Shifted]]:
    """E x of a linear by rung, to be used before the next rung is asked for.

    Args:
        weight: W_16, (out, in), on any device; it moves as a whole only if a rung has blocks.
        rungs: below 16 bit.
        quantize, column_weights: see `plain_rungs.Quantize`.
        x: (rows, tokens, in).
        gradient: dY; E has its device.
        low: dtype of the product; None: float32, or float64 if dY is.
    """
    wide, rungs = wide_dtype(gradient.dtype), tuple(rungs)
    if any(rung in BLOCK_SIZES for rung in rungs):
        weight = weight.to(gradient.device)
    narrow = x.to(low or wide)

    def shifted(rung: str, whole: torch.Tensor | None, part: slice) -> torch.Tensor:
        own = weight[part].to(gradient.device)
        near = quantize(own, rung, column_weights) if whole is None else whole[part]
        error = near.to(wide) - own.to(wide)
        found = (narrow @ error.to(narrow.dtype).T).to(wide)
        if narrow.dtype == torch.float16 and not torch.isfinite(found).all():
            found = x.to(wide) @ error.T
        return found

    for rung in rungs:
        # blocks, and the offset of their scales, are the whole matrix's
        whole = quantize(weight, rung, column_weights) if rung in BLOCK_SIZES else None
        yield rung, functools.partial(shifted, rung, whole)


def shifted_lookups(
    weight: torch.Tensor,
    rungs: Iterable[str],
    quantize: Quantize,
    column_weights: torch.Tensor | None,
    ids: torch.Tensor,
    gradient: torch.Tensor,
) -> Iterator[tuple[str, Shifted]]:
    """The same of a table, whose rungs have no blocks.

    Args:
        weight: (vocabulary, out), on any device; only rows that are looked up move.
        ids: (rows, tokens).
        rungs, quantize, column_weights, gradient: as for `shifted_outputs`.
    """
    wide = wide_dtype(gradient.dtype)
    found, places = ids.unique(return_inverse=True)
    own = weight[found.to(weight.device)].to(gradient.device)
    places = places.to(gradient.device)
    for rung in rungs:
        assert rung not in BLOCK_SIZES
        error = quantize(own, rung, column_weights).to(wide) - own.to(wide)
        yield rung, functools.partial(_looked_up, error, places)


def _looked_up(error: torch.Tensor, places: torch.Tensor, part: slice) -> torch.Tensor:
    return error[:, part][places]


def first_order(
    shifted: Shifted, gradient: torch.Tensor, keep: torch.Tensor | None, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(<dY, E x> of each row, |E x|^2 of each token: 0 where `keep` is False), in float64.

    Args:
        shifted: E x.
        gradient: dY, shape (rows, tokens, out).
        keep: False on padding, shape (rows, tokens).
        columns: of E, whose slices are kept small as well.
    """
    changes = gradient.new_zeros(gradient.shape[0], dtype=torch.float64)
    squares = gradient.new_zeros(gradient.shape[:2], dtype=torch.float64)
    for part in row_slices(gradient.shape[-1], max(squares.numel(), columns)):
        moved = shifted(part)
        if keep is not None:
            moved = moved.masked_fill(~keep.to(moved.device)[..., None], 0.0)
        met = moved * gradient[..., part].to(moved.dtype)
        changes += met.sum((1, 2), dtype=torch.float64)
        squares += moved.square_().sum(-1, dtype=torch.float64)
    return changes, squares


def steepness(gradient: torch.Tensor) -> torch.Tensor:
    """|dY_t|^2 / outputs of each token, float64, from dY of shape (rows, tokens, out)."""
    found = gradient.new_zeros(gradient.shape[:2], dtype=torch.float64)
    width = gradient.shape[-1]
    for part in row_slices(width, found.numel()):
        squares = gradient[..., part].to(wide_dtype(gradient.dtype)).square()
        found += squares.sum(-1, dtype=torch.float64)
    return found / max(1, width)


def both(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """<dY, E x> of two uses of one weight, by rows."""
    # uses that are laid out differently agree in their sums only
    return first + second if first.shape == second.shape else (first.sum() + second.sum())[None]
