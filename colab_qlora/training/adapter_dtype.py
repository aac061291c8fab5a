"""Keep adapters in float32 whatever the trainer underneath casts them to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def adapters_kept(model: Any) -> Iterator[None]:
    """Put a PEFT model's trainable weights back as they were before the block.

    TRL casts the adapters of a quantised model to bfloat16. float16 training cannot unscale
    bfloat16 gradients, and an update of 2e-4 relative to the weight is lost in bfloat16's 8 bits.
    The values are put back too, since the cast rounds them.
    """
    is_peft = hasattr(model, "peft_config")
    before = (
        {n: p.data.clone() for n, p in model.named_parameters() if p.requires_grad}
        if is_peft
        else {}
    )
    yield
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = before[name]


def adapters_to_float32(model: Any) -> None:
    """Cast trainable half-precision weights of a PEFT model, also one that TRL just wrapped.

    A model without adapters (full fine-tuning) is left alone.
    """
    if not hasattr(model, "peft_config"):
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
