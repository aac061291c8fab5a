"""The hyperparameters to begin with, and which way to move them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

# wide enough for the longest reason in two lines
_TEXT_COLUMNS = 38


@dataclass(frozen=True)
class StartingValue:
    """One hyperparameter.

    Attributes:
        name: what it is called in the code.
        start: the value to begin with.
        raise_when: what one sees when it is too low.
        lower_when: what one sees when it is too high.
    """

    name: str
    start: str
    raise_when: str
    lower_when: str


STARTING_VALUES = (
    StartingValue(
        "learning_rate",
        "2e-4",
        "the train loss falls too slowly",
        "the loss jumps or rises (halve it)",
    ),
    StartingValue(
        "num_train_epochs",
        "3",
        "the eval loss is still falling at the end",
        "the eval loss turns up while the train loss falls",
    ),
    StartingValue(
        "r (LoRA rank)",
        "16",
        "the result is too weak, and more data does not help",
        "memory is short, or the eval loss turns up early",
    ),
    StartingValue(
        "lora_alpha",
        "16 to 32: r, or twice r",
        "the adapter changes too little at a good learning rate",
        "the loss is unstable at a usual learning rate",
    ),
    StartingValue(
        "batch size x accumulation",
        "8 to 16 rows a step",
        "the loss is noisy or unstable",
        "memory runs out (halve the batch, double the accumulation)",
    ),
    StartingValue(
        "warmup_steps",
        "5 % of all steps",
        "the loss jumps in the first steps",
        "a short run spends most of its steps warming up",
    ),
    StartingValue(
        "max_seq_length",
        "2048",
        "many rows are cut off",
        "memory runs out, and few rows are that long",
    ),
)


class HyperparameterTable:
    """A table that a notebook shows as HTML, GitHub as Markdown and `print` as text."""

    head = ("setting", "start with", "raise it when", "lower it when")

    def __init__(self, values: Sequence[StartingValue] = STARTING_VALUES) -> None:
        self.values = tuple(values)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The cells, without the head."""
        return [(v.name, v.start, v.raise_when, v.lower_when) for v in self.values]

    def _repr_html_(self) -> str:
        def cells(tag: str, row: Sequence[str]) -> str:
            # the first cell of a row is its head, so that a screen reader names the setting
            first = f'<th scope="row" style="text-align:left">{html.escape(row[0])}</th>'
            style = ' scope="col" style="text-align:left"' if tag == "th" else ""
            others = row if tag == "th" else row[1:]
            if tag == "td":
                style = ' style="text-align:left"'
            body = "".join(f"<{tag}{style}>{html.escape(text)}</{tag}>" for text in others)
            return f"<tr>{'' if tag == 'th' else first}{body}</tr>"

        head, body = cells("th", self.head), "".join(cells("td", row) for row in self.rows())
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"

    def _repr_markdown_(self) -> str:
        lines = [self.head, ("---",) * 4, *self.rows()]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
        )

    def __str__(self) -> str:
        import textwrap

        lines = []
        table = [self.head, *self.rows()]
        widths = [min(_TEXT_COLUMNS, max(map(len, column))) for column in zip(*table, strict=True)]
        for number, row in enumerate(table):
            cells = [textwrap.wrap(text, width) for text, width in zip(row, widths, strict=True)]
            for index in range(max(map(len, cells))):
                parts = [cell[index] if index < len(cell) else "" for cell in cells]
                padded = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
                lines.append("  ".join(padded).rstrip())
            if number == 0:
                lines.append("  ".join("-" * width for width in widths))
        return "\n".join(lines)

    __repr__ = __str__


def hyperparameter_table() -> HyperparameterTable:
    """The starting values as a table; the last line of a notebook cell shows it.

    Returns:
        An object with `_repr_html_`, `_repr_markdown_` and `__str__`.
    """
    return HyperparameterTable()
