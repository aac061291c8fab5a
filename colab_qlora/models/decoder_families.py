"""The families whose decoder layers can be fused, and where each keeps its parts.

    Llama (2, 3, 3.1, 3.2), Mistral, SmolLM2 (a Llama); Qwen2 and 2.5 (biases on q, k, v)
    Qwen3       a norm on every head of q and k
    SmolLM3     layers without positions
    Phi-3, 4    q, k and v are one linear, gate and up another; in Phi-4-mini a part of each head
                turns with its position
    Gemma 2     norms multiply by 1 + weight; what attention and MLP compute is normed once more
                before it joins the residual stream; GEGLU; attention scores bounded by a tanh
    Gemma 3     as Gemma 2 without the bound, with norms on the heads of q and k, and a table of
                positions for each of its two kinds of layers

Everything here is read from transformers' modules by name, so that nothing is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# the four groups of linears that share an input, and whose children they are
_SEPARATE = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}
_TOGETHER = {
    **_SEPARATE,
    "qkv": ("self_attn", ("qkv_proj",)),
    "gate_up": ("mlp", ("gate_up_proj",)),
}


@dataclass(frozen=True)
class Family:
    """Names within a decoder layer.

    Attributes:
        module: of `transformers.models`, that the layer must come from: a class of the same name
            elsewhere may compute something else.
        linears: group -> (owner, children), see `LayerParts`.
        norms: before the attention and before the MLP.
        branch_norms: after the attention and after the MLP, or none.
        activation: the MLP's module, and the field of the config that names it.
        dropouts: modules that drop a share of what a half adds.
        caps_scores: the attention bounds its scores by the config's attn_logit_softcapping.
    """

    module: str
    linears: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=lambda: _SEPARATE)
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    branch_norms: tuple[str, str] | None = None
    activation: tuple[str, str] = ("act_fn", "hidden_act")
    dropouts: tuple[str, ...] = ()
    caps_scores: bool = False

    @property
    def all_norms(self) -> tuple[str, ...]:
        return (*self.norms, *(self.branch_norms or ()))

    @property
    def children(self) -> tuple[str, ...]:
        """Everything that the layer's own forward calls."""
        return ("self_attn", "mlp", *self.all_norms, *self.dropouts)


_GEMMA: dict[str, Any] = {
    "norms": ("input_layernorm", "pre_feedforward_layernorm"),
    "branch_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "activation": ("act_fn", "hidden_activation"),
}

# class name of the decoder layer -> its family
DECODER_LAYERS = {
    "LlamaDecoderLayer": Family("llama"),
    "MistralDecoderLayer": Family("mistral"),
    "Qwen2DecoderLayer": Family("qwen2"),
    "Qwen3DecoderLayer": Family("qwen3"),
    "SmolLM3DecoderLayer": Family("smollm3"),
    "Phi3DecoderLayer": Family(
        "phi3",
        linears=_TOGETHER,
        activation=("activation_fn", "hidden_act"),
        dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
    ),
    "Gemma2DecoderLayer": Family("gemma2", **_GEMMA, caps_scores=True),
    "Gemma3DecoderLayer": Family("gemma3", **_GEMMA),
}


def family_of(layer: Any) -> Family | None:
    """The family of a decoder layer, fused or not; None if there is none."""
    kind: Any = type(layer)
    return _family_of_class(kind)


# asked at every pass of every layer
@functools.cache
def _family_of_class(layer_class: Any) -> Family | None:
    # fused, it is a subclass with that word before its name, said to be of the same module
    family = DECODER_LAYERS.get(layer_class.__name__.removeprefix("Fused"))
    if family is None:
        return None
    home = f"transformers.models.{family.module}.modeling_{family.module}"
    return family if layer_class.__module__ == home else None


def known_family(layer: Any) -> Family:
    """The family of a layer that has one."""
    family = family_of(layer)
    assert family is not None
    return family
