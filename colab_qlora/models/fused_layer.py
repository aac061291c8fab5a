"""The class that a decoder layer's instance is given while it is fused.

It is a subclass of the layer's own class, made once for each, with another `forward`. The instance
keeps its modules, parameters, hooks and names; `isinstance` and transformers' hooks by class hold.
Giving the instance its first class back undoes it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from colab_qlora.layers.decoder_layer import fused_layer
from colab_qlora.layers.layer_parts import LayerParts, Pass
from colab_qlora.layers.recorded_layer import recorded_layer
from colab_qlora.models.architectures import attention_window
from colab_qlora.models.documents import documents_of, is_stand_in, stock_mask
from colab_qlora.models.fused_class import reduce_by, stock_class
from colab_qlora.models.fused_state import FusedState, LayerChoice, fused_state
from colab_qlora.models.key_value_cache import cache_in
from colab_qlora.models.recorded_passes import graph_for, layer_pass


@functools.cache
def fused_layer_class(stock: Any) -> Any:
    """The fused subclass of a decoder layer's class."""
    made: Any = type(f"Fused{stock.__name__}", (stock,), {"__module__": stock.__module__})
    # after the class stands: newer transformers wrap a subclass's forward in its checkpointing
    made.forward = _forward
    made.__call__ = torch.nn.Module.__call__
    made.__reduce_ex__ = reduce_by(fused_layer_class)
    return made


def is_fused(layer: Any) -> bool:
    return getattr(type(layer), "forward", None) is _forward


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    *,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    state = fused_state(self)
    assert state is not None
    reason = _why_stock(hidden_states, attention_mask, kwargs)
    parts: LayerParts | None = None
    choice: LayerChoice | None = None
    if not reason:
        choice = state.choice_for(self, hidden_states, attention_mask)
        reason, parts = state.reading_of(self, choice)
    if parts is None or choice is None:
        if cache_in(kwargs) is None:  # generation is meant to take the model's own code
            state.stock_passes[reason] = state.stock_passes.get(reason, 0) + 1
        return _stock_forward(
            self,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    assert position_embeddings is not None
    run = _pass_of(self, state, parts, choice, hidden_states, attention_mask, position_embeddings)
    layer = layer_pass(state, self, hidden_states, parts, run, choice)
    graph = graph_for(state, layer)
    if graph is not None and layer is not None:
        return recorded_layer(hidden_states, graph, state.graphs.flight(is_last=layer.is_last))
    out = fused_layer(hidden_states, parts, run, state.store_for(choice))
    if layer is not None:
        state.graphs.layer_ran(layer, state.scratch.bytes_held())
    return out


def _pass_of(
    layer: Any,
    state: FusedState,
    parts: LayerParts,
    choice: LayerChoice,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> Pass:
    """What this pass needs besides its input."""
    lead = tuple(hidden.shape[:-1])
    heads = (parts.q_heads, parts.kv_heads, parts.head_dim)
    scale, reach = float(layer.self_attn.scaling), (parts.window, parts.score_cap)
    cos, sin = state.tables(position_embeddings)
    shape = state.attention_shape(lead, heads, scale, mask, *reach)
    kind = hidden.device.type
    autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
    chunks = state.mlp_chunks(parts, choice, shape.tokens)
    return Pass(shape, cos, sin, lead, state.scratch, autocast, chunks)


def _why_stock(
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> str:
    """Why this call takes the model's own code; empty if the fused layer can run."""
    if cache_in(kwargs) is not None:
        return "generation with a key-value cache"
    if kwargs.get("output_attentions"):
        return "attention weights were asked for"
    if hidden.dim() != 3:
        return f"hidden states of {hidden.dim()} dimensions"
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 4):
        return "an attention mask of another form"
    if hidden.dtype == torch.float32 and torch.is_autocast_enabled(hidden.device.type):
        return "float32 hidden states under autocast"
    return ""


def _stock_forward(self: Any, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The model's own forward, in its own checkpointing, with rotation tables in its own dtype."""
    tables = kwargs.get("position_embeddings")
    if tables is not None:
        kwargs["position_embeddings"] = tuple(t.to(hidden.dtype) for t in tables)
    mask = kwargs.get("attention_mask")
    if is_stand_in(mask):
        attention = self.self_attn
        window, kind = attention_window(attention), attention.config._attn_implementation
        kwargs["attention_mask"] = stock_mask(documents_of(mask), hidden, window, kind)
    stock = functools.partial(stock_class(type(self)).forward, self, **kwargs)
    if self.gradient_checkpointing and self.training and cache_in(kwargs) is None:
        # torch's checkpointing may want it (use_reentrant=True), and the first layer's has none
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        return self._gradient_checkpointing_func(stock, hidden)
    return stock(hidden)
