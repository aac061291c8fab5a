"""A learning rate of its own for the embedding and the head, where they are trained whole.

Training a vocabulary's table at the rate of the adapters (2e-4) unsettles a model; continued
pretraining takes a tenth to a half of it there. Each table is a group of parameters by itself: in
`FlatAdamW` a group is one tensor, so that the gradient of a gigabyte is not copied into another.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from colab_qlora.errors import UserError


def embedding_tables(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained weights of embedding and head that PEFT's modules_to_save made, by full name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and _is_table(name)
    }


def parameter_groups(
    model: Any, learning_rate: float, weight_decay: float, decays: Collection[str]
) -> list[dict[str, Any]]:
    """Groups for an optimiser: as transformers makes them, and one more for each table.

    Args:
        model: a PEFT model.
        learning_rate: of the tables; above 0.
        weight_decay: for what decays.
        decays: full names of the parameters that weight decay is for.

    Returns:
        Groups as torch's optimisers take them. A table's group has "bits": 32 where
        bitsandbytes, too, keeps the moments of an embedding in 32 bits.

    Raises:
        UserError: neither embedding nor head is trained, or the rate is not positive.
    """
    tables = embedding_tables(model)
    if not learning_rate > 0:
        raise UserError("embedding_learning_rate is not positive", got=learning_rate)
    if not tables:
        raise UserError(
            "embedding_learning_rate is set, and neither embedding nor head is trained",
            do='Pass modules_to_save=["embed_tokens", "lm_head"] to get_peft_model, or leave it '
            "out",
        )
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in tables}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in rest.items() if n in decays], "weight_decay": weight_decay},
        {"params": [p for n, p in rest.items() if n not in decays], "weight_decay": 0.0},
    ]
    for name, table in tables.items():
        group = {"params": [table], "weight_decay": weight_decay, "lr": learning_rate}
        groups.append(group if _is_head(name) else {**group, "bits": 32})
    return groups


def _is_table(name: str) -> bool:
    return ".modules_to_save." in name and (_is_head(name) or ".embed_tokens." in f".{name}")


def _is_head(name: str) -> bool:
    return ".lm_head." in f".{name}"
