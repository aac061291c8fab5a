"""Make conversations of a table: a prompt merged from columns, and an answer from another column.

Several rows can be joined into one conversation of as many turns, so that a model tuned on single
questions also learns to go on. The rows are laid out in one drawn ring, and conversation i is row i
with the rows behind it in the ring. So no row is joined to itself, each is met equally often in
every place of a conversation, and row i stays where it was.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from colab_qlora.data.merge_template import cell_text, read_template
from colab_qlora.data.messages import CONVERSATION_FIELDS
from colab_qlora.data.records import Records, where
from colab_qlora.data.row_sources import column_names, is_dataset, require_rows
from colab_qlora.data.wording import counted, first_few, kind_of, shown
from colab_qlora.errors import UserError

_Turns = list[dict[str, str]]


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """Merge columns into ShareGPT conversations of {"from", "value"}.

    Args:
        dataset: rows as a list, `Records` or a `datasets.Dataset`.
        merged_prompt: the prompt with {column} for cells and [[ ]] around a part that goes where a
            cell in it is blank; "" takes the column `merged_column_name` as it is.
        merged_column_name: the column that holds the prompt; with a template, the one to write it
            into where columns are kept.
        output_column_name: the column of the answers.
        remove_unused_columns: keep "conversations" only.
        conversation_extension: rows joined into one conversation, from 1 to the number of rows.
        random_state: seed of the order in which rows are joined.

    Returns:
        The same kind of rows, as many, with "conversations"; pass it to `standardize_sharegpt`.

    Raises:
        UserError: no row, rows that have conversations already, a column that is not there, a
            template that cannot be read, a blank prompt or answer, or an extension out of range.

    Example:
        >>> rows = [{"q": "Add 1 and 2.", "hint": "", "a": 3}]
        >>> to_sharegpt(rows, "{q}[[ Hint: {hint}]]", output_column_name="a")[0]["conversations"]
        [{'from': 'human', 'value': 'Add 1 and 2.'}, {'from': 'gpt', 'value': '3'}]
    """
    require_rows(dataset)
    columns = column_names(dataset)
    _check_columns(columns, merged_prompt, merged_column_name, output_column_name)
    _check_extension(conversation_extension, len(dataset))
    turns = _single_turns(
        dataset, merged_prompt or f"{{{merged_column_name}}}", output_column_name, columns
    )
    conversations = _joined(turns, conversation_extension, random_state)
    new_columns: dict[str, list[Any]] = {"conversations": conversations}
    if merged_prompt and not remove_unused_columns:
        new_columns[merged_column_name] = [turn[0]["value"] for turn in turns]
    if is_dataset(dataset):
        return _as_dataset(dataset, new_columns, remove_unused_columns)
    rows = [
        {**({} if remove_unused_columns else row), **dict(zip(new_columns, cells, strict=True))}
        for row, *cells in zip(dataset, *new_columns.values(), strict=True)
    ]
    return replace(dataset, rows=tuple(rows)) if isinstance(dataset, Records) else rows


def _check_columns(
    columns: list[str], merged_prompt: str, merged_column_name: str, output_column_name: str
) -> None:
    chats = [name for name in CONVERSATION_FIELDS if name in columns]
    if chats:
        raise UserError(
            "the rows have conversations already",
            got=f"the field {chats[0]!r}",
            allowed="rows of columns to merge",
            do="Call standardize_sharegpt(dataset) instead",
        )
    wanted = {"output_column_name": output_column_name}
    if not merged_prompt:
        wanted["merged_column_name"] = merged_column_name
    for argument, name in wanted.items():
        if name not in columns:
            raise UserError(
                f"{argument} names a column that is not there",
                got=shown(name),
                allowed=first_few([shown(column) for column in columns], 12, ", ") or "no column",
                do=f"Pass {argument} with one of these names"
                + ("" if argument == "output_column_name" else ", or a template as merged_prompt"),
            )


def _check_extension(conversation_extension: object, rows: int) -> None:
    is_integer = isinstance(conversation_extension, int) and conversation_extension is not True
    if not is_integer or not 1 <= conversation_extension <= rows:  # type: ignore[operator]
        raise UserError(
            "conversation_extension is out of range",
            got=shown(conversation_extension),
            allowed=f"an integer from 1 to {rows:,}, the number of rows",
            do="Pass conversation_extension=1 to keep rows apart",
        )


def _single_turns(
    dataset: Any, merged_prompt: str, output_column_name: str, columns: list[str]
) -> list[_Turns]:
    """One question and answer a row."""
    template = read_template(merged_prompt, columns)
    rows = dataset
    if is_dataset(dataset):
        # only the columns that are read, as others may be large or costly to decode
        needed = list(dict.fromkeys([*template.columns, output_column_name]))
        rows = dataset.select_columns(needed).with_format(None)
    turns, faults, faulty_rows = [], [], 0
    for index, row in enumerate(rows):
        if isinstance(row, Mapping):
            prompt, found = template.fill(row)
            answer = cell_text(row.get(output_column_name))
            if not answer:
                kind = "blank" if answer == "" else kind_of(row[output_column_name])
                found.append(f"the answer in {output_column_name!r} is {kind}, not text")
            if not found and not prompt.strip():
                found.append("the merged prompt is blank")
        else:
            prompt, answer, found = "", "", [f"{kind_of(row)}, not an object"]
        turns.append([{"from": "human", "value": prompt}, {"from": "gpt", "value": answer or ""}])
        faults += [f"{where(dataset, index)}: {fault}" for fault in found]
        faulty_rows += bool(found)
    if faults:
        raise UserError(
            f"{faulty_rows:,} of {counted(len(dataset), 'row')} cannot be merged",
            got=first_few(faults),
            allowed="text or a number in each cell; blank only inside [[ ]]",
            do="Put what may be blank into [[ ]], and mend or delete the rows named here",
        )
    return turns


def _joined(turns: list[_Turns], extension: int, random_state: int) -> list[_Turns]:
    if extension == 1:
        return turns
    ring = list(range(len(turns)))
    random.Random(random_state).shuffle(ring)
    place = {row: position for position, row in enumerate(ring)}
    return [
        [
            message
            for step in range(extension)
            for message in turns[ring[(place[row] + step) % len(ring)]]
        ]
        for row in range(len(turns))
    ]


def _as_dataset(dataset: Any, new_columns: dict[str, list[Any]], remove_unused: bool) -> Any:
    from datasets import Dataset, Features, Value, concatenate_datasets

    text = Value("string")
    kinds: dict[str, Any] = {name: text for name in new_columns}
    kinds["conversations"] = [{"from": text, "value": text}]
    made = Dataset.from_dict(new_columns, features=Features(kinds), split=dataset.split)
    kept = [] if remove_unused else [n for n in dataset.column_names if n not in new_columns]
    if not kept:
        return made
    old = dataset.with_format(None).select_columns(kept)
    return concatenate_datasets([old, made], split=dataset.split, axis=1)
