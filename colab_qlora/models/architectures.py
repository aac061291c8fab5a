"""Which decoder layers can be fused, and how their parts are read from the model's own modules.

The families differ little: Llama (2, 3, 3.1, 3.2), Mistral, Qwen2 and 2.5 (biases on q, k, v),
Qwen3 (a norm on every head of q and k), SmolLM2 (a Llama) and SmolLM3 (layers without positions).
Adapters may be switched between any two passes: what was read holds while
`watch_layer` finds nothing changed.
"""

from __future__ import annotations

import functools
from typing import Any

from colab_qlora.kernels.swiglu import activation_name
from colab_qlora.layers.layer_parts import LayerParts, Norm
from colab_qlora.layers.linear import LinearPart, read_linear, watch_linear
from colab_qlora.layers.linear_group import PADDING, LinearGroup
from colab_qlora.layers.scratch import Scratch
from colab_qlora.layers.watch import Watch
from colab_qlora.models.fused_norm import RMS_NORMS

# class name of the decoder layer -> the module of transformers that it must come from: a class of
# the same name elsewhere may compute something else
DECODER_LAYERS = {
    "LlamaDecoderLayer": "llama",
    "MistralDecoderLayer": "mistral",
    "Qwen2DecoderLayer": "qwen2",
    "Qwen3DecoderLayer": "qwen3",
    "SmolLM3DecoderLayer": "smollm3",
}
_CHILDREN = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
# the four groups of linears that share an input, and whose children they are
_LINEARS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}
_CAPTURING = "transformers.utils.output_capturing"


def why_not_fusable(layer: Any) -> str:
    """Why a decoder layer cannot be fused at all; empty if it can."""
    kind = type(layer)
    family = DECODER_LAYERS.get(kind.__name__)
    home = f"transformers.models.{family}.modeling_{family}"
    if family is None or kind.__module__ != home:
        return f"{kind.__name__} is none of {', '.join(DECODER_LAYERS)}"
    if "forward" in layer.__dict__:
        return "its forward is replaced (a model spread over devices has such hooks)"
    config = layer.self_attn.config
    if activation_name(getattr(config, "hidden_act", "")) is None:
        return f"its activation is {getattr(config, 'hidden_act', None)!r}"
    if getattr(config, "pretraining_tp", 1) != 1:
        return "pretraining_tp is not 1"
    norms = {type(getattr(layer, name)).__name__ for name in _CHILDREN[2:]}
    if any(not name.endswith("RMSNorm") for name in norms):
        return f"its norm is a {', '.join(sorted(norms))}"
    return ""


def why_stock_now(layer: Any) -> str:
    """Why this pass has to take the model's own code; empty if the fused layer can run."""
    attention = layer.self_attn
    if layer.training and attention.attention_dropout:
        return f"attention dropout is {attention.attention_dropout}"
    for name in _CHILDREN:
        child = getattr(layer, name)
        if "forward" in child.__dict__:
            return f"{name}.forward is replaced"
        watched = [*child._forward_hooks.values(), *child._forward_pre_hooks.values()]
        watched += [*child._backward_hooks.values(), *child._backward_pre_hooks.values()]
        if any(getattr(hook, "__module__", "") != _CAPTURING for hook in watched):
            return f"{name} has hooks"
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [m for m in (getattr(attention, n, None) for n in ("q_norm", "k_norm")) if m]
    if any(type(norm).__name__ not in RMS_NORMS for norm in norms):
        return "a norm was replaced"
    activation: Any = layer.mlp.act_fn
    if type(activation) is not _activation_class(attention.config.hidden_act):
        return "the activation was replaced"
    if activation._forward_hooks or activation._forward_pre_hooks:
        return "the activation has hooks"
    return ""


def watch_layer(layer: Any) -> Watch:
    """Watch everything that `why_stock_now` and `read_layer` follow from."""
    watch = Watch()
    attention, mlp = layer.self_attn, layer.mlp
    inside = layer.__dict__["_modules"]
    watch.attribute(layer, "training")
    watch.attribute(attention, "attention_dropout", "use_rope", "sliding_window", "config")
    watch.attribute(attention.config, "hidden_act", "sliding_window")
    for name in _CHILDREN:
        watch.module(watch.item(inside, name))
    watch.module(watch.item(mlp.__dict__["_modules"], "act_fn"))
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    for name in ("q_norm", "k_norm"):
        norm = watch.item(attention.__dict__["_modules"], name)
        norms += [] if norm is None else [norm]
    for norm in norms:
        watch.module(norm)
        watch.parameters(norm)
        watch.attribute(norm, "variance_epsilon")
    for owner, names in _LINEARS.values():
        for name in names:
            watch_linear(watch.item(inside[owner].__dict__["_modules"], name), watch)
    return watch


@functools.cache
def _activation_class(hidden_act: str) -> Any:
    from transformers.activations import ACT2FN

    return type(ACT2FN[hidden_act])


def layer_linears(layer: Any) -> dict[str, list[LinearPart]]:
    """The layer's linears in the four groups that share an input."""
    return {
        group: [read_linear(name, getattr(getattr(layer, owner), name)) for name in names]
        for group, (owner, names) in _LINEARS.items()
    }


def largest_linear_bytes(layer: Any) -> int:
    """Bytes of the layer's largest weight once it is decoded to 16 bit, with room for LoRA."""
    linears = [part for parts in layer_linears(layer).values() for part in parts]
    spare = PADDING["cuda"]
    return max(2 * part.out_features * (part.in_features + spare) for part in linears)


def read_layer(
    layer: Any, scratch: Scratch, max_weight_bytes: int | None = None, *, holds_gate_up: bool = True
) -> LayerParts:
    """A decoder layer's parts as they are now.

    Args:
        max_weight_bytes: decode at most this much of a group at a time.
        holds_gate_up: give gate and up a buffer of their own, so that the backward pass decodes
            them once for both of their uses.
    """
    attention, config = layer.self_attn, layer.self_attn.config
    found = layer_linears(layer)
    groups = {
        name: LinearGroup(
            linears,
            scratch,
            "weight_gate_up" if name == "gate_up" and holds_gate_up else "weight",
            max_weight_bytes,
        )
        for name, linears in found.items()
    }
    heads = attention.head_dim
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    activation = activation_name(config.hidden_act)
    assert activation is not None
    return LayerParts(
        **groups,
        norm1=_norm(layer.input_layernorm),
        norm2=_norm(layer.post_attention_layernorm),
        q_heads=found["qkv"][0].out_features // heads,
        kv_heads=found["qkv"][1].out_features // heads,
        head_dim=heads,
        activation=activation,
        q_norm=None if q_norm is None else _norm(q_norm),
        k_norm=None if k_norm is None else _norm(k_norm),
        uses_rope=bool(getattr(attention, "use_rope", True)),
        window=attention_window(attention),
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def attention_window(attention: Any) -> int | None:
    """Reach of sliding-window attention in tokens, or None."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return None
