"""The loss of each eval row by itself, for comparisons row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from colab_qlora.curves.paired import RowLosses
from colab_qlora.errors import UserError
from colab_qlora.models.fuse import causal_model
from colab_qlora.models.fused_head import is_fused_head

__all__ = ["row_losses"]

_IGNORED = -100
# a batch is cut into groups of rows whose logits, in float32, are no larger
_LOGITS_BYTES = 2**29


def row_losses(trainer: Any, logits_bytes: int = _LOGITS_BYTES) -> RowLosses:
    """The loss of each eval row, by the model as it is; labels of -100 do not count.

    A pass decodes all 4-bit weights however few its rows are, so rows go through in groups as large
    as the memory for their logits allows. Where a collator joins rows into one (packing,
    padding-free batches), what it joined counts as a row.

    Args:
        trainer: a trainer with an eval dataset.
        logits_bytes: size of the logits of a group, in bytes; a single row may take more.

    Returns:
        Losses and token counts of the rows that have a label.

    Raises:
        UserError: no row has one.
    """
    model = trainer.model
    was_training = model.training
    model.eval()
    losses, tokens = [], []
    try:
        for group in _groups(trainer, logits_bytes):
            # the first token is predicted by nothing
            counts = (group["labels"][:, 1:] != _IGNORED).sum(1).tolist()
            if not any(counts):
                continue
            with torch.no_grad(), trainer.accelerator.autocast():
                found = _losses_of(model, group)
            pairs = [(loss, n) for loss, n in zip(found, counts, strict=True) if n]
            losses += [loss for loss, _ in pairs]
            tokens += [count for _, count in pairs]
    finally:
        model.train(was_training)
    if not losses:
        raise UserError("no eval row has a label", do="Check the eval set: show_tokens(...)")
    return RowLosses(np.array(losses), np.array(tokens))


def _groups(trainer: Any, logits_bytes: int) -> Iterator[dict[str, Any]]:
    vocabulary = trainer.model.config.get_text_config().vocab_size
    for batch in trainer.get_eval_dataloader():
        inputs = trainer._prepare_inputs(batch)
        rows, length = inputs["input_ids"].shape
        size = max(1, logits_bytes // (4 * length * vocabulary))
        for start in range(0, rows, size):
            yield {
                name: value[start : start + size]
                if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == rows
                else value
                for name, value in inputs.items()
            }


def _losses_of(model: Any, group: dict[str, Any]) -> list[float]:
    """Mean loss of the labelled tokens of each row; nan for a row without any."""
    labels = group["labels"]
    if len(labels) == 1:
        # the model's own loss, which a fused head computes without logits
        options = {"skip_logits": True} if is_fused_head(causal_model(model)) else {}
        return [float(model(**group, use_cache=False, **options).loss)]
    inputs = {name: value for name, value in group.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    # a row at a time, because the float32 copy of all would take as much memory again
    return [
        float(cross_entropy(row[:-1].float(), wanted[1:], ignore_index=_IGNORED))
        for row, wanted in zip(logits, labels, strict=True)
    ]
