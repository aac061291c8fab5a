"""NF4 with the scale of every block searched for: less error than bitsandbytes', the same format.

    error(s) = sum_j h_j (w_j - s c_j)^2    h_j = E[x_j^2] of input column j, or 1

bitsandbytes takes s = absmax, so that the largest value of a block is exact and all others pay for
it. Here s is the best of 17 scales from 0.70 to 1.50 times absmax, then refitted thrice: levels
c_j nearest for s, s = sum h w c / sum h c c. Scales below absmax cut the largest value off; those
near 1.44 put it on the last level but one, which pays for one block in ten where blocks are short.

With absmax double-quantised, offset and nested absmax stay bitsandbytes' own. Each block takes,
of its own level there, the level nearest to the scale found and the two beside it, the one whose
best codes leave the least error. So no block is ever worse than bitsandbytes', plain or nested.

`colab_qlora.kernels.nf4_search` is the same on a GPU. Bytes moved there a weight of half precision,
blocks of 64: 2 for absmax, 3.1 for the search, nested 2 + 1.3 more for the levels, and 1.5 to pack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import runs_triton
from colab_qlora.kernels.nf4_search import launch_search
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.quantization.nf4_format import (
    DTYPES,
    NestedAbsmax,
    check_blocksize,
    nest_absmax,
    nf4_weight,
    quantised_parameter,
)
from colab_qlora.quantization.scale_search_reference import search_blocks

# a float32 chunk of 512 KiB and what is made of it stay in a CPU's cache
_CHUNK_WEIGHTS = {"cpu": 1 << 17}

# elsewhere few launches count; 128 MiB of float32
_LARGE_CHUNK_WEIGHTS = 1 << 25


@dataclass(frozen=True, eq=False)
class _Blocks:
    """A checked weight (rows, columns), contiguous; h (columns,), at most 1; absmax (blocks,)."""

    weight: torch.Tensor
    h: torch.Tensor | None
    blocksize: int
    absmax: torch.Tensor


@torch.no_grad()
def quantize_nf4(
    weight: torch.Tensor,
    *,
    column_weights: torch.Tensor | None = None,
    blocksize: int = 64,
    nested: bool = True,
    search: bool = True,
    name: str = "weight",
) -> Any:
    """A stock bitsandbytes `Params4bit` of the weight, with the least error its format allows.

    Beside the weight it takes 2.3 bytes a weight while it runs, 1.1 GiB for 128256 x 4096 on a CPU,
    and a copy of the weight if that is not contiguous.

    Args:
        weight: (rows, columns), float16, bfloat16 or float32, finite, on any device.
        column_weights: (columns,), E[x_j^2] of every input column, not negative; None weighs all
            alike.
        blocksize: weights that share a scale along the flattened weight, 32 or 64.
        nested: double-quantise absmax, as `bnb_4bit_use_double_quant` does.
        search: False leaves everything to bitsandbytes.
        name: of the weight, for messages.

    Returns:
        bitsandbytes.nn.Params4bit, quantised, on the weight's device; its dtype to decode to is the
        weight's.

    Raises:
        UserError: a shape, a dtype or the blocksize does not fit, or a number is not finite.
    """
    blocks = _check(weight, column_weights, blocksize, name)
    if not search:
        functional = import_bitsandbytes().functional
        options = {"blocksize": blocksize, "compress_statistics": nested, "quant_type": "nf4"}
        return quantised_parameter(*functional.quantize_4bit(blocks.weight, **options))
    absmax: torch.Tensor | NestedAbsmax
    if nested:
        codes, absmax = _nested(blocks)
    else:
        codes, absmax = _plain(blocks)
    return nf4_weight(
        codes, absmax, shape=tuple(weight.shape), dtype=weight.dtype, blocksize=blocksize
    )


def _plain(blocks: _Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    codes = _new_codes(blocks)
    return codes, _best_scales(blocks, codes=codes)


def _nested(blocks: _Blocks) -> tuple[torch.Tensor, NestedAbsmax]:
    """Codes for the levels that leave the least error, and these levels."""
    stock = nest_absmax(blocks.absmax)
    levels = stock.levels_around(_best_scales(blocks, cap=stock.largest()))
    scales = stock.decode(levels)
    # only now, since they are the largest of all that is needed beside the weight
    codes = _new_codes(blocks)
    chosen = _best_scales(blocks, scales=scales, codes=codes)
    best = levels[:, 0].clone()
    for level, scale in zip(levels.unbind(1)[1:], scales.unbind(1)[1:], strict=True):
        best = torch.where(scale == chosen, level, best)
    return codes, stock.with_levels(best)


def _new_codes(blocks: _Blocks) -> torch.Tensor:
    return torch.empty(blocks.weight.numel(), dtype=torch.uint8, device=blocks.weight.device)


@torch.no_grad()
def scale_search(
    weight: torch.Tensor,
    column_weights: torch.Tensor | None,
    blocksize: int,
    *,
    name: str = "weight",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale of every block and the codes for it, absmax not double-quantised.

    Args:
        weight, column_weights, blocksize, name: as for `quantize_nf4`.

    Returns:
        codes, uint8, (weights,), each below 16; and absmax, float32, (blocks,), the scales.

    Raises:
        UserError: as `quantize_nf4`.
    """
    blocks = _check(weight, column_weights, blocksize, name)
    return _plain(blocks)


