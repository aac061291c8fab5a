"""One look at a data set before training: layout, lengths, labels, cuts, repeats, scripts.

Every row is tokenised as in training; nothing is changed or dropped.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from colab_qlora.data.alpaca import format_alpaca, format_chat
from colab_qlora.data.audit import LengthReport, length_report, lengths_and_starts
from colab_qlora.data.conversations import standardize_data_formats
from colab_qlora.data.duplicates import DuplicateReport, drop_duplicates
from colab_qlora.data.encode import check_max_seq_length
from colab_qlora.data.formats import DataFormat, detect_format
from colab_qlora.data.split import find_overlap
from colab_qlora.data.wording import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# of all letters of a data set, the scripts below this share are told together
LEAST_SHARE = 0.005
# letters that are looked at for their script: enough for a tenth of a percent
_MOST_LETTERS = 1_000_000
_OTHER = "other"


@dataclass(frozen=True)
class DataReport:
    """What is in a data set; print it for sentences, or show it for the picture.

    Args:
        layout: how the rows are laid out.
        lengths: in tokens, with labels and truncation.
        duplicates: rows that read the same.
        overlap: (row, eval row) that read the same; None without eval rows.
        scripts: (name, share of all letters), largest first: "Latin", "Cyrillic", "CJK", ...
        row_tokens: tokens of each row, before truncation.
        row_labels: tokens of each row that carry a label, before truncation.
    """

    layout: DataFormat
    lengths: LengthReport
    duplicates: DuplicateReport
    overlap: tuple[tuple[int, int], ...] | None
    scripts: tuple[tuple[str, float], ...]
    row_tokens: tuple[int, ...] = field(repr=False)
    row_labels: tuple[int, ...] = field(repr=False)

    def __str__(self) -> str:
        return "\n".join(self.sentences())

    def sentences(self) -> list[str]:
        """What there is to say, a sentence or two each."""
        found = [str(self.layout), str(self.lengths), str(self.duplicates)]
        if self.overlap is not None:
            count = len({row for row, _ in self.overlap})
            found.append(
                f"{counted(count, 'row')} {'is' if count == 1 else 'are'} among the eval rows "
                "too: take them out, or the eval loss says nothing."
                if count
                else "No row is among the eval rows."
            )
        if self.scripts:
            words = ", ".join(f"{name} {share:.1%}" for name, share in self.scripts)
            found.append(f"Letters: {words}.")
        return found

    def draw(self) -> Figure:
        """The lengths, the tokens by what becomes of them, and the scripts, 800 px wide."""
        from colab_qlora.teaching.data_picture import draw_data

        return draw_data(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from colab_qlora.curves.draw import figure_bundle

        return figure_bundle(self.draw(), str(self))


def data_report(
    rows: Any,
    tokenizer: Any,
    max_seq_length: int,
    *,
    eval_rows: Any = None,
    style: str | None = None,
) -> DataReport:
    """Report what a data set is made of.

    Args:
        rows: what `read_records` gave, a list of objects, or a `datasets.Dataset`, in any layout
            that `detect_format` knows.
        tokenizer: a Hugging Face tokenizer.
        max_seq_length: tokens that training keeps of each row.
        eval_rows: rows to evaluate on, which should not be among the others.
        style: of Alpaca rows, "chat" or "alpaca" (text under headings); None: "chat" where the
            tokenizer has a chat template.

    Raises:
        UserError: the rows have no known layout, a row cannot be laid out, or `max_seq_length` is
            not an integer from 1 up.
    """
    check_max_seq_length(max_seq_length)
    layout = detect_format(rows)
    examples = examples_of(rows, layout, tokenizer, style)
    pairs = lengths_and_starts(examples, tokenizer)
    return DataReport(
        layout=layout,
        lengths=length_report(pairs, max_seq_length),
        duplicates=drop_duplicates(rows)[1],
        overlap=None if eval_rows is None else tuple(find_overlap(rows, eval_rows)),
        scripts=script_shares(examples),
        row_tokens=tuple(length for length, _ in pairs),
        row_labels=tuple(length - start for length, start in pairs),
    )


def examples_of(
    rows: Any, layout: DataFormat, tokenizer: Any, style: str | None = None
) -> list[Mapping[str, Any]]:
    """The rows as examples that `encode` takes."""
    if layout.name == "alpaca":
        if style is None:
            style = "chat" if getattr(tokenizer, "chat_template", None) else "alpaca"
        found = format_chat(rows) if style == "chat" else format_alpaca(rows, tokenizer.eos_token)
        return list(found)
    if layout.name in ("sharegpt", "messages"):
        (column,) = layout.fields
        turns = standardize_data_formats(rows)
        names = turns[0].keys()
        column = column if column in names else next(n for n in names if "conversation" in n)
        return [{"messages": list(row[column])} for row in turns]
    return [{name: row[name] for name in layout.fields} for row in rows]


def script_shares(examples: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, float], ...]:
    """(script, share of the letters) by the first word of each letter's Unicode name.

    A script is no language, but tells a mix of English and Chinese, or a row in another alphabet.
    """
    counts: Counter[str] = Counter()
    seen = 0
    for example in examples:
        for text in _texts(example):
            counts.update(letter for letter in text if letter.isalpha())
        seen = sum(counts.values())
        if seen >= _MOST_LETTERS:
            break
    scripts: Counter[str] = Counter()
    for letter, count in counts.items():
        scripts[_script(letter)] += count
    large = {name: count for name, count in scripts.items() if count >= LEAST_SHARE * seen}
    rest = seen - sum(large.values())
    if rest >= 0.0005 * max(seen, 1):  # less would be told as 0.0 %
        large[_OTHER] = large.get(_OTHER, 0) + rest
    ordered = sorted(large.items(), key=lambda entry: (entry[0] == _OTHER, -entry[1]))
    return tuple((name, count / seen) for name, count in ordered)


def _script(letter: str) -> str:
    word = unicodedata.name(letter, _OTHER).split(" ")[0].split("-")[0]
    return word if word in ("CJK", _OTHER) else word.capitalize()


def _texts(value: Any) -> list[str]:
    """All texts in an example; of messages, their contents."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        parts = [part for name, part in value.items() if name not in ("role", "from")]
        return [text for part in parts for text in _texts(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    return []
