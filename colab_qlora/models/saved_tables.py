"""Embedding and head that PEFT trains whole: in float32, over a model that computes in 16 bits.

A head in float32 cannot take states in 16 bits, nor one in 16 bits those that an embedding in
float32 began. A trainer's autocast hides that; generation has none. So the input of a trained head
is brought to the head's dtype, and what comes out of an embedding that is trained alone to that of
the embedding before it. Each is a hook on PEFT's wrapper, and does nothing where the dtypes agree.
"""

from __future__ import annotations

from typing import Any

import torch

from colab_qlora.models.fuse import causal_model


def let_tables_meet(adapted: Any) -> None:
    """Set the hooks on a `PeftModel`; one without such tables stays as it is."""
    from peft.utils import ModulesToSaveWrapper

    causal = causal_model(adapted)
    head, table = causal.get_output_embeddings(), causal.get_input_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        head.register_forward_pre_hook(_input_as_weight)
    elif isinstance(table, ModulesToSaveWrapper):
        table.register_forward_hook(_output_as_original)


def _input_as_weight(wrapper: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].to(wrapper.weight.dtype), *args[1:])


def _output_as_original(wrapper: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(wrapper.original_module.weight.dtype)
