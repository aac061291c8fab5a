"""A quantisation report in words: two sentences, and a table."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from colab_qlora.curves.picture.sheet import shorten
from colab_qlora.quantization.dynamic import MapChange
from colab_qlora.quantization.report import KindTotals, QuantizationReport, WeightRow

WIDTH = 100
MOST_DEAREST, MOST_CHANGES = 10, 20
_LONGEST_KIND, _DEEP = 24, " " * 6
HOW_TO_MEASURE = (
    "Prices were not measured: load the 16-bit checkpoint with FastLanguageModel.from_pretrained("
    '..., quantization="dynamic", calibration_data=rows) to have them.'
)


def size_text(size: float) -> str:
    """ "12.3 MiB", with three digits or four."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= factor:
            digits = 2 if unit == "GiB" else 1 if abs(size) < 999.5 * factor else 0
            return f"{size / factor:.{digits}f} {unit}"
    return f"{size:.0f} B"


def price_text(price: float | None) -> str:
    """Three digits; "-" if not measured."""
    return "-" if price is None else f"{price:.3g}"


def percent_text(share: float) -> str:
    """ "+4.9 %", "-63 %"; never "-0 %"."""
    text = f"{100 * share:+.{_digits(share)}f} %"
    return "0 %" if float(text[:-2]) == 0 else text


def _digits(share: float) -> int:
    # all but a trace is not all
    return 1 if abs(share) < 0.0995 or 0.995 <= abs(share) < 1 else 0


def sentences(report: QuantizationReport) -> tuple[str, str]:
    """Bytes in one sentence, price in another."""
    budget = f'; the budget was "{report.budget}"' if report.budget else ""
    name = f"{report.source_name}: " if report.source_name else ""
    plain = ", as plain NF4 has"
    if report.bytes != report.plain_bytes:
        share = percent_text(report.added_share)
        plain = (
            f" where plain NF4 has {size_text(report.plain_bytes)}: {share} of its linears' bytes"
        )
    return f"{name}{size_text(report.bytes)} of weights{plain}{budget}.", _price_sentence(report)


def _price_sentence(report: QuantizationReport) -> str:
    before, after = report.price_before, report.price_after
    if not report.has_prices or before is None or after is None:
        return HOW_TO_MEASURE
    moved = "fell" if after < before else "rose" if after > before else "stayed"
    removed = report.price_removed
    part = "" if removed is None else f", {_removed_text(removed)}"
    if report.has_data:
        return (
            f"The price of all weights, measured on your data, {moved} from {price_text(before)} "
            f"to {price_text(after)} nat^2{part}."
        )
    return (
        f"The squared error of all weights {moved} from {price_text(before)} to "
        f"{price_text(after)}{part}; it says little about the loss, for which "
        "calibration_data=rows is needed."
    )


def _removed_text(removed: float) -> str:
    digits = _digits(removed)
    return f"{100 * abs(removed):.{digits}f} % {'removed' if removed >= 0 else 'added'}"


def table(report: QuantizationReport) -> str:
    """All that the report says, in lines of about 100 characters."""
    blocks = [[line for text in sentences(report) for line in textwrap.wrap(text, WIDTH)]]
    blocks.append(_aligned(kind_cells(report)))
    if report.has_prices:
        unit = "nat^2" if report.has_data else "squared error of the numbers"
        blocks[-1].append(f"price: {unit}, of plain rounding; the scale search is not counted in")
        blocks.append(["the dearest weights", *_dearest_lines(report)])
    if report.changes:
        blocks.append([changes_head(report.changes), *change_lines(report)])
    return "\n\n".join("\n".join(block) for block in blocks)


def kind_cells(report: QuantizationReport) -> list[list[str]]:
    """The table by kind, with its head and a last row of totals."""
    head = ["kind", *report.rungs, "bytes", "plain NF4"]
    if report.has_prices:
        head += ["price before", "after", "of all removed"]
    kinds = report.kinds
    total = KindTotals(
        "all",
        True,
        Counter(weight.rung for weight in report.weights),
        report.bytes,
        report.plain_bytes,
        report.price_before,
        report.price_after,
    )
    return [head, *(_kind_row(report, kind, total) for kind in (*kinds, total))]


