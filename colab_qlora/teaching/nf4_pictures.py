"""The 16 levels of NF4, and a weight matrix before and after, as pictures and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from colab_qlora.curves.picture.layout import DPI, TEXT_PT
from colab_qlora.teaching.figures import (
    GRID,
    INK,
    MUTED,
    PAPER,
    blank_figure,
    put_text,
    put_title,
)
from colab_qlora.teaching.nf4 import WeightPair, nf4_levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# light and dark of the Okabe-Ito palette; they differ in grey as well
_BEFORE, _AFTER = "#56b4e9", "#a33c00"
_LEFT, _RIGHT = 84, 784  # px; the same for all axes, so that their numbers stand in line
_BINS = 141  # odd, so that one bin is centred on 0
_SIGMAS = 3.5  # beyond, a normal distribution has 1 weight in 2,000
# bitsandbytes cuts the normal distribution at this quantile and calls it 1 (create_normal_map)
_CUT_SIGMAS = 1.8481


def draw_nf4_levels() -> Figure:
    """Draw the 16 levels under the normal distribution that they were made for, 800 x 410 px.

    Returns:
        The figure: each level is a line with its code and value; the bands, light and hatched in
        turn, are what rounds to it. Near 0, where weights are many, the bands are narrow.
    """
    levels = nf4_levels().tolist()
    fig = blank_figure(800, 410)
    ax = _axes(fig, 128, 206, left=34, right=766)
    edges = [-1.0, *((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)), 1.0]
    for code, level in enumerate(levels):
        x = np.linspace(edges[code], edges[code + 1], 40)
        density = np.exp(-0.5 * (_CUT_SIGMAS * x) ** 2)
        hatch, face = ((None, "#e7eff6"), ("////", PAPER))[code % 2]
        ax.fill_between(x, density, facecolor=face, edgecolor="#9fb6c8", hatch=hatch, linewidth=0)
        ax.vlines(level, 0, np.exp(-0.5 * (_CUT_SIGMAS * level) ** 2), color=INK, linewidth=2)
    x = np.linspace(-1, 1, 400)
    ax.plot(x, np.exp(-0.5 * (_CUT_SIGMAS * x) ** 2), color=MUTED, linewidth=1.5)
    ax.set(xlim=(-1.03, 1.03), ylim=(0, 1.08), yticks=[], xticks=levels)
    ax.set_xticklabels([_signed(level) for level in levels], rotation=90)
    for code, level in enumerate(levels):
        put_text(fig, _x_px(ax, level), 46, str(code), ha="center", gid="code")
    ax.spines["left"].set_visible(False)
    put_text(
        fig, 34, 358, "curve: how many weights there are; band: the weights that round to its line"
    )
    put_text(fig, 400, 16, "level, and below it the 4-bit code that is stored", ha="center")
    put_title(fig, 34, "NF4: sixteen levels, closest where weights are most")
    return fig


def describe_nf4_levels() -> str:
    """The levels in words.

    Returns:
        Two sentences with the ends, the number on each side of 0 and the gaps between neighbours.
    """
    levels = nf4_levels()
    gaps = levels.diff()
    below, above = int((levels < 0).sum()), int((levels > 0).sum())
    return (
        f"NF4 has {levels.numel()} levels from {levels[0]:g} to {levels[-1]:g}: {below} below 0, 0 "
        f"itself, and {above} above. Neighbours are {gaps.min():.3f} apart next to 0, where most "
        f"weights are, and up to {gaps.max():.3f} at the ends."
    )


def draw_weight_histogram(pair: WeightPair) -> Figure:
    """Draw a weight matrix before and after quantisation, and one of its blocks from near.

    Args:
        pair: from `weight_before_and_after`.

    Returns:
        A figure 800 px wide. Above, the weights before and after in the same bins; weights beyond
        3.5 standard deviations are left out. Below, one block of 64: each weight, divided by the
        block's largest magnitude, moves to the nearest of the 16 levels. Without `before`, the
        parts that need it are left out.
    """
    height = 690 if pair.before is not None else 500
    fig = blank_figure(800, height)
    span = _span(pair)
    tables = [("after: NF4, decoded", pair.after, _AFTER, 314)]
    if pair.before is not None:
        kind = f"{8 * pair.before.element_size()} bits"
        tables.insert(0, (f"before: {kind}", pair.before, _BEFORE, 504))
    shares = [_histogram(matrix, span) for _, matrix, _, _ in tables]
    top = 1.12 * max(share.max() for share in shares)
    for (label, _, colour, bottom), share in zip(tables, shares, strict=True):
        ax = _axes(fig, bottom, 136)
        ax.stairs(share, np.linspace(-span, span, _BINS + 1), fill=True, color=colour)
        ax.set(xlim=(-span, span), ylim=(0, top))
        ax.set_ylabel("% of weights", fontsize=TEXT_PT, color=INK)
        ax.yaxis.set_major_locator(_few_ticks())
        ax.xaxis.set_major_locator(_few_ticks())
        ax.xaxis.set_major_formatter("{x:g}")
        put_text(fig, _LEFT + 12, bottom + 118, label, gid="panel")
    beyond = f"weight ({_share_beyond(pair):.1%} of them lie beyond these axes)"
    put_text(fig, (_LEFT + _RIGHT) / 2, 272, beyond, ha="center", gid="beyond")
    _draw_block(fig, pair)
    rows, columns = pair.shape
    put_title(fig, 12, f"{_short(pair.name)}: {rows:,} x {columns:,} weights")
    return fig


def describe_weight_histogram(pair: WeightPair) -> str:
    """The histogram in words.

    Args:
        pair: from `weight_before_and_after`.

    Returns:
        Four sentences: the size and range, what the picture leaves out, the share of exact zeros,
        and the error and storage.
    """
    rows, columns = pair.shape
    after = pair.after.float()
    zeros = (after == 0).float().mean()
    error = "Its weights before quantisation are not on this disk, so the error is not known"
    if pair.relative_error is not None:
        error = f"Quantisation moved the weights by {pair.relative_error:.1%} (root mean square)"
    return (
        f"{pair.name} has {rows:,} x {columns:,} weights, now from {after.min():.3g} to "
        f"{after.max():.3g}. The picture ends at {_span(pair):.2g} on both sides and leaves out "
        f"{_share_beyond(pair):.1%} of them. {zeros:.1%} are exactly 0, the one value that all "
        f"blocks of {pair.block_size} share; the others gather on 15 levels that each block scales "
        f"for itself. {error}, and one weight takes {pair.bits_per_weight:.2f} bits."
    )


def _draw_block(fig: Figure, pair: WeightPair) -> None:
    before, after, absmax = _typical_block(pair)
    ax = _axes(fig, 52, 130)
    levels = nf4_levels().tolist()
    ax.vlines(levels, 0, 1, color=GRID, linewidth=1.5, zorder=1)
    codes = [int(np.abs(np.array(levels) - value).argmin()) for value in after]
    dot: dict[str, Any] = {"linestyle": "none", "markersize": 5, "zorder": 3}
    if before is not None:
        targets = [levels[code] for code in codes]
        ax.plot(np.stack([before, targets]), [[0.86], [0.62]], color=MUTED, linewidth=0.6, zorder=2)
        ax.plot(before, np.full(before.size, 0.86), "o", color=_BEFORE, markeredgecolor=INK, **dot)
    counts = np.bincount(codes, minlength=16)
    step = 0.56 / max(8, counts.max())
    for level, count in zip(levels, counts, strict=True):
        ys = 0.58 - step * np.arange(count)
        ax.plot(np.full(count, level), ys, "s", color=_AFTER, **(dot | {"markersize": 4}))
    ax.set(xlim=(-1.04, 1.04), ylim=(0, 1), yticks=[])
    ax.set_xticks([-1, -0.5, 0, 0.5, 1])
    ax.xaxis.set_major_formatter("{x:g}")
    if before is not None:
        put_text(fig, 12, 52 + 0.86 * 130, "before", gid="row")
    put_text(fig, 12, 52 + 0.5 * 130, "after", gid="row")
    size = len(after)
    head = f"one block of {size} weights, divided by its largest magnitude, {absmax:.3g};"
    put_text(fig, _LEFT, 222, f"{head} lines: the 16 levels", gid="block")
    put_text(fig, (_LEFT + _RIGHT) / 2, 14, "weight / largest magnitude", ha="center")


def _typical_block(pair: WeightPair) -> tuple[np.ndarray | None, np.ndarray, float]:
    """The block with the median absmax: its weights before and after, each over its own absmax."""
    size = min(pair.block_size, pair.after.numel())
    blocks = pair.after.float().flatten()[: pair.after.numel() // size * size].reshape(-1, size)
    peaks = blocks.abs().amax(dim=1)
    chosen = int(peaks.argsort()[len(peaks) // 2])
    after = blocks[chosen] / peaks[chosen].clamp_min(1e-30)
    if pair.before is None:
        return None, after.numpy(), float(peaks[chosen])
    flat = pair.before.flatten()[chosen * size : (chosen + 1) * size].float()
    peak = flat.abs().max()
    return (flat / peak.clamp_min(1e-30)).numpy(), after.numpy(), float(peak)


def _span(pair: WeightPair) -> float:
    """Where the axes of the histograms end, on both sides of 0."""
    return _SIGMAS * float((pair.after if pair.before is None else pair.before).float().std())


def _share_beyond(pair: WeightPair) -> float:
    """Share of the weights, as they are now, that the histograms leave out."""
    return float((pair.after.float().abs() > _span(pair)).float().mean())


def _histogram(matrix: torch.Tensor, span: float) -> np.ndarray:
    """Share of the weights in each of `_BINS` bins from -span to span, in percent."""
    counts = torch.histc(matrix.float(), bins=_BINS, min=-span, max=span)
    return (100 * counts / matrix.numel()).numpy()


def _axes(fig: Figure, bottom: float, high: float, left: float = _LEFT, right: float = _RIGHT):
    width, height = fig.get_size_inches() * DPI
    ax = fig.add_axes((left / width, bottom / height, (right - left) / width, high / height))
    ax.set_facecolor(PAPER)
    ax.tick_params(labelsize=TEXT_PT, labelcolor=INK, color=MUTED)
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=MUTED)
    return ax


def _x_px(ax: Axes, x: float) -> float:
    return float(ax.transData.transform((x, 0))[0])


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, steps=[1, 2, 5, 10])


def _signed(value: float) -> str:
    return f"{value:+.3f}" if value else "0"


def _short(name: str) -> str:
    return name.removeprefix("model.")
