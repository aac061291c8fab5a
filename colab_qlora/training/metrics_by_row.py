"""Logits for metrics, one row at a time: what evaluation holds does not grow with the batch.

The logits of 8 rows of 2,048 tokens over 128,256 words are 7.8 GiB in float32. The decoder runs
once over the batch and gives the loss without any; then the head runs row by row, what
preprocess_logits_for_metrics makes of a row goes to host memory, and the row's logits are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from colab_qlora.errors import UserError
from colab_qlora.host import host_memory_gib
from colab_qlora.models.fuse import causal_model
from colab_qlora.models.fused_head import logits_from

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
        hidden: (batch, length, width), the decoder's last hidden states.
        labels: (batch, length).
        preprocess: takes (1, length, vocabulary) float32 logits and (1, length) labels; None keeps
            the logits.

    Returns:
        Logits or what `preprocess` gives, rows joined: a tensor, or a tuple of them.
    """
    causal, rows = causal_model(model), []
    for row, label in zip(hidden.split(1), labels.split(1), strict=True):
        logits = logits_from(causal, row).float()
        found = logits if preprocess is None else preprocess(logits, label)
        several = isinstance(found, tuple | list)
        rows.append([part.cpu() for part in (found if several else [found])])
    joined = tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
    return joined if len(joined) > 1 else joined[0]


def check_room_for_logits(model: Any, rows: Any) -> None:
    """Refuse to collect the logits of all rows where host memory cannot hold them.

    Raises:
        UserError: they do not fit.
    """
    free_gib = host_memory_gib()[1]
    if free_gib is None or "input_ids" not in getattr(rows, "column_names", ()):
        return
    tokens = sum(len(ids) for ids in rows["input_ids"])
    words = causal_model(model).config.vocab_size
    needed_gib = 4 * tokens * words / 2**30
    if needed_gib > _SHARE_OF_HOST * free_gib:
        raise UserError(
            "compute_metrics would get the logits of every eval token at once",
            got=f"{tokens:,} tokens x {words:,} words: {needed_gib:.1f} GiB",
            allowed=f"{_SHARE_OF_HOST * free_gib:.1f} GiB of host memory",
            do="Pass preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1), or "
            "fewer eval rows",
        )
