"""Swap a model's decoder layers and loss for the fused ones, list what was swapped, and undo it.

Nothing is patched: the instances inside the one model that is given get another class, and two of
its modules a hook. Modules, parameters and their names stay where they are, so saving, loading,
PEFT and the trainer see the same model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from colab_qlora.models.architectures import why_not_fusable
from colab_qlora.models.batch_hooks import prepare_batch, tables_in_float32
from colab_qlora.models.fused_class import stock_class
from colab_qlora.models.fused_head import fused_head_class, is_fused_head, why_head_not_fusable
from colab_qlora.models.fused_layer import fused_layer_class, is_fused
from colab_qlora.models.fused_norm import can_fuse_norm, fused_norm_class, is_fused_norm
from colab_qlora.models.fused_state import ATTRIBUTE, LAYER_NUMBER, FusedState, fused_state
from colab_qlora.models.host_embedding import bring_back, compute_device, is_on_host

_HANDLES = "colab_qlora_hooks"


def causal_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def state_of(model: Any) -> FusedState | None:
    """The state that the fused parts of a model share; None if nothing is fused."""
    return fused_state(causal_model(model))


def fuse(model: Any, state: FusedState | None = None) -> FusedState:
    """Swap what can be swapped, in place; a second call changes nothing.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        state: what the model had before it was restored, to go on with; None: a new one.

    Returns:
        The settings and scratch memory that the fused parts share.
    """
    causal = causal_model(model)
    have = fused_state(causal)
    if have is not None:
        return have
    state = FusedState() if state is None else state
    causal.__dict__[ATTRIBUTE] = state
    state.trained.watch(causal)
    trunk = getattr(causal, "model", None)
    stock: Any
    layers = list(getattr(trunk, "layers", None) or [])
    fusable = bool(layers) and not any(why_not_fusable(layer) for layer in layers)
    if fusable:
        state.layer_count = len(layers)
        for number, layer in enumerate(layers):
            stock = type(layer)
            layer.__class__ = fused_layer_class(stock)
            layer.__dict__[ATTRIBUTE], layer.__dict__[LAYER_NUMBER] = state, number
        assert trunk is not None
        causal.__dict__[_HANDLES] = [
            trunk.register_forward_pre_hook(prepare_batch, with_kwargs=True),
            trunk.rotary_emb.register_forward_pre_hook(tables_in_float32, with_kwargs=True),
        ]
        trunk.__dict__[ATTRIBUTE] = state
    # a fused layer computes its norms itself; elsewhere every norm is worth a kernel
    norms = [getattr(trunk, "norm", None)] if fusable else list(causal.modules())
    for norm in norms:
        if norm is not None and can_fuse_norm(norm):
            stock = type(norm)
            norm.__class__ = fused_norm_class(stock)
    if not why_head_not_fusable(causal):
        stock = type(causal)
        causal.__class__ = fused_head_class(stock)
    return state


def restore(model: Any) -> Any:
    """Undo `fuse`: the model is what it was, with the adapters and weights that it has now."""
    return _restore(model, keeps_table=False)


def _restore(model: Any, *, keeps_table: bool) -> Any:
    causal = causal_model(model)
    state = fused_state(causal)
    if state is None:
        return model
    if not keeps_table and is_on_host(causal.get_input_embeddings()):
        bring_back(causal, compute_device(causal))
    for module in causal.modules():
        if is_fused(module) or is_fused_norm(module):
            module.__class__ = stock_class(type(module))
        module.__dict__.pop(ATTRIBUTE, None)
        module.__dict__.pop(LAYER_NUMBER, None)
    for handle in causal.__dict__.pop(_HANDLES, []):
        handle.remove()
    if is_fused_head(causal):
        causal.__class__ = stock_class(type(causal))
    state.free()
    return model


@contextlib.contextmanager
def unfused(model: Any) -> Iterator[None]:
    """In here the model runs its own code and calls each of its modules, as hooks need it.

    Settings and plans are the same afterwards; scratch memory is free, and nothing is kept that
    was read of the model, whose weights may be replaced now.
    """
    state = state_of(model)
    if state is None:
        yield
        return
    _restore(model, keeps_table=True)
    state.forget()
    try:
        yield
    finally:
        fuse(model, state)


def fused_layers(model: Any) -> list[torch.nn.Module]:
    """The decoder layers that are fused now."""
    return [module for module in causal_model(model).modules() if is_fused(module)]
