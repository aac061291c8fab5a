"""The weights of a model as a grid: a row a kind of module, a column a layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from colab_qlora.curves.picture.sheet import DPI, LINE_PX, Sheet
from colab_qlora.quantization.budget import RUNGS
from colab_qlora.quantization.report import QuantizationReport, WeightRow
from colab_qlora.quantization.report_style import PictureStyle

# in px
_ROW, _CELL = 30.0, 26.0
_WIDEST_CELL, _WIDEST_NAME = 96.0, 150.0
_NAME_GAP, _KEY_GAP, _SWATCH = 10.0, 14.0, 16.0
_MARK = 10.0
# models of experts by the dozen would need a wall of rows
MOST_KINDS = 16


@dataclass(frozen=True)
class _Key:
    """An entry of the legend: a rung, or a mark of a change ("^" or "v")."""

    text: str
    rung: str = ""
    mark: str = ""


class GridPanel:
    """Bits a weight, by kind and layer; draw it from `top` down, `height` px high."""

    def __init__(
        self,
        report: QuantizationReport,
        style: PictureStyle,
        sheet: Sheet,
        left: float,
        right: float,
    ) -> None:
        self.style, self.left, self.right = style, left, right
        kinds = [kind.kind for kind in report.kinds if kind.is_in_layers]
        self.kinds, self.hidden = kinds[:MOST_KINDS], len(kinds[MOST_KINDS:])
        self.cells: dict[tuple[str, int], list[WeightRow]] = {}
        for weight in report.weights:
            if weight.layer is not None:
                self.cells.setdefault((weight.kind, weight.layer), []).append(weight)
        self.outside = [weight for weight in report.weights if weight.layer is None]
        self.layers = 1 + max((layer for _, layer in self.cells), default=-1)
        # the last change of each weight is how it came to where it is
        self.moves = {c.name: "^" if c.added_bytes > 0 else "v" for c in report.changes}
        names = max((sheet.measure(kind) for kind in self.kinds), default=0.0)
        self.start = left + min(names, _WIDEST_NAME) + _NAME_GAP
        room = (right - self.start) / max(1, self.layers)
        self.pitch = min(room, _WIDEST_CELL)
        self.gap = 1.0 if self.pitch >= 6 else 0.0
        self.has_text = self.pitch >= sheet.measure("4.13") + 2 * _MARK + 8
        self.keys = _rows_of_keys(_keys(report, self.moves), sheet, right - left)
        outside = [_Key(f"{w.name}: {w.rung}, {w.bits:.3g} bits", w.rung) for w in self.outside]
        self.outside_keys = _rows_of_keys(outside, sheet, right - left)

    @property
    def height(self) -> float:
        grid = _ROW * len(self.kinds) + 2 * LINE_PX if self.kinds else 0.0
        lines = 1 + len(self.keys) + len(self.outside_keys) + bool(self.hidden)
        lines += bool(self.outside_keys)
        return LINE_PX * lines + grid

    def draw(self, sheet: Sheet, top: float) -> None:
        theme = self.style.theme
        y = top - LINE_PX / 2
        sheet.put(self.left, y, "Precision by layer, bits a weight", fontweight="bold")
        y -= LINE_PX
        for keys in self.keys:
            self._draw_keys(sheet, y, keys)
            y -= LINE_PX
        y += LINE_PX / 2 - 4
        if self.kinds:
            for number, kind in enumerate(self.kinds):
                self._draw_row(sheet, y - _ROW * (number + 1), kind)
            y -= _ROW * len(self.kinds)
            self._draw_layer_numbers(sheet, y - LINE_PX / 2)
            y -= LINE_PX + LINE_PX
        y += LINE_PX / 2 - 6
        if self.hidden:
            text = f"and {self.hidden} kinds more, which report.rows lists"
            sheet.put(self.left, y, text, color=theme.muted)
            y -= LINE_PX
        if self.outside_keys:
            sheet.put(self.left, y, "outside the layers", color=theme.muted)
            y -= LINE_PX
        for keys in self.outside_keys:
            self._draw_keys(sheet, y, keys)
            y -= LINE_PX

    def _draw_row(self, sheet: Sheet, bottom: float, kind: str) -> None:
        name, _ = sheet.fit(kind, _WIDEST_NAME)
        sheet.put(self.left, bottom + _ROW / 2, name)
        for layer in range(self.layers):
            weights = self.cells.get((kind, layer), [])
            left = self.start + self.pitch * layer
            self._draw_cell(sheet, left, bottom + (_ROW - _CELL) / 2, weights)
            if not weights:
                x, y = left + (self.pitch - self.gap) / 2, bottom + _ROW / 2
                sheet.add_line(
                    [x],
                    [y],
                    gid=f"none {kind} {layer}",
                    marker=".",
                    markersize=2,
                    color=self.style.theme.muted,
                )

    def _draw_cell(
        self, sheet: Sheet, left: float, bottom: float, weights: list[WeightRow]
    ) -> None:
        """One weight fills the cell; several (experts) share it by their rungs."""
        counts = Counter(weight.rung for weight in weights)
        wide, y = self.pitch - self.gap, bottom
        is_one = len(counts) == 1
        for rung in sorted(counts, key=_place):
            look, high = self.style.of(rung), _CELL * counts[rung] / len(weights)
            has_text = self.has_text and is_one
            patch = look.patch(is_hatched=not has_text, outline=self.style.theme.muted)
            gid = f"cell {weights[0].kind} {weights[0].layer} {rung}"
            sheet.add_patch(left, y, wide, high, gid=gid, **patch)
            if has_text:
                bits = sum(weight.bits for weight in weights) / len(weights)
                text = f"{bits:.2f}" if bits < 10 else f"{bits:.0f}"
                sheet.put(left + wide / 2, y + high / 2, text, ha="center", color=look.ink)
            y += high
        marks = {self.moves[w.name] for w in weights if w.name in self.moves}
        if marks:
            x = left + wide - _MARK if self.has_text else left + wide / 2
            mark = marks.pop() if len(marks) == 1 else "D"
            self._draw_mark(sheet, x, bottom + _CELL / 2, mark, min(_MARK, 0.75 * wide))

    def _draw_mark(self, sheet: Sheet, x: float, y: float, mark: str, size: float) -> None:
        # ink with a rim of paper is seen on every rung and every hatch
        theme = self.style.theme
        rim = {"markerfacecolor": theme.ink, "markeredgecolor": theme.paper, "markeredgewidth": 1.2}
        points = size * 72 / DPI + 1.2
        sheet.add_line([x], [y], marker=mark, markersize=points, gid=f"change {mark}", **rim)

    def _draw_layer_numbers(self, sheet: Sheet, y: float) -> None:
        muted, numbers = self.style.theme.muted, tick_layers(self.layers, self.pitch)
        for layer in numbers:
            x = self.start + self.pitch * (layer + 0.5) - self.gap / 2
            sheet.put(x, y, str(layer), ha="center", color=muted)
        sheet.put(self.start - _NAME_GAP, y, "layer", ha="right", color=muted)

    def _draw_keys(self, sheet: Sheet, y: float, keys: list[_Key]) -> None:
        x = self.left
        for key in keys:
            if key.mark:
                self._draw_mark(sheet, x + _SWATCH / 2, y, key.mark, _MARK)
            else:
                look = self.style.of(key.rung)
                patch = look.patch(is_hatched=True, outline=self.style.theme.muted)
                sheet.add_patch(x, y - 7, _SWATCH, 14, **patch)
            sheet.put(x + _SWATCH + 6, y, key.text)
            x += _key_width(key, sheet)


def tick_layers(layers: int, pitch: float) -> list[int]:
    """Layers to number: each fifth or so, and the last where it has room; two digits are 20 px."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * pitch >= 30)
    found = list(range(0, layers, step))
    if layers and found[-1] != layers - 1 and (layers - 1 - found[-1]) * pitch >= 30:
        found.append(layers - 1)
    return found


def _place(rung: str) -> int:
    return RUNGS.index(rung) if rung in RUNGS else len(RUNGS)


def _keys(report: QuantizationReport, moves: dict[str, str]) -> list[_Key]:
    keys = []
    for rung in report.rungs:
        bits = [weight.bits for weight in report.weights if weight.rung == rung]
        keys.append(_Key(f"{rung} ({sum(bits) / len(bits):.3g}): {len(bits)}", rung))
    said = {"^": "raised in training", "v": "lowered"}
    return keys + [_Key(text, mark=mark) for mark, text in said.items() if mark in moves.values()]


def _key_width(key: _Key, sheet: Sheet) -> float:
    return _SWATCH + 6 + sheet.measure(key.text) + _KEY_GAP


def _rows_of_keys(keys: list[_Key], sheet: Sheet, room: float) -> list[list[_Key]]:
    rows: list[list[_Key]] = []
    used = room
    for key in keys:
        wide = _key_width(key, sheet)
        if not rows or used + wide - _KEY_GAP > room:
            rows.append([])
            used = 0.0
        rows[-1].append(key)
        used += wide
    return rows
