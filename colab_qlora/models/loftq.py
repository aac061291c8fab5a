"""LoftQ: adapters that start as what the base lost when it was quantised.

Li et al. 2023, arXiv 2310.08659: B A is the best rank-r fit of W - dequantised(W), from a singular
value decomposition. Over 16-bit weights PEFT quantises by itself; over a model that was loaded in
4 bits, the weights before are read from its checkpoint.

Such an adapter belongs to dequantised(W): it is merged into that, and its config says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from colab_qlora.quantization.adapter_starts import LOFTQ, note_loftq_
from colab_qlora.quantization.own_source import check_same_model, checkpoint_name, own_source
from colab_qlora.quantization.quantised_weights import (
    decoded_weight,
    is_quantised,
    is_quantised_weight,
)

Source = Callable[[str], torch.Tensor]


def loftq_source(model: Any, options: dict[str, Any]) -> Source | None:
    """What reads the weights before they were quantised, where LoftQ has to start from them.

    Args:
        model: the base, without adapters.
        options: for `peft.LoraConfig`.

    Returns:
        Reads (rows, columns) by the name of a module; None if LoftQ is not asked for, or if the
        model is not quantised, which is PEFT's own case.

    Raises:
        UserError: the checkpoint is gone, is quantised itself, or is another model's.
    """
    if options.get("init_lora_weights") != LOFTQ or not is_quantised(model):
        return None
    source = own_source(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and is_quantised_weight(module.weight):
            do = "Put back the checkpoint that the model was loaded from, or load the model again"
            check_same_model(module, source(name), name, checkpoint_name(model), do)
            break
    return source


@torch.no_grad()
def start_from_quantisation_error(adapted: Any, source: Source) -> None:
    """Start the adapters of a quantised model by one step of LoftQ, and note it in their config.

    The checkpoint is read a matrix at a time. The decomposition is a randomised one of r + 8
    columns and 4 power iterations (Halko et al. 2011, arXiv 0909.4061). Of a weight that is not
    quantised nothing is lost, and its adapter keeps PEFT's start.

    Args:
        adapted: the `PeftModel`.
        source: of `loftq_source`.
    """
    for full_name, module in adapted.named_modules():
        adapter = next(iter(getattr(module, "lora_A", {})), None)
        if adapter is None:
            continue
        base = module.get_base_layer()
        if not is_quantised_weight(base.weight):
            continue
        kept = decoded_weight(base)
        weight = source(full_name.removeprefix("base_model.model.")).to(kept.device).float()
        left, right = _factors((weight - kept) / module.scaling[adapter], module.r[adapter])
        module.lora_B[adapter].weight.copy_(left)
        module.lora_A[adapter].weight.copy_(right)
        if adapter in module.lora_magnitude_vector:
            # DoRA starts with the norms of base and adapter together; PEFT took them before
            whole = kept + module.scaling[adapter] * (left @ right)
            norms = torch.linalg.vector_norm(whole, dim=1)
            module.lora_magnitude_vector[adapter].weight.copy_(norms)
    for config in adapted.peft_config.values():
        note_loftq_(config)


def _factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, rank) and (rank, in) whose product is the best fit of a float32 (out, in) matrix."""
    width = min(rank + 8, *matrix.shape)
    # it draws random numbers; the caller's stream stays where it was
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=width, niter=4)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).T
