"""Which precision each weight of a model has, what that costs, and why: `quantization_report`.

    print(report)       totals, kinds of module, the dearest weights, changes during training
    report.rows         one dict a weight, for pandas
    report.draw()       weights by layer, prices before and after, bytes

Before is plain NF4: linears on nf4_64, embedding and head in 16 bit. Prices are those of plain
rounding; what the scale search takes away beyond them is not counted in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from colab_qlora.errors import UserError
from colab_qlora.quantization.budget import RUNGS, SIXTEEN_BIT
from colab_qlora.quantization.dynamic import DynamicQuantization, MapChange, dynamic_state
from colab_qlora.quantization.stored_weights import stored_weights, weight_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the order that people know from the model's code; other kinds come in the model's own order
_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
_FIRST_KINDS = (*_ATTENTION, "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class WeightRow:
    """A weight, now and in plain NF4.

    Attributes:
        name: of the module; of the first one where a tensor is tied.
        layer: number of its layer, or None outside the layers.
        kind: what it is called within its layer: q_proj, down_proj, embed_tokens, lm_head.
        rung, plain_rung: precision now and in plain NF4; one of `budget.RUNGS`, or the name of
            another format that the model was loaded in.
        bits: a weight, scales included.
        bytes, plain_bytes: of the whole matrix, scales included.
        price_before, price_after: in plain NF4 and now, nat^2 where they come from the user's
            data; None if not measured.
        output_error_before, output_error_after: |E x|^2 a token in plain NF4 and now; None if not
            measured.
        why: one clause.
    """

    name: str
    layer: int | None
    kind: str
    rung: str
    plain_rung: str
    bits: float
    bytes: int
    plain_bytes: int
    price_before: float | None = None
    price_after: float | None = None
    output_error_before: float | None = None
    output_error_after: float | None = None
    why: str = ""


@dataclass(frozen=True)
class KindTotals:
    """All weights of one kind; fields as of `WeightRow`, `rungs` says how many stand on each."""

    kind: str
    is_in_layers: bool
    rungs: Mapping[str, int]
    bytes: int
    plain_bytes: int
    price_before: float | None
    price_after: float | None


@dataclass(frozen=True, repr=False)
class QuantizationReport:
    """What `quantization_report` found; `str()` gives a table, a notebook shows one in HTML.

    Attributes:
        weights: in the model's order.
        changes: of rungs during training, in their order.
        budget: in the user's words; "" without one.
        cap_bytes: most that all weights may have together; None without a budget.
        has_prices: whether any were measured.
        has_data: whether prices come from the user's rows; otherwise they are squared errors of
            the numbers, which say little about the loss.
        source_name: the checkpoint.
    """

    weights: tuple[WeightRow, ...]
    changes: tuple[MapChange, ...] = ()
    budget: str = ""
    cap_bytes: int | None = None
    has_prices: bool = False
    has_data: bool = False
    source_name: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dict a weight, keys as of `WeightRow`: `pandas.DataFrame(report.rows)`."""
        return [asdict(weight) for weight in self.weights]

    @property
    def bytes(self) -> int:
        return sum(weight.bytes for weight in self.weights)

    @property
    def plain_bytes(self) -> int:
        """Of the same weights in plain NF4."""
        return sum(weight.plain_bytes for weight in self.weights)

    @property
    def added_share(self) -> float:
        """Bytes more than plain NF4, as a share of its linears' bytes: what "+5%" limits."""
        linears = sum(w.plain_bytes for w in self.weights if w.plain_rung != SIXTEEN_BIT)
        return (self.bytes - self.plain_bytes) / max(1, linears)

    @property
    def price_before(self) -> float | None:
        """Of all weights in plain NF4, in the unit of `WeightRow`; None if not measured."""
        return _sum(weight.price_before for weight in self.weights)

    @property
    def price_after(self) -> float | None:
        """Of all weights now; None if not measured."""
        return _sum(weight.price_after for weight in self.weights)

    @property
    def price_removed(self) -> float | None:
        """Share of plain NF4's price that is gone, below 0 if it grew; None if not measured."""
        before, after = self.price_before, self.price_after
        return None if not before or after is None else 1 - after / before

    @property
    def rungs(self) -> tuple[str, ...]:
        """Those in use, from the fewest bits to the most; formats that are no rung come last."""
        found = {weight.rung for weight in self.weights}
        return (*(rung for rung in RUNGS if rung in found), *sorted(found - set(RUNGS)))

    @property
    def kinds(self) -> tuple[KindTotals, ...]:
        """Totals by kind: attention and MLP first, then what stands outside the layers."""
        groups: dict[tuple[bool, str], list[WeightRow]] = {}
        for weight in self.weights:
            groups.setdefault((weight.layer is None, weight.kind), []).append(weight)
        known = {kind: place for place, kind in enumerate(_FIRST_KINDS)}
        order = sorted(groups, key=lambda key: (key[0], known.get(key[1], len(known))))
        return tuple(_kind_totals(key, groups[key]) for key in order)

    def draw(self, dark: bool = False) -> Figure:
        """Draw the report, 800 px wide at 100 dpi; `describe` has the same in words.

        Args:
            dark: light on dark paper.

        Returns:
            A figure of its own, which no pyplot state knows of: weights by kind and layer coloured
            by bits a weight, prices of plain NF4 and now, and bytes of plain NF4 and now.
        """
        from colab_qlora.quantization.report_picture import draw_report

        return draw_report(self, dark)

    def describe(self) -> str:
        """The picture in words, as `figure_bundle` wants them."""
        from colab_qlora.quantization.report_words import description

        return description(self)

    def __str__(self) -> str:
        from colab_qlora.quantization.report_words import table

        return table(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from colab_qlora.quantization.report_html import html_table

        return html_table(self)


def quantization_report(model: Any) -> QuantizationReport:
    """Say which precision each weight of a model has, what it costs in bytes and price, and why.

    Args:
        model: from `FastLanguageModel`, with or without adapters. One that was not loaded with
            quantization="dynamic" has rungs and bytes, and no prices.

    Returns:
        A report; print it for a table, or call its `draw()`. It runs nothing on the model.

    Raises:
        UserError: no model, or one without any 4-bit weight.

    Example:
        >>> print(quantization_report(model))  # doctest: +SKIP
    """
    state = dynamic_state(model)
    if state is not None:
        return _dynamic_report(state)
    if not hasattr(model, "named_modules"):
        raise UserError(
            "quantization_report takes a model",
            got=type(model).__name__,
            allowed="what FastLanguageModel.from_pretrained or get_peft_model returned",
        )
    found = stored_weights(model)
    if not any(weight.is_4bit for weight in found):
        formats = sorted({weight.rung for weight in found})
        raise UserError(
            "the model has no 4-bit weight to report on",
            got=f"{type(model).__name__} with weights in {', '.join(formats) or 'no format'}",
            allowed="a model that was loaded with load_in_4bit=True",
            do="Load it with FastLanguageModel.from_pretrained(..., load_in_4bit=True)",
        )
    weights = tuple(
        WeightRow(w.name, *place_of(w.name), w.rung, w.plain_rung, w.bits, w.bytes, w.plain_bytes)
        for w in found
    )
    config = getattr(model, "config", None)
    return QuantizationReport(weights, source_name=getattr(config, "_name_or_path", "") or "")


def place_of(name: str) -> tuple[int | None, str]:
    """Layer and kind of a weight by its name: "model.layers.3.mlp.up_proj" is (3, "up_proj")."""
    parts = name.split(".")
    last = len(parts) - 1
    # a number at the end says nothing alone: "head.0"
    while last > 0 and parts[last].isdigit():
        last -= 1
    layer = next((int(part) for part in parts[:last] if part.isdigit()), None)
    return layer, ".".join(parts[last:])


def _dynamic_report(state: DynamicQuantization) -> QuantizationReport:
    weights = []
    for name, now in state.map.placements.items():
        errors = {rung: price.output_error for rung, price in state.prices.get(name, {}).items()}
        count = weight_count(now.plain_rung, now.plain_bytes)
        weights.append(
            WeightRow(
                name,
                *place_of(name),
                rung=now.rung,
                plain_rung=now.plain_rung,
                bits=8 * now.bytes / max(1, count),
                bytes=now.bytes,
                plain_bytes=now.plain_bytes,
                price_before=now.plain_price,
                price_after=now.price,
                output_error_before=errors.get(now.plain_rung),
                output_error_after=errors.get(now.rung),
                why=now.why,
            )
        )
    return QuantizationReport(
        tuple(weights),
        tuple(state.history),
        state.budget,
        state.cap_bytes,
        has_prices=bool(weights),
        has_data=state.has_data,
        source_name=state.source_name,
    )


def _kind_totals(key: tuple[bool, str], weights: list[WeightRow]) -> KindTotals:
    return KindTotals(
        key[1],
        not key[0],
        Counter(weight.rung for weight in weights),
        sum(weight.bytes for weight in weights),
        sum(weight.plain_bytes for weight in weights),
        _sum(weight.price_before for weight in weights),
        _sum(weight.price_after for weight in weights),
    )


def _sum(numbers: Iterable[float | None]) -> float | None:
    """The sum, or None if there is none to add up."""
    known = [number for number in numbers if number is not None]
    return math.fsum(known) if known else None
