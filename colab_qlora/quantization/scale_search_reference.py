"""The scale search in torch, block by block as `colab_qlora.kernels.nf4_search` does on a GPU.

torch.bucketize takes 18 ns a weight for one rounding to the nearest of 16 levels; 22 roundings make
a search. Here a weight's place on a grid of 16,384 cells picks its level from a table, 0.6 ns. That
is the nearest level save within half a cell, 6e-5, of a threshold, where both levels leave nearly
the same error: good enough to compare scales. A second table, of the threshold inside each cell,
makes the codes in the refits, for the stock scale and for the best scale exact.
"""

from __future__ import annotations

import functools

import torch

from colab_qlora.kernels.nf4_search import (
    FACTOR_STEP,
    FACTORS,
    FIRST_FACTOR,
    LEAST_GAIN,
    NF4_LEVELS,
    NF4_THRESHOLDS,
    REFITS,
    TINY,
)

# cells from -1 to 1; a power of 2, so that a threshold and a weight are scaled without rounding.
# No threshold is within 0.03 cells of a border, which sums of float32 could blur by 0.001
CELLS = 1 << 14

_HALF_CELLS = CELLS // 2


@functools.cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every cell: the level at its centre, the code at its lower border, the threshold in it."""
    cells = torch.arange(CELLS, dtype=torch.float64)
    thresholds = torch.tensor(NF4_THRESHOLDS, dtype=torch.float64)
    centre = torch.bucketize((cells + 0.5) / _HALF_CELLS - 1, thresholds)
    lower = torch.bucketize(cells / _HALF_CELLS - 1, thresholds)
    # nothing is above the threshold of a cell without one: a nested scale may be far below absmax
    inside = torch.full((CELLS,), torch.inf)
    cell_of_threshold = ((thresholds + 1) * _HALF_CELLS).long()
    inside[cell_of_threshold] = thresholds.float()
    level = torch.tensor(NF4_LEVELS)[centre]
    return level.to(device), lower.int().to(device), inside.to(device)


def _cells(v: torch.Tensor) -> torch.Tensor:
    place = (v * _HALF_CELLS).add_(_HALF_CELLS)
    return place.clamp_(0, CELLS - 1).to(torch.int32).view(-1)


def _inverse(s: torch.Tensor) -> torch.Tensor:
    # a scale of nothing leaves every weight at level 0
    return torch.where(s.abs() < TINY, 0.0, 1.0 / s)[:, None]


def _levels_near(u: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    level = _tables(u.device)[0]
    return level.index_select(0, _cells(u * _inverse(s))).view_as(u)


def nearest_codes(u: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """int32, (blocks, blocksize): the code of the level nearest to u / s, as bitsandbytes rounds.

    Args:
        u: float32, (blocks, blocksize).
        s: float32, (blocks,).
    """
    _, lower, inside = _tables(u.device)
    v = u * _inverse(s)
    cells = _cells(v)
    above = v.view(-1) > inside.index_select(0, cells)
    return lower.index_select(0, cells).add_(above).view_as(u)


def _nearest_levels(u: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    levels = torch.tensor(NF4_LEVELS, device=u.device)
    return levels.index_select(0, nearest_codes(u, s).view(-1)).view_as(u)


def _error(
    u: torch.Tensor, h: torch.Tensor | None, s: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    difference = torch.addcmul(u, c, s[:, None], value=-1)
    if h is None:
        return difference.square_().sum(1)
    return difference.square_().mul_(h).sum(1)


def _refit(
    u: torch.Tensor, h: torch.Tensor | None, s: torch.Tensor, c: torch.Tensor, limit: torch.Tensor
) -> torch.Tensor:
    """The least-squares scale of levels c; s where there is none."""
    weighted = c if h is None else h * c
    above, below = (weighted * u).sum(1), (weighted * c).sum(1)
    is_fit = (above > 0) & (below > 0)
    return torch.where(is_fit, torch.minimum(above / below, limit), s)


def search_blocks(
    w: torch.Tensor,
    h: torch.Tensor | None,
    absmax: torch.Tensor,
    *,
    cap: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    with_codes: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The best scale of every block and its codes.

    Args:
        w: float32, (blocks, blocksize), finite.
        h: float32, like w, not negative; None for an unweighted error.
        absmax: float32, (blocks,).
        cap: float32, (blocks,), the largest scale allowed; None for no limit.
        scales: float32, (blocks, candidates), the only scales to choose from, the stock one first;
            None to search.
        with_codes: leave the codes out if False.

    Returns:
        float32, (blocks,); and int32, (blocks, blocksize), or None.
    """
    # in units of absmax, squares neither vanish nor overflow
    unit = absmax.clamp(min=TINY)
    inverse_unit = 1.0 / unit
    u = w * inverse_unit[:, None]
    if scales is None:
        s, scale = _search(u, h, absmax, unit, None if cap is None else cap * inverse_unit)
    else:
        s, scale = _choose(u, h, scales, inverse_unit)
    return scale, nearest_codes(u, s) if with_codes else None


def _least_to_beat(u: torch.Tensor, h: torch.Tensor | None, s: torch.Tensor) -> torch.Tensor:
    return _error(u, h, s, _nearest_levels(u, s)) * (1 - LEAST_GAIN)


def _choose(
    u: torch.Tensor, h: torch.Tensor | None, scales: torch.Tensor, inverse_unit: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    best_scale = scales[:, 0]
    best_s = best_scale * inverse_unit
    least = _least_to_beat(u, h, best_s)
    for scale in scales.unbind(1)[1:]:
        s = scale * inverse_unit
        error = _error(u, h, s, _levels_near(u, s))
        is_better = error < least
        least = torch.where(is_better, error, least)
        best_s = torch.where(is_better, s, best_s)
        best_scale = torch.where(is_better, scale, best_scale)
    return best_s, best_scale


def _search(
    u: torch.Tensor,
    h: torch.Tensor | None,
    absmax: torch.Tensor,
    unit: torch.Tensor,
    limit: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    best_s, best_scale = torch.where(absmax < TINY, absmax / TINY, 1.0), absmax
    least = _least_to_beat(u, h, best_s)
    if limit is None:
        limit = torch.full_like(absmax, torch.inf)
    # the refits start from the grid's best, be it below the stock scale's gain or not
    start, start_error = best_s, torch.full_like(absmax, torch.inf)
    for k in range(FACTORS):
        s = limit.clamp(max=FIRST_FACTOR + FACTOR_STEP * k)
        error = _error(u, h, s, _levels_near(u, s))
        is_better = error < start_error
        start_error = torch.where(is_better, error, start_error)
        start = torch.where(is_better, s, start)
    is_normal = absmax >= TINY
    for _ in range(REFITS + 1):
        # exact, or a heavy weight next to a threshold sends the refits elsewhere than on a GPU
        c = _nearest_levels(u, start)
        error = _error(u, h, start, c)
        is_better = is_normal & (error < least)
        least = torch.where(is_better, error, least)
        best_s = torch.where(is_better, start, best_s)
        best_scale = torch.where(is_better, start * unit, best_scale)
        start = _refit(u, h, start, c, limit)
    return best_s, best_scale
