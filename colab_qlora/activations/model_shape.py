"""The sizes of a model that its costs follow from, and the sizes of its linears and adapters.

Letters, as in `layers/saved.py`: H hidden size, I intermediate size, Q = query heads * head size,
K = key/value heads * head size, V vocabulary, r rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colab_qlora.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# linears that read the same input are one GEMM: see `layers/linear_group.py`
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
LINEARS = tuple(name for names in GROUPS.values() for name in names)

# one rank for all seven linears, or a rank for each linear that has an adapter
Rank = int | Mapping[str, int]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like model.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream (H).
        intermediate: width inside the MLP (I).
        q_heads, kv_heads: heads of the queries, and of the keys and values.
        head_dim: numbers in a head.
        vocab: logits of a token (V).
        is_tied: the head's weight is the embedding's.
        has_qkv_bias, has_o_bias, has_mlp_bias: which linears have biases.
        has_head_norms: every head of q and k is normed before the rotation (Qwen3).
        window: reach of sliding-window attention of all layers, in tokens; None: no bound. Models
            that mix both kinds of layers count as unbounded.
    """

    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool = False
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    has_head_norms: bool = False
    window: int | None = None

    @property
    def query(self) -> int:
        """Q, numbers of all query heads of a token."""
        return self.q_heads * self.head_dim

    @property
    def key_value(self) -> int:
        """K, numbers of all key heads of a token; the values have as many."""
        return self.kv_heads * self.head_dim

    @property
    def qkv(self) -> int:
        """Q + 2 K, the width of the buffer that q, k and v are columns of."""
        return self.query + 2 * self.key_value

    def linear(self, name: str) -> tuple[int, int]:
        """(in_features, out_features) of a linear, by one of `LINEARS`."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key_value),
            "v_proj": (self.hidden, self.key_value),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[name]

    @property
    def layer_weights(self) -> int:
        """Numbers in the seven linears of one layer, without biases."""
        return sum(i * o for i, o in map(self.linear, LINEARS))


def shape_of(config: Any) -> ModelShape:
    """The sizes from a transformers config of Llama, Mistral, Qwen2, Qwen3 or SmolLM3.

    Raises:
        UserError: another family, or a field that is missing or not a positive integer.
    """
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise UserError(
            "model_type of the config is not one whose costs are known",
            got=repr(family),
            allowed=", ".join(FAMILIES),
        )
    q_heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    has_bias = bool(getattr(config, "attention_bias", False)) and family != "mistral"
    return ModelShape(
        layers=_size(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_size(config, "intermediate_size"),
        q_heads=q_heads,
        kv_heads=_size(config, "num_key_value_heads", q_heads),
        head_dim=_size(config, "head_dim", hidden // q_heads),
        vocab=_size(config, "vocab_size"),
        is_tied=bool(getattr(config, "tie_word_embeddings", False)),
        has_qkv_bias=has_bias or family == "qwen2",
        has_o_bias=has_bias and family != "qwen2",
        has_mlp_bias=bool(getattr(config, "mlp_bias", False)) and family in ("llama", "smollm3"),
        has_head_norms=family == "qwen3",
        window=getattr(config, "sliding_window", None) if family == "mistral" else None,
    )


def _size(config: Any, name: str, default: int | None = None) -> int:
    value = getattr(config, name, None)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"{name} of the config is not a size", got=repr(value), allowed="an integer from 1 up"
        )
    return value


def ranks_of(rank: Rank) -> dict[str, int]:
    """The rank of every linear's adapter; 0 where there is none.

    Raises:
        UserError: a name that is no linear of a layer, or a negative rank.
    """
    ranks = dict.fromkeys(LINEARS, rank) if isinstance(rank, int) else dict(rank)
    for name, value in ranks.items():
        if name not in LINEARS or value < 0:
            raise UserError(
                "rank is not understood",
                got=f"{name}: {value}",
                allowed=f"0 or more, for {', '.join(LINEARS)}",
            )
    return {name: ranks.get(name, 0) for name in LINEARS}


def group_rank(rank: Rank, group: str) -> int:
    """Ranks of all adapters of one of `GROUPS` together."""
    ranks = ranks_of(rank)
    return sum(ranks[name] for name in GROUPS[group])


def adapter_sizes(shape: ModelShape, rank: Rank) -> list[int]:
    """Numbers in each adapter matrix, A and B of all seven linears, of one layer."""
    ranks = ranks_of(rank)
    return [ranks[name] * size for name in LINEARS for size in shape.linear(name) if ranks[name]]
