"""What a GGUF file says about a model's architecture, from its transformers config.

Keys and their meaning: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
What llama.cpp takes for granted of each architecture: its src/models/*.cpp
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.export.gguf_rope import read_rope

_STRETCHED = ("default", "linear", "yarn", "llama3")
_GELU = ("gelu_pytorch_tanh",)


@dataclass(frozen=True)
class Family:
    """What is the same for all models of one model_type.

    Attributes:
        name: gguf's name of the architecture.
        ropes: values of rope_type that it knows.
        activations: that it has.
        interleaves: heads are turned in pairs of rows that stand side by side.
        norm_offset: what transformers adds to the weights of norms when it runs.
        window_every: every layer but each of this number has a sliding window; 0 for none.
        needs_tied: the output head is the embedding.
        large_layers: layers of the size whose attention is scaled otherwise.
    """

    name: str
    ropes: tuple[str, ...] = _STRETCHED
    activations: tuple[str, ...] = ("silu", "swish")
    interleaves: bool = False
    norm_offset: float = 0.0
    window_every: int = 0
    needs_tied: bool = False
    large_layers: int = 0


# transformers' model_type -> family
FAMILIES = {
    "llama": Family("llama", interleaves=True),
    "mistral": Family("llama", interleaves=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3", ropes=("default", "longrope")),
    "gemma2": Family(
        "gemma2", ("default",), _GELU, norm_offset=1.0, window_every=2, needs_tied=True,
        large_layers=46,
    ),
    "gemma3_text": Family(
        "gemma3", ("default", "linear"), _GELU, norm_offset=1.0, window_every=6, large_layers=62
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One model's.

    Attributes:
        family: see there.
        layers, heads, key_value_heads: counts.
        values: key without the architecture's prefix -> number or text.
        tensors: further ones, float32, by their name in the file.
        notes: what the format cannot hold, in words.
    """

    family: Family
    layers: int
    heads: int
    key_value_heads: int
    values: dict[str, int | float | str]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.family.name

    def arrange(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """What a tensor, under its name in transformers, has to go through."""
        if self.family.interleaves:
            for part, heads in (("q_proj", self.heads), ("k_proj", self.key_value_heads)):
                if f".{part}." in name:
                    return lambda tensor: interleave_halves(tensor, heads)
        if self.family.norm_offset and name.endswith("norm.weight"):
            return lambda tensor: tensor + self.family.norm_offset
        return lambda tensor: tensor


def interleave_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head in the order 0, d/2, 1, d/2 + 1, ...

    transformers turns row i together with i + d/2, llama.cpp's Llama rows 2i and 2i + 1.

    Args:
        tensor: (heads * d, columns) or (heads * d,).
    """
    rows, rest = tensor.shape[0], tensor.shape[1:]
    halves = tensor.reshape(heads, 2, rows // heads // 2, *rest)
    return halves.transpose(1, 2).reshape(rows, *rest)


def read_architecture(config: Any, vocabulary: int, is_tied: bool) -> Architecture:
    """Read a config.

    Args:
        config: of a transformers model.
        vocabulary: rows of its embedding.
        is_tied: the output head is the embedding.

    Raises:
        UserError: an architecture that is not known here, or a model that llama.cpp's architecture
            of that name computes otherwise.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            "models of this architecture cannot be written as GGUF here",
            got=config.model_type,
            allowed=", ".join(FAMILIES),
            do="Save it with save_pretrained_merged, and convert that folder with llama.cpp's "
            "convert_hf_to_gguf.py",
        )
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    _check(family, config, head_dim, is_tied)
    rope = read_rope(config, head_dim, family.ropes)
    window, notes = _window(family, config)
    notes += rope.notes
    values: dict[str, int | float | str] = {
        "vocab_size": vocabulary,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **rope.values,
        **window,
    }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if family.window_every and getattr(config, name, None):
            values[name] = float(getattr(config, name))
    return Architecture(family, layers, heads, key_value_heads, values, rope.tensors, notes)


def _check(family: Family, config: Any, head_dim: int, is_tied: bool) -> None:
    """Refuse what llama.cpp's architecture has no key for, and computes in one way only."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    found: list[tuple[str, Any, Any]] = []
    if activation not in family.activations:
        found.append(("activation", activation, family.activations[0]))
    if family.needs_tied and not is_tied:
        found.append(("output head", "one of its own", "the embedding"))
    if family.window_every:
        large = config.num_hidden_layers == family.large_layers
        scaled = config.hidden_size // config.num_attention_heads if large else head_dim
        if not math.isclose(config.query_pre_attn_scalar, scaled):
            found.append(("query_pre_attn_scalar", config.query_pre_attn_scalar, scaled))
        every, numbers = family.window_every, range(config.num_hidden_layers)
        kinds = ["full" if number % every == every - 1 else "sliding" for number in numbers]
        if config.layer_types != [f"{kind}_attention" for kind in kinds]:
            found.append(("layer_types", config.layer_types, f"each {every}th layer full"))
        if getattr(config, "use_bidirectional_attention", None):
            found.append(("attention", "in both directions", "causal"))
    for what, got, allowed in found:
        raise UserError(
            f"llama.cpp's {family.name} has another {what}",
            got=got,
            allowed=allowed,
            do="Save the model with save_pretrained_merged",
        )


def _window(family: Family, config: Any) -> tuple[dict[str, int | float], list[str]]:
    """The keys of sliding windows, and what they cannot say."""
    window = getattr(config, "sliding_window", None)
    if family.window_every:
        values: dict[str, int | float] = {"attention.sliding_window": int(window or 0)}
        local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
        if local:
            values["rope.freq_base_swa"] = float(local["rope_theta"])
        return values, []
    # readers of Phi-3 look for the key, and 0 is none
    values = {"attention.sliding_window": 0} if family.name == "phi3" else {}
    kinds = getattr(config, "layer_types", None)
    is_used = kinds is None or "sliding_attention" in kinds
    if not window or not is_used or window >= config.max_position_embeddings:
        return values, []
    return values, [
        f"llama.cpp has no sliding window for {config.model_type}: beyond {window} tokens its "
        "attention reaches farther than transformers'"
    ]
