"""What a model loses on answers that it has not seen, in one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.models.host_embedding import compute_device
from colab_qlora.quantization.calibration import IGNORED, labelled_batches

__all__ = ["answer_loss"]


@torch.no_grad()
def answer_loss(
    model: Any, tokenizer: Any, rows: Sequence[Any], max_seq_length: int = 512
) -> float:
    """Mean loss of the labelled tokens of some rows, in nat.

    Args:
        model: a causal language model; it is left as it was.
        tokenizer: its own.
        rows: as for `from_pretrained(calibration_data=...)`.
        max_seq_length: tokens of a row, at most.

    Raises:
        UserError: no row has a label within that length.
    """
    device = compute_device(model)
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for batch in labelled_batches(rows, tokenizer, max_seq_length, device):
            labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**batch, use_cache=False).loss) * labelled
            count += labelled
    finally:
        model.train(was_training)
    if not count:
        raise UserError(
            "no row has a label", got=f"{len(rows)} rows", do="Look at show_tokens(...)"
        )
    return total / count
