"""Say which of the common layouts a data set has.

    alpaca             "instruction", "output" and, sometimes, "input", all text
    sharegpt           "conversations" (or "messages") of {"from", "value"}
    messages           "messages" (or "conversations") of {"role", "content"}
    prompt_completion  "prompt" and "completion", both text or both lists of messages
    text               "text" alone

A row that has the fields of several is of the first of conversations, prompt and completion,
Alpaca, text: the later ones are then derived from it, as "text" is in many Alpaca downloads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colab_qlora.data.messages import CONVERSATION_FIELDS, message_layout
from colab_qlora.data.records import Records, where
from colab_qlora.data.row_sources import column_names, is_dataset, require_rows
from colab_qlora.data.wording import counted, first_few, kind_of, shown
from colab_qlora.errors import UserError

_TITLES = {
    "alpaca": "Alpaca instructions",
    "sharegpt": "ShareGPT conversations",
    "messages": "OpenAI messages",
    "prompt_completion": "prompts and completions",
    "text": "plain text",
}
_ALLOWED = (
    "'instruction' and 'output'; 'conversations' or 'messages'; "
    "'prompt' and 'completion'; or 'text'"
)


@dataclass(frozen=True)
class DataFormat:
    """The layout of a data set; print it for one sentence.

    Args:
        name: "alpaca", "sharegpt", "messages", "prompt_completion" or "text".
        fields: the fields that make up the layout.
        other_fields: the fields beside them, which training does not see.
        rows: number of rows.
        has_messages: whether the turns are lists of messages instead of texts.
        source: where the rows are from, for the sentence.
    """

    name: str
    fields: tuple[str, ...]
    other_fields: tuple[str, ...] = ()
    rows: int = 0
    has_messages: bool = False
    source: str = "The data set"

    def __str__(self) -> str:
        layout = _layout_words(self.name, self.fields, self.has_messages)
        beside = first_few([shown(name) for name in self.other_fields], separator=", ")
        tail = f"; not part of it: {beside}" if beside else ""
        return f"{self.source} has {counted(self.rows, 'row')} of {layout}{tail}."


# name, fields, has_messages
_Layout = tuple[str, tuple[str, ...], bool]


def detect_format(rows: Any) -> DataFormat:
    """Name the layout that every row has.

    Args:
        rows: a list of objects, `Records` or a `datasets.Dataset`.

    Returns:
        The layout; `print(detect_format(rows))` says it in one sentence.

    Raises:
        UserError: there is no row, a row has no known layout, or rows have different ones. Rows are
            named by file and line where `rows` knows them.

    Example:
        >>> print(detect_format([{"instruction": "Add 1 and 2.", "output": "3"}]))
        The data set has 1 row of Alpaca instructions in 'instruction' and 'output'.
    """
    require_rows(rows)
    first_index: dict[_Layout, int] = {}
    counts: dict[_Layout, int] = {}
    faults = []
    for index, row in enumerate(rows.with_format(None) if is_dataset(rows) else rows):
        layout = _layout_of(row)
        if isinstance(layout, str):
            faults.append(f"{where(rows, index)} {layout}")
            continue
        first_index.setdefault(layout, index)
        counts[layout] = counts.get(layout, 0) + 1
    if faults:
        raise _unknown(faults, len(rows))
    if len(counts) > 1:
        raise _mixed([(key, counts[key], where(rows, i)) for key, i in first_index.items()])
    name, fields, has_messages = next(iter(counts))
    names = column_names(rows)
    if name == "alpaca" and "input" in names:
        fields = ("instruction", "input", "output")
    return DataFormat(
        name,
        fields,
        tuple(other for other in names if other not in fields),
        len(rows),
        has_messages,
        rows.source if isinstance(rows, Records) else "The data set",
    )


def _layout_of(row: object) -> _Layout | str:
    """The layout of one row, or what the row is instead, as "has 'question', 'answer'"."""
    if not isinstance(row, Mapping):
        return f"is {kind_of(row)}, not an object"
    # a table gives every row the fields of all, with None where there was none
    filled = {name: value for name, value in row.items() if value is not None}
    chats = [name for name in CONVERSATION_FIELDS if name in filled]
    if len(chats) > 1:
        return "has both 'conversations' and 'messages'"
    if chats:
        return _chat_layout(chats[0], filled[chats[0]])
    if "prompt" in filled and "completion" in filled:
        return _prompt_layout(filled["prompt"], filled["completion"])
    for name, fields in (("alpaca", ("instruction", "output")), ("text", ("text",))):
        if all(field in filled for field in fields):
            wrong = [f for f in fields if not isinstance(filled[f], str)]
            if wrong:
                return f"has {wrong[0]!r} as {kind_of(filled[wrong[0]])}, not text"
            return name, fields, False
    return f"has {first_few([shown(name) for name in filled], 4, ', ') or 'no filled field'}"


def _chat_layout(field: str, messages: object) -> _Layout | str:
    if not isinstance(messages, list):
        return f"has {field!r} as {kind_of(messages)}, not a list of messages"
    if not messages:
        return f"has {field!r} without a message"
    pairs = [message_layout(message) for message in messages]
    for index, pair in enumerate(pairs):
        if pair is None:
            return f"has '{field}[{index}]' without 'role' and 'content' or 'from' and 'value'"
        if pair != pairs[0]:
            return f"has {field!r} of two layouts of message"
    return ("sharegpt" if pairs[0] == ("from", "value") else "messages"), (field,), True


def _prompt_layout(prompt: object, completion: object) -> _Layout | str:
    fields = ("prompt", "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return "prompt_completion", fields, False
    if not isinstance(prompt, list) or not isinstance(completion, list):
        return f"has 'prompt' as {kind_of(prompt)} and 'completion' as {kind_of(completion)}"
    for field, messages in zip(fields, (prompt, completion), strict=True):
        layout = _chat_layout(field, messages)
        if isinstance(layout, str):
            return layout
        if layout[0] != "messages":
            return f"has {field!r} of 'from' and 'value', not of 'role' and 'content'"
    return "prompt_completion", fields, True


def _layout_words(name: str, fields: tuple[str, ...], has_messages: bool) -> str:
    quoted = [repr(field) for field in fields]
    listed = ", ".join(quoted[:-1]) + (" and " if quoted[1:] else "") + quoted[-1]
    keys = {"sharegpt": " of 'from' and 'value'", "messages": " of 'role' and 'content'"}
    if name == "prompt_completion":
        keys[name] = " as lists of messages" if has_messages else " as text"
    return f"{_TITLES[name]} in {listed}{keys.get(name, '')}"


def _unknown(faults: list[str], rows: int) -> UserError:
    return UserError(
        f"{len(faults):,} of {counted(rows, 'row')} "
        f"{'is' if len(faults) == 1 else 'are'} in no known layout",
        got=first_few(faults),
        allowed=_ALLOWED,
        do="Rename the columns, or join them with "
        "to_sharegpt(rows, merged_prompt='{question}', output_column_name='answer')",
    )


def _mixed(found: list[tuple[_Layout, int, str]]) -> UserError:
    return UserError(
        f"the rows are in {len(found)} different layouts",
        got=first_few(
            [
                f"{counted(count, 'row')} of {_layout_words(*layout)}, the first at {place}"
                for layout, count, place in found
            ]
        ),
        allowed="one layout for all rows",
        do="Put each layout into a file of its own, and convert them one by one",
    )
