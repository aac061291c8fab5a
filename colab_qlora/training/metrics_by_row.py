"""Logits for metrics, one row at a time: what evaluation holds does not grow with the batch.

The logits of 8 rows of 2,048 tokens over 128,256 words are 7.8 GiB in float32. The decoder runs
once over the batch and gives the loss without any; then the head runs row by row, what
preprocess_logits_for_metrics makes of a row goes to host memory, and the row's logits are gone.

With padding_free, or with packed eval rows, the documents of a batch are joined: the batch is one
row here, (1, tokens of the batch), and its logits are made at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_pt_utils import nested_concat

from colab_qlora.errors import UserError
from colab_qlora.host import host_memory_gib
from colab_qlora.models.fuse import causal_model
from colab_qlora.models.fused_head import logits_from
from colab_qlora.training.packing import list_lengths

Preprocess = Callable[[Tensor, Tensor], Any] | None
# of what is free: the arrays are copied once when they are joined
_SHARE_OF_HOST = 0.4


@contextmanager
def hidden_states_kept(model: Any) -> Iterator[list[Tensor]]:
    """In here, the last hidden states of every pass, (batch, length, width), are put in a list."""
    kept: list[Tensor] = []
    trunk = causal_model(model).model
    handle = trunk.register_forward_hook(lambda m, a, out: kept.append(out.last_hidden_state))
    try:
        yield kept
    finally:
        handle.remove()


@torch.no_grad()
def predictions_by_row(model: Any, hidden: Tensor, labels: Tensor, preprocess: Preprocess) -> Any:
    """What a metric gets of a batch, in host memory.

    Args:
        model: a model with a fused head, or a PEFT model around one.
        hidden: (batch, length, width), the decoder's last hidden states; batch is 1 where the
            documents of a batch are joined (padding_free, packed eval rows).
        labels: (batch, length).
        preprocess: takes (1, length, vocabulary) float32 logits and (1, length) labels; None keeps
            the logits.

    Returns:
        Logits or what `preprocess` gives, rows joined: tensors in the tuple, list or mapping that
        it gives them in, as transformers' loop takes them; None if it gives None. A number for a
        row (a tensor without dimensions) becomes one for each row, shape (batch,).

    Raises:
        UserError: `preprocess` gives something else.
    """
    causal, rows = causal_model(model), []
    for row, label in zip(hidden.split(1), labels.split(1), strict=True):
        logits = logits_from(causal, row).float()
        found = logits if preprocess is None else preprocess(logits, label)
        del logits
        if found is None:
            return None
        rows.append(_on_host(found))
    return _joined(rows)


def check_room_for_logits(model: Any, rows: Any, joined_rows: int = 1) -> None:
    """Refuse to collect the logits of all rows where host memory cannot hold them.

    transformers' evaluation loop pads every batch to the longest row of all.

    Args:
        model: as of `predictions_by_row`.
        rows: the tokenised eval rows; other kinds than a datasets.Dataset are not looked at.
        joined_rows: rows that the collator joins into one; 1 where it pads them.

    Raises:
        UserError: they do not fit.
    """
    free_gib = host_memory_gib()[1]
    known = isinstance(rows, Dataset) and "input_ids" in rows.column_names
    if free_gib is None or not known or len(rows) == 0:
        return
    lengths = list_lengths(rows, "input_ids")
    starts = range(0, len(lengths), joined_rows)
    count, longest = len(starts), max(sum(lengths[i : i + joined_rows]) for i in starts)
    words = causal_model(model).config.vocab_size
    needed_gib = 4 * count * longest * words / 2**30
    if needed_gib > _SHARE_OF_HOST * free_gib:
        raise UserError(
            "compute_metrics would get the logits of every eval token at once",
            got=f"{count:,} rows padded to {longest:,} tokens x {words:,} words: "
            f"{needed_gib:.1f} GiB",
            allowed=f"{_SHARE_OF_HOST * free_gib:.1f} GiB of host memory",
            do="Pass preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1), or "
            "fewer or shorter eval rows",
        )


def _on_host(found: Any) -> Any:
    """What `preprocess` gave of one row, its tensors in host memory and with a first dimension."""
    if isinstance(found, Mapping):
        return _like(found, [_on_host(part) for part in found.values()])
    if isinstance(found, tuple | list):
        return _like(found, [_on_host(part) for part in found])
    if isinstance(found, np.ndarray | np.generic):
        found = torch.as_tensor(found)
    if isinstance(found, Tensor):
        return torch.atleast_1d(found.detach().cpu())
    raise UserError(
        "preprocess_logits_for_metrics gave what cannot be joined",
        got=type(found).__name__,
        allowed="a tensor, or a tuple, list or mapping of tensors",
        do="Return logits.argmax(-1), or torch.tensor(...) around a number",
    )


def _joined(rows: Sequence[Any]) -> Any:
    """Rows of one structure as one, tensors along their first dimension."""
    first = rows[0]
    if isinstance(first, Mapping):
        return _like(first, [_joined([row[name] for row in rows]) for name in first])
    if isinstance(first, tuple | list):
        return _like(first, [_joined(parts) for parts in zip(*rows, strict=True)])
    if all(row.shape[1:] == first.shape[1:] for row in rows):
        return torch.cat(list(rows))
    # of different lengths: padded as transformers does it from batch to batch
    return reduce(nested_concat, rows)


def _like(found: Any, parts: list[Any]) -> Any:
    """The parts in a container of the same type."""
    if isinstance(found, Mapping):
        return type(found)(dict(zip(found, parts, strict=True)))  # type: ignore[call-arg]
    # a named tuple takes its fields one by one
    return type(found)(*parts) if hasattr(found, "_fields") else type(found)(parts)
