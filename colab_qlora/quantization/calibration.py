"""The user's own rows as a few micro-batches, to measure by what a weight's error does.

No other data are needed, and none would be better: what counts is the error on what the model is
trained on. A few thousand tokens are enough, since each weight's price is a sum over all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from colab_qlora.data.encode import encode
from colab_qlora.errors import UserError

ROWS = 16
# short rows, or those whose labels are cut off, are made up for by others; no more than these
MOST_ROWS = 512
# where memory is short every micro-batch reads and rounds all 16-bit weights, so there are two;
# 2,048 tokens of an 8B leave 2.6 GB of logits, which a T4 has room for beside the model
ROWS_A_BATCH = 8
MOST_TOKENS_A_ROW = 256
LEAST_TOKENS = 256
IGNORED = -100
ALLOWED = (
    'a list of texts, of rows with "text", "messages" or "prompt" and "completion", of Alpaca rows '
    "(instruction, output), a Dataset of such rows, or the path of a .json or .jsonl file"
)

Batch = dict[str, torch.Tensor]
# token ids of a row, and its labels, as long
Encoded = tuple[list[int], list[int]]


def calibration_batches(
    data: Any, tokenizer: Any, max_seq_length: int, device: torch.device | str = "cpu"
) -> list[Batch]:
    """The first rows of the data as padded micro-batches with labels.

    Args:
        data: see `ALLOWED`. The first 16 rows with labels are taken, more if they are short.
        tokenizer: of the model.
        max_seq_length: tokens of a row, at most; no more than 256 are taken.
        device: where the tensors go.

    Returns:
        Keyword arguments of the model's forward: input_ids, attention_mask and labels, each
        (rows, tokens), int64; labels are -100 on prompts and on padding.

    Raises:
        UserError: data of another kind, unreadable rows, or fewer than 256 tokens.
    """
    rows = _labelled_rows(data, tokenizer, min(max_seq_length, MOST_TOKENS_A_ROW))
    return _in_batches(rows, tokenizer, device)


def labelled_batches(
    rows: Iterable[Any],
    tokenizer: Any,
    max_seq_length: int,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """All rows that have a label, as `calibration_batches` gives the first few."""
    found = [_encoded(row, tokenizer, max_seq_length) for row in rows]
    return _in_batches([row for row in found if _has_labels(row)], tokenizer, device)


def _in_batches(rows: list[Encoded], tokenizer: Any, device: torch.device | str) -> list[Batch]:
    # like lengths together: less padding
    rows = sorted(rows, key=lambda row: len(row[0]))
    parts = [rows[i : i + ROWS_A_BATCH] for i in range(0, len(rows), ROWS_A_BATCH)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return [_padded(part, pad, device) for part in parts]


def _labelled_rows(data: Any, tokenizer: Any, length: int) -> list[Encoded]:
    """The first rows that hold labels: 16, and as many more as short rows need."""
    rows: list[Encoded] = []
    tokens, read = 0, 0
    for row in _rows(data):
        read += 1
        encoded = _encoded(row, tokenizer, length)
        if _has_labels(encoded):
            rows.append(encoded)
            tokens += len(encoded[0])
        if len(rows) >= ROWS and tokens >= LEAST_TOKENS:
            break
    if tokens < LEAST_TOKENS:
        raise UserError(
            "the calibration data are too short",
            got=f"{tokens} tokens in {len(rows)} rows with labels, of {read} rows",
            allowed=f"{LEAST_TOKENS} tokens or more",
            do="Pass more or longer rows, or a larger max_seq_length if labels are cut off",
        )
    return rows


def _rows(data: Any) -> list[Any]:
    if isinstance(data, str | Path):
        from colab_qlora.data.records import read_records

        return list(read_records(data)[:MOST_ROWS])
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise UserError(
            "calibration_data is not understood", got=type(data).__name__, allowed=ALLOWED
        )
    found = list(itertools.islice(data, MOST_ROWS))  # there may be no end
    if not found:
        raise UserError("calibration_data is empty", allowed=ALLOWED, do="Pass the training rows")
    return found


def _has_labels(row: Encoded) -> bool:
    # nothing predicts the first token
    return any(label != IGNORED for label in row[1][1:])


def _encoded(row: Any, tokenizer: Any, length: int) -> Encoded:
    """Token ids and labels of a row, cut to `length`."""
    if isinstance(row, str):
        row = {"text": row}
    if isinstance(row, Mapping) and isinstance(row.get("input_ids"), Sequence):
        ids, labels = _tokenised(row, tokenizer)
        return ids[:length], labels[:length]
    if isinstance(row, Mapping) and {"instruction", "output"} <= row.keys():
        from colab_qlora.data.alpaca import format_alpaca

        (row,) = format_alpaca([row], tokenizer.eos_token)
    try:
        ids, start = encode(row, tokenizer)
    except UserError as error:
        raise UserError(
            "a row of calibration_data cannot be used", got=error.got, allowed=ALLOWED
        ) from error
    return ids[:length], [IGNORED] * min(start, length) + ids[start:length]


def _tokenised(row: Mapping[str, Any], tokenizer: Any) -> Encoded:
    """The ids of a row that was tokenised before, and its own labels; without any, all of them."""
    ids, size = list(row["input_ids"]), len(tokenizer)
    wrong = [i for i in ids if not isinstance(i, int) or not 0 <= i < size]
    if wrong:
        raise UserError(
            "a row of calibration_data has ids that are no tokens of this model",
            got=wrong[0],
            allowed=f"0 to {size - 1}",
            do="Tokenise the rows with this model's tokenizer, or pass their texts",
        )
    labels = list(row.get("labels") or ids)
    if len(labels) != len(ids):
        raise UserError(
            "a row of calibration_data has not one label for each id",
            got=f"{len(ids)} ids and {len(labels)} labels",
            do="Pass the rows as the tokenizer and the collator made them, or their texts",
        )
    return ids, labels


def _padded(rows: list[Encoded], pad: int, device: torch.device | str) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for index, (ids, own) in enumerate(rows):
        count = len(ids)
        input_ids[index, :count] = torch.tensor(ids)
        mask[index, :count] = 1
        labels[index, :count] = torch.tensor(own)
    return {
        name: tensor.to(device)
        for name, tensor in (
            ("input_ids", input_ids),
            ("attention_mask", mask),
            ("labels", labels),
        )
    }
