"""A quantisation report as a picture: weights by layer, prices by kind, bytes.

Every size is in px of an 800 px wide figure; text is 11 pt or more at 100 dpi. Nothing is said by
colour alone: rungs differ in lightness and hatch, and bars carry their numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from colab_qlora.curves.picture.sheet import DPI, LINE_PX, Sheet
from colab_qlora.quantization.report import QuantizationReport
from colab_qlora.quantization.report_bars import BytesPanel, PricesPanel
from colab_qlora.quantization.report_grid import GridPanel
from colab_qlora.quantization.report_style import ON_DARK, ON_LIGHT
from colab_qlora.quantization.report_words import percent_text, size_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_PX, LEFT_PX, RIGHT_PX = 800, 24, 776
_HEAD_PX, _GAP_PX = 76, 18


def draw_report(report: QuantizationReport, dark: bool = False) -> Figure:
    """Draw a report, 800 px wide and as high as its kinds of module need.

    Args:
        report: from `quantization_report`.
        dark: light on dark paper.

    Returns:
        The figure. A triangle on a cell points up where training moved the weight to more bits
        last, down where to fewer; a panel of prices is there only if they were measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = ON_DARK if dark else ON_LIGHT
    fig = Figure((WIDTH_PX / DPI, WIDTH_PX / DPI), dpi=DPI, facecolor=style.theme.paper)
    FigureCanvasAgg(fig)  # measures text; it attaches to this figure alone
    # words are measured before the height is known
    measuring = Sheet(fig, style.theme.ink)
    panels: list[GridPanel | PricesPanel | BytesPanel] = [
        GridPanel(report, style, measuring, LEFT_PX, RIGHT_PX)
    ]
    if report.has_prices:
        panels.append(PricesPanel(report, style, measuring, LEFT_PX, RIGHT_PX))
    panels.append(BytesPanel(report, style, measuring, LEFT_PX, RIGHT_PX))
    height = _HEAD_PX + sum(panel.height + _GAP_PX for panel in panels)
    fig.set_size_inches(WIDTH_PX / DPI, round(height) / DPI)
    sheet = Sheet(fig, style.theme.ink)
    sheet.put_title(_title(report), LEFT_PX)
    subtitle, _ = sheet.fit(_subtitle(report), RIGHT_PX - LEFT_PX)
    sheet.put(LEFT_PX, sheet.height - 24 - LINE_PX, subtitle, color=style.theme.muted)
    top = sheet.height - _HEAD_PX
    for panel in panels:
        panel.draw(sheet, top)
        top -= panel.height + _GAP_PX
    return fig


def _title(report: QuantizationReport) -> str:
    share = percent_text(report.added_share)
    if report.price_removed is None:
        more = "as plain NF4" if report.added_share == 0 else f"{share} of plain NF4's linears"
        return f"Precision of the weights: {size_text(report.bytes)}, {more}"
    what = "price" if report.has_data else "squared error"
    moved = percent_text(-report.price_removed)
    return f"Dynamic quantisation: {what} {moved} for {share} of plain NF4's linears"


def _subtitle(report: QuantizationReport) -> str:
    # of a folder its own name: a picture is shown elsewhere
    name = Path(report.source_name).name if Path(report.source_name).is_absolute() else ""
    parts = [name or report.source_name] if report.source_name else []
    if report.budget:
        parts.append(f"budget {report.budget}")
    if not report.has_prices:
        parts.append("prices were not measured")
    elif report.has_data:
        parts.append("prices measured on your data")
    else:
        parts.append("no data, so the error of the numbers stands for the price")
    return "; ".join(parts)
