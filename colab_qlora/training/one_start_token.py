"""Rows whose texts begin with the start token that the tokenizer adds: tokenised with one of them.

TRL tokenises such a text as it is. Rows that it finds tokenised it only cuts or packs, so the kit
tokenises the whole dataset here where any of its rows would get two start tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from colab_qlora.data.encode import encode
from colab_qlora.data.start_tokens import adds_start

_Formatting = Callable[[dict[str, Any]], Any] | None


def with_one_start(rows: Any, tokenizer: Any, args: Any) -> tuple[Any, str | None]:
    """Tokenise rows that would have two start tokens; leave all others to TRL.

    Args:
        rows: a datasets.Dataset, or several by name; other kinds stay as they are.
        tokenizer: the tokenizer.
        args: the SFTConfig, for dataset_text_field, dataset_num_proc and dataset_kwargs.

    Returns:
        The rows, tokenised where it was necessary, and one line to say then.
    """
    if isinstance(rows, Mapping):
        pairs = {name: with_one_start(each, tokenizer, args) for name, each in rows.items()}
        notes = [note for _, note in pairs.values() if note]
        return {name: each for name, (each, _) in pairs.items()}, notes[0] if notes else None
    if not isinstance(rows, Dataset) or "input_ids" in rows.column_names or args.dataset_kwargs:
        return rows, None
    field = _text_column(rows, args.dataset_text_field)
    if field is None or not adds_start(tokenizer):
        return rows, None
    own = sum(1 for text in rows[field] if _begins(text, tokenizer))
    if not own:
        return rows, None

    def tokenised(row: dict[str, Any]) -> dict[str, list[int]]:
        if field != "prompt":
            return {"input_ids": encode({"text": row[field]}, tokenizer)[0]}
        ids, labels_begin = encode(row, tokenizer)
        mask = [0] * labels_begin + [1] * (len(ids) - labels_begin)
        return {"input_ids": ids, "completion_mask": mask}

    made = rows.map(tokenised, num_proc=args.dataset_num_proc, desc="Tokenising")
    start = tokenizer.bos_token
    return made, (
        f"{own} of {len(rows)} texts begin with {start} themselves; the tokenizer's own {start} "
        "is left out there"
    )


def one_start_text(formatting: _Formatting, tokenizer: Any) -> _Formatting:
    """A formatting_func whose texts leave the start token to the tokenizer."""
    if formatting is None or tokenizer is None or not adds_start(tokenizer):
        return formatting

    def formatted(row: dict[str, Any]) -> Any:
        text = formatting(row)
        return text.removeprefix(tokenizer.bos_token) if isinstance(text, str) else text

    return formatted


def _begins(text: Any, tokenizer: Any) -> bool:
    return isinstance(text, str) and text.startswith(tokenizer.bos_token)


def _text_column(rows: Dataset, text_field: str) -> str | None:
    """The column whose texts TRL tokenises first in a row; None for messages."""
    columns = set(rows.column_names)
    if "messages" in columns:
        return None
    field = "prompt" if {"prompt", "completion"} <= columns else text_field
    if field not in columns or not len(rows) or not isinstance(rows[0][field], str):
        return None
    return field
