"""Whether a decoder layer can be fused, and how its parts are read from the model's own modules.

What differs between the families stands in `decoder_families.py`. Adapters may be switched between
any two passes: what was read holds while `watch_layer` finds nothing changed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from colab_qlora.kernels.swiglu import activation_name
from colab_qlora.layers.layer_parts import LayerParts, Norm
from colab_qlora.layers.linear import LinearPart, read_linear, watch_linear
from colab_qlora.layers.linear_group import PADDING, LinearGroup
from colab_qlora.layers.scratch import Scratch
from colab_qlora.layers.watch import Watch
from colab_qlora.models.decoder_families import DECODER_LAYERS, Family, family_of, known_family
from colab_qlora.models.fused_norm import RMS_NORMS, norm_formula

_CAPTURING = "transformers.utils.output_capturing"
_HEAD_NORMS = ("q_norm", "k_norm")


def why_not_fusable(layer: Any) -> str:
    """Why a decoder layer cannot be fused at all; empty if it can."""
    family = family_of(layer)
    if family is None:
        return f"{type(layer).__name__} is none of {', '.join(DECODER_LAYERS)}"
    if "forward" in layer.__dict__:
        return "its forward is replaced (a model spread over devices has such hooks)"
    config = layer.self_attn.config
    hidden_act = getattr(config, family.activation[1], None)
    if activation_name(hidden_act or "") is None:
        return f"its activation is {hidden_act!r}"
    if getattr(config, "pretraining_tp", 1) != 1:
        return "pretraining_tp is not 1"
    if not getattr(layer.self_attn, "is_causal", True):
        return "its attention looks both ways"
    norms = {type(getattr(layer, name)).__name__ for name in family.all_norms}
    if any(not name.endswith("RMSNorm") for name in norms):
        return f"its norm is a {', '.join(sorted(norms))}"
    return ""


def why_stock_now(layer: Any) -> str:
    """Why this pass has to take the model's own code; empty if the fused layer can run."""
    attention, family = layer.self_attn, known_family(layer)
    if layer.training and attention.attention_dropout:
        return f"attention dropout is {attention.attention_dropout}"
    for name in family.children:
        child = getattr(layer, name)
        if "forward" in child.__dict__:
            return f"{name}.forward is replaced"
        watched = [*child._forward_hooks.values(), *child._forward_pre_hooks.values()]
        watched += [*child._backward_hooks.values(), *child._backward_pre_hooks.values()]
        if any(getattr(hook, "__module__", "") != _CAPTURING for hook in watched):
            return f"{name} has hooks"
    if any(type(norm).__name__ not in RMS_NORMS for norm in _norms_of(layer, family)):
        return "a norm was replaced"
    activation: Any = getattr(layer.mlp, family.activation[0])
    if type(activation) is not _activation_class(_hidden_act(layer, family)):
        return "the activation was replaced"
    if activation._forward_hooks or activation._forward_pre_hooks:
        return "the activation has hooks"
    for name in family.dropouts:
        dropout = getattr(layer, name)
        if type(dropout) is not torch.nn.Dropout or (dropout.training and dropout.p):
            return f"{name} drops a share of what is added"
    return ""


def watch_layer(layer: Any) -> Watch:
    """Watch everything that `why_stock_now` and `read_layer` follow from."""
    watch, family = Watch(), known_family(layer)
    attention, mlp = layer.self_attn, layer.mlp
    inside = layer.__dict__["_modules"]
    watch.attribute(layer, "training")
    watch.attribute(attention, "attention_dropout", "use_rope", "sliding_window", "config")
    watch.attribute(attention.config, family.activation[1], "sliding_window")
    if family.caps_scores:
        watch.attribute(attention, "attn_logit_softcapping")
    for name in family.children:
        watch.module(watch.item(inside, name))
    for name in family.dropouts:
        watch.attribute(inside[name], "training", "p")
    watch.module(watch.item(mlp.__dict__["_modules"], family.activation[0]))
    norms = [getattr(layer, name) for name in family.all_norms]
    for name in _HEAD_NORMS:
        norm = watch.item(attention.__dict__["_modules"], name)
        norms += [] if norm is None else [norm]
    for norm in norms:
        watch.module(norm)
        watch.parameters(norm)
        watch.attribute(norm, "variance_epsilon", "eps")
    for owner, names in family.linears.values():
        for name in names:
            watch_linear(watch.item(inside[owner].__dict__["_modules"], name), watch)
    return watch


