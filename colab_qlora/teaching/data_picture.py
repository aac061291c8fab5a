"""A data set as a picture: how long its rows are, and what becomes of their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from colab_qlora.curves.picture.layout import TEXT_PT
from colab_qlora.teaching.figures import (
    GRID,
    INK,
    LINE_PX,
    MUTED,
    PAPER,
    blank_figure,
    fill_rectangle,
    put_text,
    put_title,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from colab_qlora.data.report import DataReport

BINS = 40
_LEFT, _RIGHT, _WIDE, _HIGH = 70.0, 776.0, 800, 520
# what a token is -> colour and hatch; they part in lightness too
PARTS = {
    "learnt": ("#0072b2", ""),
    "read only": ("#c9ced6", "///"),
    "cut off": ("#d55e00", "xxx"),
}
_PLOT = (_LEFT, 250.0, _RIGHT - _LEFT, 190.0)  # left, bottom, width, height in px
_BAR_BOTTOM, _BAR_PX = 120.0, 34.0


def draw_data(report: DataReport) -> Figure:
    """Draw a histogram of row lengths above a bar of all tokens.

    Returns:
        A figure 800 px wide. Tokens are learnt (they carry a label), only read, or cut off behind
        max_seq_length.
    """
    fig = blank_figure(_WIDE, _HIGH)
    lengths = report.lengths
    put_title(fig, 24, f"{lengths.rows:,} rows, {lengths.tokens_total:,} tokens")
    _draw_lengths(fig, report)
    _draw_tokens(fig, token_parts(report))
    scripts = ", ".join(f"{name} {share:.1%}" for name, share in report.scripts)
    if scripts:
        put_text(fig, 24, 24, f"Letters: {scripts}", color=MUTED)
    return fig


def token_parts(report: DataReport) -> dict[str, int]:
    """Tokens that are learnt, only read, and cut off, of all rows."""
    window = report.lengths.max_seq_length
    found = dict.fromkeys(PARTS, 0)
    for tokens, labels in zip(report.row_tokens, report.row_labels, strict=True):
        kept = min(tokens, window)
        learnt = max(0, kept - (tokens - labels))
        found["learnt"] += learnt
        found["read only"] += kept - learnt
        found["cut off"] += tokens - kept
    return found


def _draw_lengths(fig: Figure, report: DataReport) -> None:
    left, bottom, wide, high = _PLOT
    axes: Any = fig.add_axes((left / _WIDE, bottom / _HIGH, wide / _WIDE, high / _HIGH))
    window, longest = report.lengths.max_seq_length, report.lengths.tokens_max
    # a window far beyond all rows would press them into a corner
    shows_window = window <= 1.5 * longest
    end = max(longest, window if shows_window else 0) * 1.02 + 1
    axes.hist(
        report.row_tokens, bins=BINS, range=(0, end), color=PARTS["learnt"][0], edgecolor=PAPER
    )
    axes.set_xlim(0, end)
    axes.set_facecolor(PAPER)
    axes.set_ylabel("rows", fontsize=TEXT_PT, color=INK)
    axes.set_xlabel("tokens of a row", fontsize=TEXT_PT, color=INK)
    axes.tick_params(labelsize=TEXT_PT, colors=INK)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    for name in ("top", "right"):
        axes.spines[name].set_visible(False)
    words = f"max_seq_length {window:,}" + ("" if shows_window else ", beyond all rows")
    put_text(fig, _RIGHT, bottom + high + 14, words, ha="right", color=MUTED, gid="window")
    if shows_window:
        axes.axvline(window, color=INK, linestyle="--", linewidth=1.5)


def _draw_tokens(fig: Figure, parts: dict[str, int]) -> None:
    total = max(1, sum(parts.values()))
    left, scale = 24.0, (_RIGHT - 24.0) / total
    key = 24.0
    put_text(fig, 24, _BAR_BOTTOM + _BAR_PX + 16, "What becomes of the tokens", fontweight="bold")
    for name, count in parts.items():
        colour, hatch = PARTS[name]
        style = {"facecolor": colour, "hatch": hatch, "edgecolor": PAPER, "linewidth": 0}
        fill_rectangle(fig, left, _BAR_BOTTOM, count * scale, _BAR_PX, gid=name, **style)
        left += count * scale
        words = f"{name} {count:,} ({count / total:.0%})"
        fill_rectangle(fig, key, _BAR_BOTTOM - LINE_PX - 12, 14, 14, **style)
        put_text(fig, key + 20, _BAR_BOTTOM - LINE_PX - 5, words)
        key += 20 + text_width(fig, words) + 28
