"""The sizes of a model that its costs follow from, and the sizes of its linears and adapters.

Letters, as in `layers/saved.py`: H hidden size, I intermediate size, Q = query heads * head size,
K = key/value heads * head size, V vocabulary, r rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from colab_qlora.errors import UserError

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3"),
    *("gemma2", "gemma3_text"),
)
# linears that read the same input are one GEMM: see `layers/linear_group.py`
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
LINEARS = tuple(name for names in GROUPS.values() for name in names)
# Phi-3 has one linear, and one adapter, where others have three or two
FUSED_GROUPS = {**GROUPS, "qkv": ("qkv_proj",), "gate_up": ("gate_up_proj",)}
ALL_LINEARS = (*LINEARS, "qkv_proj", "gate_up_proj")

# one rank for all linears, or a rank for each linear that has an adapter
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
        has_head_norms: every head of q and k is normed before the rotation (Qwen3, Gemma 3).
        window: reach of sliding-window attention of all layers, in tokens; None: no bound. Models
            that mix both kinds of layers count as unbounded.
        has_fused_projections: q, k and v are one linear, gate and up another (Phi-3).
        rotary_dim: numbers of a head that turn with its position; None: all.
        rotations: tables of positions, one for each kind of layer (Gemma 3 has two).
        has_branch_norms: what attention and MLP compute is normed before it is added (Gemma 2, 3).
        has_score_cap: attention scores are bounded by a tanh (Gemma 2).
        local_window: reach of every other layer's attention, in tokens, where scores are bounded.
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
    has_fused_projections: bool = False
    rotary_dim: int | None = None
    rotations: int = 1
    has_branch_norms: bool = False
    has_score_cap: bool = False
    local_window: int | None = None

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The linears that share an input."""
        return FUSED_GROUPS if self.has_fused_projections else GROUPS

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of a layer."""
        return tuple(name for names in self.groups.values() for name in names)

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
        """(in_features, out_features) of a linear, by one of `ALL_LINEARS`.

        Where q, k and v (gate and up) are one linear, their own names mean their share of it.
        """
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key_value),
            "v_proj": (self.hidden, self.key_value),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
            "qkv_proj": (self.hidden, self.qkv),
            "gate_up_proj": (self.hidden, 2 * self.intermediate),
        }[name]

    @property
    def layer_weights(self) -> int:
        """Numbers in the linears of one layer, without biases."""
        return sum(i * o for i, o in map(self.linear, self.linears))


def shape_of(config: Any) -> ModelShape:
    """The sizes from a transformers config of one of `FAMILIES`.

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
    has_bias = bool(getattr(config, "attention_bias", False)) and family not in ("mistral", "phi3")
    head_dim = _size(config, "head_dim", hidden // q_heads)
    return ModelShape(
        layers=_size(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_size(config, "intermediate_size"),
        q_heads=q_heads,
        kv_heads=_size(config, "num_key_value_heads", q_heads),
        head_dim=head_dim,
        vocab=_size(config, "vocab_size"),
        is_tied=bool(getattr(config, "tie_word_embeddings", False)),
        has_qkv_bias=has_bias or family == "qwen2",
        has_o_bias=has_bias and family != "qwen2",
        has_mlp_bias=bool(getattr(config, "mlp_bias", False)) and family in ("llama", "smollm3"),
        has_head_norms=family in ("qwen3", "gemma3_text"),
        window=getattr(config, "sliding_window", None) if family in ("mistral", "phi3") else None,
        has_fused_projections=family == "phi3",
        rotary_dim=_rotary_dim(config, head_dim) if family == "phi3" else None,
        rotations=len(set(config.layer_types)) if family == "gemma3_text" else 1,
        has_branch_norms=family in ("gemma2", "gemma3_text"),
        has_score_cap=family == "gemma2" and config.attn_logit_softcapping is not None,
        local_window=config.sliding_window if family == "gemma2" else None,
    )


def _rotary_dim(config: Any, head_dim: int) -> int | None:
    rope = getattr(config, "rope_parameters", None) or {}
    turning = int(head_dim * float(rope.get("partial_rotary_factor", 1.0)))
    return None if turning == head_dim else turning


def _size(config: Any, name: str, default: int | None = None) -> int:
    value = getattr(config, name, None)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"{name} of the config is not a size", got=repr(value), allowed="an integer from 1 up"
        )
    return value


def ranks_of(rank: Rank, linears: Collection[str] = LINEARS) -> dict[str, int]:
    """The rank of every linear's adapter; 0 where there is none.

    Args:
        rank: one for all, or one for each name.
        linears: the names that a layer has, `ModelShape.linears`.

    Raises:
        UserError: a name that is no linear of a layer, or a negative rank.
    """
    ranks = dict.fromkeys(linears, rank) if isinstance(rank, int) else dict(rank)
    for name, value in ranks.items():
        if name not in linears or value < 0:
            raise UserError(
                "rank is not understood",
                got=f"{name}: {value}",
                allowed=f"0 or more, for {', '.join(linears)}",
            )
    return {name: ranks.get(name, 0) for name in linears}


def group_rank(shape: ModelShape, rank: Rank, group: str) -> int:
    """Ranks of all adapters of one of `ModelShape.groups` together."""
    ranks = ranks_of(rank, shape.linears)
    return sum(ranks[name] for name in shape.groups[group])


def adapter_sizes(shape: ModelShape, rank: Rank) -> list[int]:
    """Numbers in each adapter matrix, A and B of all linears, of one layer."""
    ranks = ranks_of(rank, shape.linears)
    return [r * size for name, r in ranks.items() for size in shape.linear(name) if r]
