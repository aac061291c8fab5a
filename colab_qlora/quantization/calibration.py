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
# every micro-batch reads and rounds all 16-bit weights once, so there are two; 2,048 tokens of an
# 8B leave 2.6 GB of logits, which a T4 has room for beside the model
ROWS_A_BATCH = 8
MOST_TOKENS_A_ROW = 256
LEAST_TOKENS = 256
IGNORED = -100
ALLOWED = (
    'a list of texts, of rows with "text", "messages" or "prompt" and "completion", of Alpaca rows '
    "(instruction, output), a Dataset of such rows, or the path of a .json or .jsonl file"
)

Batch = dict[str, torch.Tensor]


def calibration_batches(
    data: Any, tokenizer: Any, max_seq_length: int, device: torch.device | str = "cpu"
) -> list[Batch]:
    """The first rows of the data as padded micro-batches with labels.

    Args:
        data: see `ALLOWED`. The first 16 rows are taken.
        tokenizer: of the model.
        max_seq_length: tokens of a row, at most; no more than 256 are taken.
        device: where the tensors go.

    Returns:
        Keyword arguments of the model's forward: input_ids, attention_mask and labels, each
        (rows, tokens), int64; labels are -100 on prompts and on padding.

    Raises:
        UserError: data of another kind, unreadable rows, or fewer than 256 tokens.
    """
    length = min(max_seq_length, MOST_TOKENS_A_ROW)
    rows = [_encoded(row, tokenizer, length) for row in _rows(data)]
    rows = [(ids, start) for ids, start in rows if start < len(ids) and len(ids) > 1]
    tokens = sum(len(ids) for ids, _ in rows)
    if tokens < LEAST_TOKENS:
        raise UserError(
            "the calibration data are too short",
            got=f"{tokens} tokens in {len(rows)} rows with labels",
            allowed=f"{LEAST_TOKENS} tokens or more",
            do="Pass more rows of the training set, 16 of them",
        )
    # like lengths together: less padding
    rows.sort(key=lambda row: len(row[0]))
    parts = [rows[i : i + ROWS_A_BATCH] for i in range(0, len(rows), ROWS_A_BATCH)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return [_padded(part, pad, device) for part in parts]


def _rows(data: Any) -> list[Any]:
    if isinstance(data, str | Path):
        from colab_qlora.data.records import read_records

        return list(read_records(data)[:ROWS])
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise UserError(
            "calibration_data is not understood", got=type(data).__name__, allowed=ALLOWED
        )
    found = list(itertools.islice(data, ROWS))  # there may be no end
    if not found:
        raise UserError("calibration_data is empty", allowed=ALLOWED, do="Pass the training rows")
    return found


def _encoded(row: Any, tokenizer: Any, length: int) -> tuple[list[int], int]:
    """Token ids of a row, cut to `length`, and where its labels begin."""
    if isinstance(row, str):
        row = {"text": row}
    if isinstance(row, Mapping) and isinstance(row.get("input_ids"), Sequence):
        return list(row["input_ids"])[:length], 0  # tokenised already
    if isinstance(row, Mapping) and {"instruction", "output"} <= row.keys():
        from colab_qlora.data.alpaca import format_alpaca

        (row,) = format_alpaca([row], tokenizer.eos_token)
    try:
        ids, start = encode(row, tokenizer)
    except UserError as error:
        raise UserError(
            "a row of calibration_data cannot be used", got=error.got, allowed=ALLOWED
        ) from error
    return ids[:length], start


def _padded(rows: list[tuple[list[int], int]], pad: int, device: torch.device | str) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for index, (ids, start) in enumerate(rows):
        count = len(ids)
        input_ids[index, :count] = torch.tensor(ids)
        mask[index, :count] = 1
        labels[index, start:count] = input_ids[index, start:count]
    return {
        name: tensor.to(device)
        for name, tensor in (
            ("input_ids", input_ids),
            ("attention_mask", mask),
            ("labels", labels),
        )
    }