def _chunk_weights(device: torch.device) -> int:
    return _CHUNK_WEIGHTS.get(device.type, _LARGE_CHUNK_WEIGHTS)


def _chunk(flat: torch.Tensor, first: int, size: int, blocksize: int) -> torch.Tensor:
    """(blocks, blocksize) of `size` weights from `first`; zeros, which cost nothing, fill up."""
    part = flat[first : first + size]
    missing = -part.numel() % blocksize
    if missing:
        part = torch.nn.functional.pad(part, (0, missing))
    return part.view(-1, blocksize)


def _block_absmax(weight: torch.Tensor, blocksize: int) -> torch.Tensor:
    """float32, (blocks,); not finite where a weight of the block is not."""
    flat, size = weight.view(-1), _chunk_weights(weight.device)
    # written into, since small results kept between large temporaries would hold 2 GiB of heap
    absmax = torch.empty(-(-flat.numel() // blocksize), device=weight.device)
    for first in range(0, flat.numel(), size):
        chunk = _chunk(flat, first, size, blocksize).float()
        place = first // blocksize
        absmax[place : place + chunk.shape[0]] = torch.linalg.vector_norm(chunk, torch.inf, dim=1)
    return absmax


def _best_scales(
    blocks: _Blocks,
    *,
    cap: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32, (blocks,): by the kernel or by torch; codes are written to if given."""
    if runs_triton(blocks.weight):
        return launch_search(
            blocks.weight, blocks.h, blocks.absmax, blocks.blocksize,
            cap=cap, scales=scales, codes=codes,
        )  # fmt: skip
    flat, columns = blocks.weight.view(-1), blocks.weight.shape[1]
    blocksize, size = blocks.blocksize, _chunk_weights(blocks.weight.device)
    h = None if blocks.h is None else _repeat(blocks.h, size + columns)
    best = torch.empty_like(blocks.absmax)
    for first in range(0, flat.numel(), size):
        w = _chunk(flat, first, size, blocksize).float()
        own = slice(first // blocksize, first // blocksize + w.shape[0])
        chunk_h = None
        if h is not None:
            start = first % columns
            chunk_h = h[start : start + w.numel()].view_as(w)
        best[own], found = search_blocks(
            w,
            chunk_h,
            blocks.absmax[own],
            cap=None if cap is None else cap[own],
            scales=None if scales is None else scales[own],
            with_codes=codes is not None,
        )
        if codes is not None and found is not None:
            out = codes[first : first + size]
            out.copy_(found.view(-1)[: out.numel()])
    return best


def _repeat(h: torch.Tensor, size: int) -> torch.Tensor:
    """At least `size` values of the columns, one row after the other."""
    return h.repeat(-(-size // h.numel()))


def _check(
    weight: torch.Tensor, column_weights: torch.Tensor | None, blocksize: int, name: str
) -> _Blocks:
    check_blocksize(blocksize)
    if weight.dim() != 2 or weight.dtype not in DTYPES or not weight.numel():
        raise UserError(
            f"{name} cannot be quantised to NF4",
            got=f"{weight.dtype}, shape {tuple(weight.shape)}",
            allowed="float16, bfloat16 or float32, shape (rows, columns), not empty",
        )
    h = None
    if column_weights is not None:
        h = _check_column_weights(column_weights, weight, name)
    weight = weight.detach().contiguous()
    absmax = _block_absmax(weight, blocksize)
    if not absmax.isfinite().all():
        raise _not_finite(weight, absmax, blocksize, name)
    return _Blocks(weight, h, blocksize, absmax)


def _check_column_weights(h: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    if h.shape != weight.shape[1:]:
        raise UserError(
            f"column_weights do not fit {name}",
            got=f"shape {tuple(h.shape)}",
            allowed=f"shape ({weight.shape[1]},), one for each input column",
        )
    h = h.detach().to(weight.device, torch.float32)
    low, high = h.min().item(), h.max().item()
    # of a NaN neither comparison holds
    if not (low >= 0 and 0 < high < float("inf")):
        raise UserError(
            f"column_weights of {name} are no means of squares",
            got=f"{low:g} to {high:g}",
            allowed="finite numbers from 0, not all of them 0",
            do="Collect them again, or pass None",
        )
    return h / high


def _not_finite(weight: torch.Tensor, absmax: torch.Tensor, blocksize: int, name: str) -> UserError:
    block = int(absmax.isfinite().int().argmin())
    values = weight.view(-1)[block * blocksize : (block + 1) * blocksize]
    place = int(values.isfinite().int().argmin())
    row, column = divmod(block * blocksize + place, weight.shape[1])
    return UserError(
        f"{name} holds numbers that are not finite",
        got=f"{values[place].item()} at [{row}, {column}]",
        allowed="finite numbers",
        do="Fetch the checkpoint again, or take one from before it broke",
    )
