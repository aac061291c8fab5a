"""A quantisation report as HTML for a notebook; it takes the page's own colours."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from colab_qlora.quantization.report import QuantizationReport
from colab_qlora.quantization.report_words import (
    change_lines,
    changes_head,
    dearest,
    kind_cells,
    labels,
    price_text,
    reason,
    rung_text,
    sentences,
    size_text,
)

# lines are translucent grey, which shows on light and on dark pages alike
_STYLE = """<style>
.cq-quantization, .cq-quantization table {color: inherit; background: transparent}
.cq-quantization table {border-collapse: collapse; margin: 0.5em 0}
.cq-quantization tr, .cq-quantization th, .cq-quantization td {background: transparent;
 color: inherit; text-align: right; padding: 2px 8px}
.cq-quantization tr {border-bottom: 1px solid rgba(128, 128, 128, 0.4)}
.cq-quantization .cq-left {text-align: left}
</style>"""


def html_table(report: QuantizationReport) -> str:
    """The report as HTML without any resource of the network."""
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in sentences(report))
    parts = [paragraphs, _table(kind_cells(report))]
    names = labels(report)
    if report.has_prices:
        head = ["weight", "rung", "price before", "after", "why"]
        rows = [
            [
                names[w.name],
                rung_text(w),
                price_text(w.price_before),
                price_text(w.price_after),
                reason(w.why, names),
            ]
            for w in dearest(report)
        ]
        parts.append(_folded("the dearest weights", _table([head, *rows], left=(0, 1, 4))))
    if report.changes:
        lines = "<br>".join(html.escape(line.strip()) for line in change_lines(report))
        parts.append(_folded(changes_head(report.changes), f"<p>{lines}</p>"))
    parts.append(_folded(f"all {len(report.weights)} weights", _all_weights(report)))
    return f'{_STYLE}<div class="cq-quantization">{"".join(parts)}</div>'


def _all_weights(report: QuantizationReport) -> str:
    head = ["weight", "rung", "bits", "bytes"]
    if report.has_prices:
        head += ["price before", "after", "|E x|^2 before", "after"]
    rows = []
    for w in report.weights:
        row = [w.name, rung_text(w), f"{w.bits:.2f}", size_text(w.bytes)]
        if report.has_prices:
            numbers = w.price_before, w.price_after, w.output_error_before, w.output_error_after
            row += map(price_text, numbers)
        rows.append(row)
    return _table([head, *rows], left=(0, 1))


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def _table(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> str:
    """A table whose first row is its head; the first cell of a row is its head as well."""
    at_left = set(left)

    def cell(tag: str, place: int, text: str, scope: str) -> str:
        style = ' class="cq-left"' if place in at_left else ""
        return f"<{tag}{scope}{style}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", i, text, ' scope="col"') for i, text in enumerate(rows[0]))
    body = "".join(
        "<tr>"
        + cell("th", 0, row[0], ' scope="row"')
        + "".join(cell("td", i, text, "") for i, text in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
