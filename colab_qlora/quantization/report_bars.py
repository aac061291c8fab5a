"""Prices by kind of module as paired bars, and bytes as two stacked ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from colab_qlora.curves.picture.sheet import LINE_PX, Sheet
from colab_qlora.quantization.report import KindTotals, QuantizationReport
from colab_qlora.quantization.report_style import PictureStyle
from colab_qlora.quantization.report_words import percent_text, price_text, size_text

# in px
_ROW, _BAR, _WIDEST_NAME, _GAP = 30.0, 10.0, 150.0, 10.0
_STACK, _STACK_ROW = 24.0, 32.0
MOST_KINDS = 12
# a range that is wider than this many times needs a logarithmic scale
_LOG_RANGE = 30.0
_MOST_DECADES = 8


class PricesPanel:
    """Price of each kind in plain NF4 and now; draw it from `top` down, `height` px high."""

    def __init__(
        self,
        report: QuantizationReport,
        style: PictureStyle,
        sheet: Sheet,
        left: float,
        right: float,
    ) -> None:
        self.style, self.left, self.right = style, left, right
        self.kinds = _dearest_kinds(report)
        self.hidden = len(report.kinds) - len(self.kinds)
        self.unit = "nat\u00b2" if report.has_data else "squared error of the numbers"
        names = max((sheet.measure(kind.kind) for kind in self.kinds), default=0.0)
        self.start = left + min(names, _WIDEST_NAME) + _GAP
        numbers = max((sheet.measure(_moved(kind)) for kind in self.kinds), default=0.0)
        self.end = right - numbers - _GAP
        self.scale = price_scale(
            price for kind in self.kinds for price in (kind.price_before, kind.price_after)
        )

    @property
    def height(self) -> float:
        return 2 * LINE_PX + _ROW * len(self.kinds) + LINE_PX + LINE_PX * bool(self.hidden)

    def draw(self, sheet: Sheet, top: float) -> None:
        theme, y = self.style.theme, top - LINE_PX / 2
        log = ", log scale" if self.scale.is_log else ""
        head = f"Price by kind of module, {self.unit}{log}"
        sheet.put(self.left, y, head, fontweight="bold")
        y -= LINE_PX
        x = self.left
        for text, is_now in (("plain NF4", False), ("now", True)):
            self._draw_bar(sheet, x, y - _BAR / 2, 20, is_now)
            sheet.put(x + 26, y, text)
            x += 26 + sheet.measure(text) + 20
        bottom = top - 2 * LINE_PX - _ROW * len(self.kinds)
        for value, text in self.scale.ticks(sheet, self.end - self.start):
            x = self.start + self.scale(value) * (self.end - self.start)
            sheet.add_line(
                (x, x), (bottom, bottom + _ROW * len(self.kinds)), color=theme.grid, zorder=0
            )
            sheet.put(x, bottom - LINE_PX / 2, text, ha="center", color=theme.muted)
        for number, kind in enumerate(self.kinds):
            self._draw_kind(sheet, top - 2 * LINE_PX - _ROW * (number + 1), kind)
        if self.hidden:
            text = f"and {self.hidden} kinds more, of lower prices"
            sheet.put(self.left, bottom - 1.5 * LINE_PX, text, color=theme.muted)

    def _draw_kind(self, sheet: Sheet, bottom: float, kind: KindTotals) -> None:
        middle = bottom + _ROW / 2
        sheet.put(self.left, middle, sheet.fit(kind.kind, _WIDEST_NAME)[0])
        for price, is_now in ((kind.price_before, False), (kind.price_after, True)):
            wide = self.scale(price or 0.0) * (self.end - self.start)
            y = middle - _BAR - 0.5 if is_now else middle + 0.5
            if price:
                gid = f"price {kind.kind} {'now' if is_now else 'plain'}"
                self._draw_bar(sheet, self.start, y, max(wide, 2.0), is_now, gid)
        sheet.put(self.right, middle, _moved(kind), ha="right")

    def _draw_bar(
        self, sheet: Sheet, left: float, bottom: float, wide: float, is_now: bool, gid: str = ""
    ) -> None:
        theme = self.style.theme
        face, edge = (self.style.price,) * 2 if is_now else (theme.grid, theme.muted)
        sheet.add_patch(
            left, bottom, wide, _BAR, facecolor=face, edgecolor=edge, linewidth=1, gid=gid or None
        )


@dataclass(frozen=True)
class PriceScale:
    """Prices to shares of a bar's room; 0 at `low`, which is a power of 10 where it is a log."""

    low: float
    high: float
    is_log: bool

    def __call__(self, price: float) -> float:
        if price <= self.low:
            return 0.0
        if self.is_log:
            return math.log(price / self.low) / math.log(self.high / self.low)
        return price / self.high

    def ticks(self, sheet: Sheet, room: float) -> list[tuple[float, str]]:
        """Values to mark, with their words: powers of 10 as far as they have room, else 0."""
        if not self.is_log:
            return [(0.0, "0")]
        first = round(math.log10(self.low))
        decades = math.floor(math.log10(self.high) + 1e-9) - first
        wide = sheet.measure("1e-10") + 16
        step = 1
        while step < decades and room * self(10.0 ** (first + step)) < wide:
            step += 1
        return [(10.0**e, f"1e{e}") for e in range(first, first + decades + 1, step)]


