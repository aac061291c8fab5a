"""The class that a causal language model's instance is given, so that its loss needs no logits.

With labels in training the hidden states go straight into `linear_cross_entropy`; the output then
has no logits. In evaluation, and where `skip_logits=False` asks for them, the model's own forward
runs and the logits are there.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from colab_qlora.kernels.int8_decode import Int8Weight
from colab_qlora.kernels.linear_cross_entropy import linear_cross_entropy
from colab_qlora.kernels.linear_cross_entropy_inputs import count_labels
from colab_qlora.models.fused_class import reduce_by, stock_class
from colab_qlora.models.fused_layer import is_fused
from colab_qlora.models.fused_state import fused_state
from colab_qlora.models.key_value_cache import cache_field
from colab_qlora.quantization.int8_modules import Int8Linear

# models whose logits are lm_head(hidden), and what else is done to them: (scale, softcap) by config
_PLAIN = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Gemma", "Olmo2")
_LOGITS: dict[str, Any] = {
    **{f"{name}ForCausalLM": lambda config: (1.0, None) for name in _PLAIN},
    "Gemma2ForCausalLM": lambda config: (1.0, config.final_logit_softcapping),
    "Gemma3ForCausalLM": lambda config: (1.0, config.final_logit_softcapping),
    "GraniteForCausalLM": lambda config: (1.0 / config.logits_scaling, None),
    "CohereForCausalLM": lambda config: (config.logit_scale, None),
}


def why_head_not_fusable(model: Any) -> str:
    """Why a model's loss cannot be fused at all; empty if it can."""
    kind = type(model)
    if kind.__name__ not in _LOGITS or not kind.__module__.startswith("transformers.models."):
        return f"the logits of {kind.__name__} are not known here"
    if getattr(model, "loss_type", "ForCausalLM") != "ForCausalLM":
        return f"its loss is {model.loss_type}"
    return ""


@functools.cache
def fused_head_class(stock: Any) -> Any:
    """The subclass of a causal language model's class whose training loss needs no logits."""
    made: Any = type(
        stock.__name__, (stock,), {"__module__": stock.__module__, "_fused_head": True}
    )
    # generate() and the trainer read the signature of the model's own forward
    made.forward = functools.wraps(stock.forward)(_forward)
    made.enable_input_require_grads = _enable_input_require_grads
    made.__reduce_ex__ = reduce_by(fused_head_class)
    return made


def is_fused_head(model: Any) -> bool:
    return "_fused_head" in type(model).__dict__


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    skip_logits = kwargs.pop("skip_logits", None)
    if skip_logits is None:
        skip_logits = self.training
    kind = _own_class(self)
    kwargs |= zip(_parameter_names(kind), args, strict=False)
    labels = kwargs.get("labels")
    if not skip_logits or labels is None or _why_stock_loss(self, kwargs):
        return kind.forward(self, **kwargs)
    return_dict = kwargs.pop("return_dict", None)
    shift_labels = kwargs.pop("shift_labels", None)
    del kwargs["labels"]
    items = kwargs.pop("num_items_in_batch", None)
    kwargs.pop("logits_to_keep", None)
    shift = shift_labels is None
    # counted while the layers run, so that nobody waits for the count at the head
    counted = count_labels(labels if shift else shift_labels, shift=shift)
    outputs = self.model(**kwargs)
    scale, softcap = _LOGITS[type(self).__name__](self.config)
    state = fused_state(self)
    weight, bias, dtype = _head_parts(self.lm_head)
    with torch.autocast(weight.device.type, enabled=False):
        loss = linear_cross_entropy(
            outputs.last_hidden_state.to(dtype),
            weight,
            counted,
            bias=bias,
            shift=shift,
            num_items_in_batch=items,
            softcap=softcap,
            logit_scale=scale,
            memory_budget_bytes=state.chunk_of_logits_bytes() if state else None,
        )
    cache = cache_field(type(outputs))
    result = CausalLMOutputWithPast(
        **{cache_field(CausalLMOutputWithPast): getattr(outputs, cache)},
        loss=loss,
        logits=None,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    return result.to_tuple() if return_dict is False else result


def logits_from(causal: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The logits of a model with a fused head, as its own forward computes them.

    Args:
        causal: the causal language model.
        hidden: (batch, length, width), the decoder's last hidden states.

    Returns:
        (batch, length, vocabulary), in the head's dtype.
    """
    scale, softcap = _LOGITS[type(causal).__name__](causal.config)
    logits: torch.Tensor = causal.lm_head(hidden)
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _head_parts(
    head: Any,
) -> tuple[torch.Tensor | Int8Weight, torch.Tensor | None, torch.dtype]:
    """Weight, bias and the dtype that the loss computes in."""
    if type(head) is not Int8Linear:
        return head.weight, head.bias, head.weight.dtype
    dtype = head.compute_dtype
    return head.int8_weight(), None if head.bias is None else head.bias.to(dtype), dtype


def _own_class(self: Any) -> Any:
    # whoever took hold of a method before the model was restored still gets the model's own
    return stock_class(type(self)) if is_fused_head(self) else type(self)


def _enable_input_require_grads(self: Any) -> None:
    """As transformers, with a hook that can be pickled, and that fused layers are spared."""
    _own_class(self).enable_input_require_grads(self)
    for handle in getattr(self, "_require_grads_hooks", ()):
        handle.hooks_dict_ref()[handle.id] = _InputGradients(self)


class _InputGradients:
    """A hook on the embedding: its output requires a gradient, unless every layer is fused.

    transformers wants that for torch's checkpointing, through which nothing flows back to the
    adapters of a layer whose input requires none. A fused layer needs no such thing, and the first
    one would compute a gradient that nobody reads, of an output that the graph then holds.
    The model is held weakly, so that a copy of the embedding is not one of the model; a copied hook
    knows no layers.
    """

    def __init__(self, causal: Any = None) -> None:
        self._causal = weakref.ref(causal) if causal is not None else lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        return _InputGradients, ()

    def __call__(self, module: Any, args: Any, output: torch.Tensor) -> None:
        causal = self._causal()
        layers = causal.model.layers if causal is not None else [None]
        # somebody's own checkpointing around a layer stands in the instance
        if not all(is_fused(layer) and "forward" not in vars(layer) for layer in layers):
            output.requires_grad_(True)


@functools.cache
def _parameter_names(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _why_stock_loss(self: Any, kwargs: dict[str, Any]) -> str:
    """Why this call computes logits after all; empty if it need not."""
    if fused_state(self) is None:
        return "the model was restored"
    if "_loss_function" in self.__dict__:
        return "the model has a loss function of its own"
    head = self.lm_head
    if type(head) not in (torch.nn.Linear, Int8Linear):
        return f"the head is a {type(head).__name__}"
    if head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__:
        return "the head has hooks"
    keep = kwargs.get("logits_to_keep", 0)
    if not isinstance(keep, int) or keep != 0:
        return "some logits were asked for"
    return ""
