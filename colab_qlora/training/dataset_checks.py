"""Look at the rows before the first step: are there any, have they labels, are they cut?

Conversations under their usual name become messages, which is what TRL reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from colab_qlora.data.audit import audit_lengths, check_labels
from colab_qlora.data.conversations import standardize_sharegpt
from colab_qlora.errors import UserError

# columns that hold text to be tokenised; a dataset with none of them is TRL's to judge
_TEXT_COLUMNS = ("prompt", "completion", "messages")


def as_dataset(rows: Any, name: str) -> Any:
    """A datasets object from what the user passed; lists of dicts are taken too.

    Raises:
        UserError: nothing was passed, it has no rows, or it is of another type.
    """
    if isinstance(rows, Sequence) and rows and all(isinstance(row, dict) for row in rows):
        return Dataset.from_list(list(rows))
    if isinstance(rows, dict) and rows and name == "eval_dataset":
        return {key: as_dataset(value, name) for key, value in rows.items()}
    if isinstance(rows, IterableDataset):
        return rows
    if isinstance(rows, Dataset):
        if len(rows):
            return rows
        raise UserError(f"{name} has no rows", got="0 rows", allowed="1 or more")
    raise UserError(
        f"{name} is not a dataset",
        got=type(rows).__name__,
        allowed="a datasets.Dataset with rows, or a list of dicts",
        do="Load one: datasets.load_dataset('json', data_files=..., split='train')",
    )


def with_messages(dataset: Any, name: str, text_field: str) -> tuple[Any, str | None]:
    """Rows whose only text is in a column `conversations`, with it in `messages`, as TRL reads it.

    Args:
        dataset: a datasets.Dataset, or several by name; other kinds are left to TRL.
        name: "train" or "eval", for the note.
        text_field: the column that holds texts, if there is one.

    Returns:
        The rows, and one line about it if they were changed.

    Raises:
        UserError: a conversation that cannot be read; the message names the row.
    """
    if isinstance(dataset, dict):
        found = {key: with_messages(rows, name, text_field) for key, rows in dataset.items()}
        notes = [note for _, note in found.values() if note]
        return {key: rows for key, (rows, _) in found.items()}, next(iter(notes), None)
    others = {text_field, "input_ids", *_TEXT_COLUMNS}
    if not isinstance(dataset, Dataset) or "conversations" not in dataset.column_names:
        return dataset, None
    if others & set(dataset.column_names):
        return dataset, None
    renamed = standardize_sharegpt(dataset).rename_column("conversations", "messages")
    return renamed, f"the {name} rows' conversations are trained on as messages"


def data_hash(dataset: Dataset, rows: int = 1000) -> str:
    """Short hash of the first `rows` rows, to tell whether a resumed run has the same data."""
    head = dataset.select(range(min(rows, len(dataset)))).to_list()
    return hashlib.sha256(json.dumps(head, default=str).encode()).hexdigest()[:12]


def check_dataset(
    dataset: Any, name: str, tokenizer: Any, args: Any, formatting: Callable[[dict], str] | None
) -> str | None:
    """Refuse rows without labels; report rows that are longer than max_length.

    Args:
        dataset: a datasets.Dataset; other kinds are left to TRL.
        name: "train" or "eval", for messages.
        tokenizer: the tokenizer, or None (then nothing is checked).
        args: the SFTConfig, for max_length, dataset_text_field, packing and completion_only_loss.
        formatting: the trainer's formatting_func, or None.

    Returns:
        One line if rows will be cut, else None.

    Raises:
        UserError: a column is missing, or rows have no label left after truncation.
    """
    if not isinstance(dataset, Dataset) or tokenizer is None or args.max_length is None:
        return None
    # the other strategies of packing split what is too long
    splits = args.packing and args.packing_strategy != "bfd"
    if splits or args.dataset_kwargs or "input_ids" in dataset.column_names:
        return None
    examples = _examples(dataset, name, args.dataset_text_field, formatting)
    if examples is None:
        return None
    report = audit_lengths(examples, tokenizer, args.max_length)
    check_labels(report)
    if not report.rows_truncated:
        return None
    return (
        f"{report.rows_truncated} of {report.rows} {name} rows ({report.share_truncated:.0%}) "
        f"are longer than {args.max_length} tokens and lose their end "
        f"(the longest has {report.tokens_max})"
    )


def _examples(
    dataset: Any, name: str, text_field: str, formatting: Callable[[dict], str] | None
) -> list[dict[str, Any]] | None:
    columns = dataset.column_names
    if formatting is not None:
        first = formatting(dataset[0])
        return [{"text": formatting(row)} for row in dataset] if isinstance(first, str) else None
    if text_field in columns:
        return [{"text": text} for text in dataset[text_field]]
    found = [column for column in _TEXT_COLUMNS if column in columns]
    if "messages" in found or {"prompt", "completion"} <= set(found):
        return dataset.select_columns(found).to_list()
    raise UserError(
        f"the {name} dataset has no column to train on",
        got=", ".join(columns),
        allowed=f"{text_field!r}, 'messages', or 'prompt' and 'completion'",
        do="Format the rows first, or name the column with dataset_text_field",
    )