def _kind_row(report: QuantizationReport, kind: KindTotals, total: KindTotals) -> list[str]:
    counts = [str(kind.rungs[rung]) if kind.rungs.get(rung) else "." for rung in report.rungs]
    cells = [
        shorten(kind.kind, _LONGEST_KIND),
        *counts,
        size_text(kind.bytes),
        size_text(kind.plain_bytes),
    ]
    if report.has_prices:
        removed, of_all = _removed(kind), _removed(total)
        # a small negative share would be "-0"
        share = f"{round(100 * removed / of_all)} %" if of_all > 0 else "-"
        cells += [price_text(kind.price_before), price_text(kind.price_after), share]
    return cells


def _removed(kind: KindTotals) -> float:
    return (kind.price_before or 0.0) - (kind.price_after or 0.0)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join((first.ljust(widths[0]), *cells)))
    return lines


def dearest(report: QuantizationReport) -> list[WeightRow]:
    """The weights of the highest price, in plain NF4 or now, the dearest first."""

    def price(weight: WeightRow) -> float:
        return max(weight.price_before or 0.0, weight.price_after or 0.0)

    return sorted(report.weights, key=price, reverse=True)[:MOST_DEAREST]


def labels(report: QuantizationReport) -> dict[str, str]:
    """A short name of each weight: "layer 3 up_proj", or its own where that fits several."""
    short = {
        w.name: w.kind if w.layer is None else f"layer {w.layer} {w.kind}" for w in report.weights
    }
    uses = Counter(short.values())
    return {name: label if uses[label] == 1 else name for name, label in short.items()}


def rung_text(weight: WeightRow) -> str:
    """ "nf4_64 -> int8", or the one rung."""
    return (
        weight.rung
        if weight.rung == weight.plain_rung
        else (f"{weight.plain_rung} -> {weight.rung}")
    )


def _dearest_lines(report: QuantizationReport) -> list[str]:
    names = labels(report)
    rows = [
        [
            f"  {names[w.name]}",
            rung_text(w),
            f"{price_text(w.price_before)} -> {price_text(w.price_after)}",
        ]
        for w in dearest(report)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for row, weight in zip(rows, dearest(report), strict=True):
        lines.append("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
        why = reason(weight.why, names)
        lines += textwrap.wrap(why, WIDTH, initial_indent=_DEEP, subsequent_indent=_DEEP)
    return lines


def reason(why: str, names: Mapping[str, str]) -> str:
    """A reason with the short name of the weight that another one was demoted for."""
    return re.sub(r"(?<=for )\S+(?=:)", lambda found: names.get(found[0], found[0]), why)


def changes_head(changes: Sequence[MapChange]) -> str:
    """How many changes there were, in which directions."""
    up = sum(change.added_bytes > 0 for change in changes)
    word = "change" if len(changes) == 1 else "changes"
    return f"{len(changes)} {word} during training: {up} up, {len(changes) - up} down"


def change_lines(report: QuantizationReport) -> list[str]:
    """A line a change, 20 at most, then how many more there were."""
    names = labels(report)
    lines: list[str] = []
    for change in report.changes[:MOST_CHANGES]:
        sign = "+" if change.added_bytes >= 0 else "-"
        text = (
            f"  step {change.step}: {names.get(change.name, change.name)} {change.before} -> "
            f"{change.after}, {sign}{size_text(abs(change.added_bytes))}; "
            f"{reason(change.why, names)}"
        )
        lines.append(text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}...")
    more = len(report.changes) - MOST_CHANGES
    return [*lines, f"  and {more} more"] if more > 0 else lines


def description(report: QuantizationReport) -> str:
    """The picture of a report in words, for those who cannot see it."""
    said = list(sentences(report))
    counts = Counter(weight.rung for weight in report.weights)
    said.append(f"Weights: {_listed(f'{counts[rung]} on {rung}' for rung in report.rungs)}.")
    raised = Counter(
        (weight.kind, weight.rung) for weight in report.weights if weight.bytes > weight.plain_bytes
    )
    if raised:
        most = raised.most_common(5)
        said.append(
            f"Most often above plain NF4: {_listed(f'{n} {kind} on {r}' for (kind, r), n in most)}."
        )
    if report.has_prices:
        dear = sorted(report.kinds, key=lambda kind: -(kind.price_before or 0.0))[:3]
        moved = (
            f"{kind.kind} from {price_text(kind.price_before)} to {price_text(kind.price_after)}"
            for kind in dear
        )
        said.append(f"The dearest kinds: {_listed(moved)}.")
    if report.changes:
        said.append(f"{changes_head(report.changes)}.")
    return " ".join(said)


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts)