def _norms_of(layer: Any, family: Family) -> list[Any]:
    """The norms of the layer and of its heads."""
    found = [getattr(layer, name) for name in family.all_norms]
    return found + [m for n in _HEAD_NORMS if (m := getattr(layer.self_attn, n, None)) is not None]


def _hidden_act(layer: Any, family: Family) -> str:
    found: str = getattr(layer.self_attn.config, family.activation[1])
    return found


@functools.cache
def _activation_class(hidden_act: str) -> Any:
    from transformers.activations import ACT2FN

    return type(ACT2FN[hidden_act])


def layer_linears(layer: Any) -> dict[str, list[LinearPart]]:
    """The layer's linears in the four groups that share an input."""
    return {
        group: [read_linear(name, getattr(getattr(layer, owner), name)) for name in names]
        for group, (owner, names) in known_family(layer).linears.items()
    }


def largest_linear_bytes(layer: Any) -> int:
    """Bytes of the layer's largest weight once it is decoded to 16 bit, with room for LoRA."""
    linears = [part for parts in layer_linears(layer).values() for part in parts]
    spare = PADDING["cuda"]
    return max(2 * part.out_features * (part.in_features + spare) for part in linears)


def read_layer(
    layer: Any,
    scratch: Scratch,
    max_weight_bytes: int | None = None,
    *,
    holds_gate_up: bool = True,
    held_number: int | None = None,
) -> LayerParts:
    """A decoder layer's parts as they are now.

    Args:
        max_weight_bytes: decode at most this much of a group at a time.
        holds_gate_up: give gate and up a buffer of their own, so that the backward pass decodes
            them once for both of their uses.
        held_number: the layer's number in `scratch.held`, if its decoded weights may stay.
    """
    attention, family = layer.self_attn, known_family(layer)
    found = layer_linears(layer)
    groups = {
        name: LinearGroup(
            linears,
            scratch,
            "weight_gate_up" if name == "gate_up" and holds_gate_up else "weight",
            max_weight_bytes,
            None if held_number is None else (held_number, name),
        )
        for name, linears in found.items()
    }
    head_dim = attention.head_dim
    q_heads = groups["o"].in_features // head_dim
    q_norm, k_norm = (getattr(attention, name, None) for name in _HEAD_NORMS)
    activation = activation_name(_hidden_act(layer, family))
    assert activation is not None
    norm1, norm2 = (_norm(getattr(layer, name)) for name in family.norms)
    branch_norms = [_norm(getattr(layer, name)) for name in family.branch_norms or ()]
    return LayerParts(
        **groups,
        norm1=norm1,
        norm2=norm2,
        q_heads=q_heads,
        kv_heads=(groups["qkv"].out_features // head_dim - q_heads) // 2,
        head_dim=head_dim,
        activation=activation,
        q_norm=None if q_norm is None else _norm(q_norm),
        k_norm=None if k_norm is None else _norm(k_norm),
        branch_norms=(branch_norms[0], branch_norms[1]) if branch_norms else None,
        uses_rope=bool(getattr(attention, "use_rope", True)),
        window=attention_window(attention),
        score_cap=attention.attn_logit_softcapping if family.caps_scores else None,
    )


def _norm(module: Any) -> Norm:
    eps_name, adds_one = norm_formula(module)
    return Norm(module.weight, getattr(module, eps_name), adds_one)


def attention_window(attention: Any) -> int | None:
    """Reach of sliding-window attention in tokens, or None."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    if type(attention).__name__ in ("MistralAttention", "Phi3Attention"):
        return getattr(attention.config, "sliding_window", None)
    return None
