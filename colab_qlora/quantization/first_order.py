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

# of a slice of output features: E, (features, in), or a table's E x, (rows, tokens, features), both
# in float32 or float64
Errors = Callable[[slice], torch.Tensor]


def product_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of E x on a device: 16 bit on a GPU; None is float32."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if has_native_bfloat16(capability) else torch.float16


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_errors(
    weight: torch.Tensor,
    rungs: Iterable[str],
    quantize: Quantize,
    column_weights: torch.Tensor | None,
    gradient: torch.Tensor,
) -> Iterator[tuple[str, Errors]]:
    """E of a linear by rung, to be used before the next rung is asked for.

    Args:
        weight: W_16, (out, in), on any device; it moves as a whole only if a rung has blocks.
        rungs: below 16 bit.
        quantize, column_weights: see `plain_rungs.Quantize`.
        gradient: dY; E has its device.
    """
    wide, rungs = wide_dtype(gradient.dtype), tuple(rungs)
    if any(rung in BLOCK_SIZES for rung in rungs):
        weight = weight.to(gradient.device)

    def error(rung: str, whole: torch.Tensor | None, part: slice) -> torch.Tensor:
        own = weight[part].to(gradient.device)
        near = quantize(own, rung, column_weights) if whole is None else whole[part]
        return (near.to(wide) - own).to(wide)

    for rung in rungs:
        # blocks, and the offset of their scales, are the whole matrix's
        whole = quantize(weight, rung, column_weights) if rung in BLOCK_SIZES else None
        yield rung, functools.partial(error, rung, whole)


def shifted_outputs(
    inputs: Iterable[torch.Tensor], error: torch.Tensor, low: torch.dtype | None
) -> Iterator[torch.Tensor]:
    """E x, (rows, tokens, features), for each x, in E's dtype.

    Args:
        inputs: x of each use, (rows, tokens, in).
        error: E of some output features, (features, in), float32 or float64.
        low: dtype of the product; None: E's.
    """
    narrow = error.to(low or error.dtype)
    for x in inputs:
        found = (x.to(narrow.dtype) @ narrow.T).to(error.dtype)
        if narrow.dtype == torch.float16 and not torch.isfinite(found).all():
            found = x.to(error.dtype) @ error.T
        yield found


def lookup_errors(
    weight: torch.Tensor,
    rungs: Iterable[str],
    quantize: Quantize,
    column_weights: torch.Tensor | None,
    ids: torch.Tensor,
    gradient: torch.Tensor,
) -> Iterator[tuple[str, Errors]]:
    """E x of a table by rung, (rows, tokens, features) of a slice; its rungs have no blocks.

    Args:
        weight: (vocabulary, out), on any device; only rows that are looked up move.
        ids: (rows, tokens).
        rungs, quantize, column_weights, gradient: as for `weight_errors`.
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


class FirstOrder:
    """<dY, E x> and |E x|^2 of each token, float64, added up over slices of output features.

    Args:
        gradient: dY, shape (rows, tokens, out).
    """

    def __init__(self, gradient: torch.Tensor) -> None:
        self._gradient = gradient
        self._changes = gradient.new_zeros(gradient.shape[:2], dtype=torch.float64)
        self._squares = torch.zeros_like(self._changes)

    def add_(self, part: slice, moved: torch.Tensor) -> None:
        """E x of a slice, (rows, tokens, features), float32 or float64; it is written into."""
        met = moved * self._gradient[..., part]
        self._changes += met.sum(-1, dtype=torch.float64)
        self._squares += moved.square_().sum(-1, dtype=torch.float64)

    def sums(self, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(<dY, E x> of each row, |E x|^2 of each token); nothing counts where `keep` is False."""
        changes, squares = self._changes, self._squares
        if keep is not None:
            padding = ~keep.to(changes.device)
            changes, squares = changes.masked_fill(padding, 0), squares.masked_fill(padding, 0)
        return changes.sum(1), squares


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
