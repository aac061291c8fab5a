"""Messages that are given to the trainer as they are: what of them would be dropped or misread.

TRL hands them to the tokenizer's chat template. Few templates have a place for tools, none of a
model for text for images, and most lay out whatever they do not know as nothing at all. So a row
with either is refused, as `standardize_sharegpt` refuses it. Names and order of the roles are the
template's to judge: some take what others refuse, and a refusal is told with its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from colab_qlora.data.conversations import refuse
from colab_qlora.data.messages import MESSAGE_LAYOUTS, Fault, content_faults, joined_parts
from colab_qlora.data.records import where
from colab_qlora.data.row_sources import column_names
from colab_qlora.data.wording import first_few
from colab_qlora.errors import UserError

_IMAGE_COLUMNS = ("image", "images")
_TOOLS = "tools"
# of rows without tools, where TRL reads a text as JSON
_NO_TOOLS = ("[]", "{}", "null")


def checked_messages(
    rows: Any, kind: str, tokenizer: Any, text_field: str, *, is_laid_out: bool
) -> Any:
    """Rows whose messages have one text each.

    Args:
        rows: a datasets.Dataset, a list of dicts, or for "eval" several of these by name; other
            kinds, such as streams, are left to whoever reads them next.
        kind: "train" or "eval", for messages.
        tokenizer: a processor's rows are left to TRL, too, since they may have images.
        text_field: the column that holds texts, if there is one.
        is_laid_out: whether TRL will lay the messages out; columns of images it refuses anyway.

    Returns:
        The rows; where messages hold text in parts, with these joined, as templates that know one
        text alone would write the list itself.

    Raises:
        UserError: images, tools, or messages without text; the message names rows and fields.
    """
    if isinstance(rows, dict):
        # several sets to train on are refused by their own name, and so not read before
        if kind != "eval":
            return rows
        return {
            name: checked_messages(each, kind, tokenizer, text_field, is_laid_out=is_laid_out)
            for name, each in rows.items()
        }
    is_list = isinstance(rows, Sequence) and all(isinstance(row, dict) for row in rows)
    if not (is_list or isinstance(rows, Dataset)) or hasattr(tokenizer, "image_processor"):
        return rows
    names = column_names(rows) if len(rows) else ()
    _refuse_images(rows, kind, [name for name in _IMAGE_COLUMNS if name in names])
    fields = _message_fields(names, text_field)
    if not is_laid_out or not fields:
        return rows
    faults, has_parts = [], False
    for index, row in enumerate(_cells(rows, [*fields, _TOOLS])):
        faults += [(index, fault) for fault in _row_faults(row, fields)]
        has_parts = has_parts or any(_has_parts(row.get(field)) for field in fields)
    refuse(rows, faults, f"{kind} row")
    return _with_joined_parts(rows, fields) if has_parts else rows


def _message_fields(names: Sequence[str], text_field: str) -> list[str]:
    """The fields that messages are read from, if any are.

    TRL reads a prompt before messages, and messages before a text; a text goes before what the kit
    reads itself, conversations.
    """
    if "input_ids" in names:
        return []
    if "prompt" in names:
        return [field for field in ("prompt", "completion") if field in names]
    if "messages" in names:
        return ["messages"]
    return ["conversations"] if "conversations" in names and text_field not in names else []


def _cells(rows: Any, fields: list[str]) -> Iterator[Mapping[str, Any]]:
    """The rows with the fields alone, so that nothing else is decoded."""
    if isinstance(rows, Dataset):
        fields = [field for field in fields if field in rows.column_names]
        return iter(rows.with_format(None).select_columns(fields))
    return iter(rows)


def _row_faults(row: Mapping[str, Any], fields: list[str]) -> list[Fault]:
    found = [fault for field in fields for fault in content_faults(row.get(field), field)]
    tools = row.get(_TOOLS)
    is_chat = any(isinstance(row.get(field), list) for field in fields)
    if is_chat and tools and tools not in _NO_TOOLS:
        found.append(Fault("tools", f"{_TOOLS!r} describes tools"))
    return found


def _has_parts(messages: Any) -> bool:
    return isinstance(messages, list) and any(
        isinstance(message, Mapping) and isinstance(message.get(name), list)
        for message in messages
        for _, name in MESSAGE_LAYOUTS
    )


def _with_joined_parts(rows: Any, fields: list[str]) -> Any:
    def joined(row: Mapping[str, Any]) -> dict[str, Any]:
        return {field: joined_parts(row[field]) for field in fields if field in row}

    if isinstance(rows, Dataset):
        return rows.map(joined, desc="Joining parts of text")
    return [{**row, **joined(row)} for row in rows]


def _refuse_images(rows: Any, kind: str, columns: list[str]) -> None:
    for column in columns:
        filled = [i for i, is_filled in enumerate(_filled(rows, column)) if is_filled]
        raise UserError(
            f"the {kind} rows have images in {column!r}, and this model reads text alone",
            got=first_few([where(rows, index) for index in filled], separator=", ") or "no image",
            allowed="rows of text",
            do=f"Delete the rows that need their images, then the field {column!r} of all",
        )


def _filled(rows: Any, column: str) -> Iterator[bool]:
    """Of each row, whether it has an image; nothing is decoded."""
    if not isinstance(rows, Dataset):
        yield from (bool(row.get(column)) for row in rows)
        return
    for batch in rows.select_columns([column]).with_format("arrow").iter(1000):
        for cell in batch[column]:
            yield cell.is_valid and bool(len(cell) if hasattr(cell, "__len__") else True)
