"""An adapter's weights as tensors by name: to copy, to compare, and to write back in place.

Everything here reads and writes the parameters that the model has. None is replaced: the flat
optimiser's parameters are views of one tensor, and fused layers hold the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from colab_qlora.errors import UserError

__all__ = ["adapter_name", "adapter_tensors", "is_finite", "write_"]


def adapter_name(model: Any) -> str | None:
    """The active adapter's name; None for a model without adapters."""
    if not getattr(model, "peft_config", None):
        return None
    active = model.active_adapter
    return active if isinstance(active, str) else active[0]


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """The active adapter's weights under the names that PEFT saves them by.

    Returns:
        Name -> the parameter without its gradient, sharing its memory.
    """
    from peft import get_peft_model_state_dict

    name = adapter_name(model)
    assert name is not None, "the caller has seen to that"
    # state_dict() would pack the statistics of every 4-bit weight
    state = {key: parameter.detach() for key, parameter in model.named_parameters()}
    return get_peft_model_state_dict(
        model, state_dict=state, adapter_name=name, save_embedding_layers=False
    )


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no number is nan or inf; waits for the device once."""
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    if not floating:
        return True
    # the largest number of a tensor is nan or inf if any is
    norms = torch._foreach_norm(floating, float("inf"))
    return bool(torch.isfinite(torch.stack([n.float().to(norms[0].device) for n in norms])).all())


@torch.no_grad()
def write_(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    """Copy weights into the memory of others, all or none.

    Args:
        target: what `adapter_tensors` gives.
        source: the same names and shapes.
        what: where `source` comes from, for the error.

    Raises:
        UserError: names or shapes differ.
    """
    shapes = [{name: tuple(t.shape) for name, t in each.items()} for each in (target, source)]
    if shapes[0] != shapes[1]:
        differ = [n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n)]
        raise UserError(
            f"{what} is of another adapter",
            got=f"{len(differ)} weights that differ, the first {differ[0]}",
            do="Load it with its own model: FastLanguageModel.from_pretrained(folder)",
        )
    for name, tensor in target.items():
        tensor.copy_(source[name])