def price_scale(prices: Iterable[float | None]) -> PriceScale:
    """A scale for bars of these prices: linear, or logarithmic where they are far apart."""
    known = [price for price in prices if price]
    if not known:
        return PriceScale(0.0, 1.0, False)
    low, high = min(known), max(known)
    if high <= _LOG_RANGE * low:
        return PriceScale(0.0, high, False)
    # half a decade at least below the shortest bar, so that it has a length
    first = math.floor(math.log10(low) - 0.5)
    first = max(first, math.floor(math.log10(high)) - _MOST_DECADES)
    return PriceScale(10.0**first, high, True)


def _moved(kind: KindTotals) -> str:
    before, after = kind.price_before or 0.0, kind.price_after or 0.0
    share = f" ({percent_text(after / before - 1)})" if before else ""
    return f"{price_text(before)} \u2192 {price_text(after)}{share}"


def _dearest_kinds(report: QuantizationReport) -> list[KindTotals]:
    """The dearest ones, in the report's order."""

    def price(kind: KindTotals) -> float:
        return max(kind.price_before or 0.0, kind.price_after or 0.0)

    kept = sorted(report.kinds, key=price, reverse=True)[:MOST_KINDS]
    return [kind for kind in report.kinds if kind in kept]


@dataclass(frozen=True)
class _Segment:
    """A part of a bytes bar; `name` is "" for the linears of a rung."""

    rung: str
    bytes: int
    name: str = ""

    @property
    def text(self) -> str:
        return f"{self.name or 'layers'} {self.rung} {size_text(self.bytes)}"


class BytesPanel:
    """Bytes of plain NF4 and now, by rung, what is outside the layers apart."""

    def __init__(
        self,
        report: QuantizationReport,
        style: PictureStyle,
        sheet: Sheet,
        left: float,
        right: float,
    ) -> None:
        self.style, self.left, self.right = style, left, right
        self.bars = {"plain NF4": _segments(report, True), "now": _segments(report, False)}
        self.totals = {"plain NF4": report.plain_bytes, "now": report.bytes}
        self.start = left + max(map(sheet.measure, self.bars)) + _GAP
        texts = map(size_text, self.totals.values())
        self.end = right - max(map(sheet.measure, texts)) - _GAP
        self.scale = (self.end - self.start) / max(1, *self.totals.values())
        self.notes = self._notes(sheet)

    @property
    def height(self) -> float:
        return LINE_PX + 2 * _STACK_ROW + LINE_PX * len(self.notes) + 6

    def draw(self, sheet: Sheet, top: float) -> None:
        head = "Bytes, layers by rung, then what is outside them"
        sheet.put(self.left, top - LINE_PX / 2, head, fontweight="bold")
        middle = top - LINE_PX - _STACK_ROW / 2 - 2
        for name, segments in self.bars.items():
            sheet.put(self.left, middle, name)
            sheet.put(self.right, middle, size_text(self.totals[name]), ha="right")
            self._draw_stack(sheet, middle - _STACK / 2, segments, name)
            middle -= _STACK_ROW
        for number, note in enumerate(self.notes):
            y = middle + _STACK_ROW / 2 - LINE_PX * (number + 0.5) - 2
            sheet.put(self.left, y, note, color=self.style.theme.muted)

    def _draw_stack(self, sheet: Sheet, bottom: float, segments: list[_Segment], bar: str) -> None:
        left = self.start
        for segment in segments:
            wide, look = segment.bytes * self.scale, self.style.of(segment.rung)
            text = self._fitting(sheet, segment)
            patch = look.patch(is_hatched=not text, outline=self.style.theme.muted)
            # what is outside the layers stands a little apart
            inset = 2.0 if segment.name and wide > 6 else 0.0
            gid = f"bytes {bar} {segment.name or segment.rung}"
            sheet.add_patch(left + inset, bottom, wide - inset, _STACK, gid=gid, **patch)
            if text:
                x = left + (inset + wide) / 2
                sheet.put(x, bottom + _STACK / 2, text, ha="center", color=look.ink)
            left += wide

    def _fitting(self, sheet: Sheet, segment: _Segment) -> str:
        name = segment.name or segment.rung
        room = segment.bytes * self.scale - 10
        for text in (f"{name} {size_text(segment.bytes)}", name):
            if sheet.measure(text) <= room:
                return text
        return ""

    def _notes(self, sheet: Sheet) -> list[str]:
        """What found no room in the bars, in lines."""
        lines: list[str] = []
        for bar, segments in self.bars.items():
            small = [s.text for s in segments if size_text(s.bytes) not in self._fitting(sheet, s)]
            line = f"{bar}:"
            for text in small:
                longer = f"{line} {text};"
                if sheet.measure(longer) > self.right - self.left and not line.endswith(":"):
                    lines.append(line)
                    longer = f"{text};"
                line = longer
            if small:
                lines.append(line.removesuffix(";"))
        return lines


def _segments(report: QuantizationReport, is_plain: bool) -> list[_Segment]:
    layers: dict[str, int] = dict.fromkeys(report.rungs, 0)
    others: dict[tuple[str, str], int] = {}
    for weight in report.weights:
        rung = weight.plain_rung if is_plain else weight.rung
        size = weight.plain_bytes if is_plain else weight.bytes
        if weight.layer is None:
            key = weight.kind, rung
            others[key] = others.get(key, 0) + size
        else:
            layers[rung] = layers.get(rung, 0) + size
    found = [_Segment(rung, size) for rung, size in layers.items()]
    found += [_Segment(rung, size, kind) for (kind, rung), size in others.items()]
    return [segment for segment in found if segment.bytes]
