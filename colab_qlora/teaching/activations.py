"""How many bytes a Llama-like decoder layer keeps for its backward pass, by formula.

Stock path: transformers and PEFT with LoRA on all seven linear layers, float32 adapters under
half-precision autocast, scaled-dot-product attention without a padding mask, no dropout. Per token
and layer, with H hidden size, I intermediate size, Q = heads * head size, K = key/value heads *
head size, n heads, R the sum of the seven ranks, and b = 2 bytes a value (4 in float32):

    8 H                 the input of each RMSNorm in float32
    b * 2 H             the output of each RMSNorm, which q, k, v and gate, up share
    b * (2 Q + 2 K)     q, k, v and the attention's output
    b * 4 I             gate, silu(gate), up, and their product
    b * R               x A^T of each adapter
    4 n + 8             log-sum-exp of the attention, one float32 of each RMSNorm

For Llama-3-8B (H 4096, I 14336, Q 4096, K 1024, n 32, rank 16) that is 184,680 bytes, as table B2
of the project's notes on activations has it, and as torch.cuda.memory_allocated showed on an H100
in bfloat16. On a CPU under autocast PEFT does not see the autocast and makes float32 copies, so
that q, k, v, o, gate and up each save a cast of their own input, b * (3 H + Q) more: 217,448 bytes
(B2: 217,312, without log-sum-exp and the norms). A fused layer needs 94,568 at least.

More is kept where scaled-dot-product attention cannot use its lean kernels. Measured with
Llama-3-8B's shapes on an H100, 2 x 2048 tokens: with a padding mask 16,384 bytes more (keys and
values repeated for all heads, and a row of the mask). Without flash attention, as on a T4, and
without a mask, transformers asks for grouped key/value heads, which only the plain kernel has
there: 4 n T for the attention matrix and 36,736 more are kept (T tokens in a sequence), and the
backward pass takes about twice that again. The formula has none of this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from colab_qlora.errors import UserError


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a Llama-like model.

    Attributes:
        layers: number of decoder layers.
        hidden: width of the residual stream (H).
        intermediate: width inside the MLP (I).
        heads: query heads (n).
        query: heads times head size (Q).
        key_value: key/value heads times head size (K).
        vocabulary: number of logits for a token.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    query: int
    key_value: int
    vocabulary: int


def layer_shape(config: Any) -> LayerShape:
    """The sizes from a transformers config.

    Raises:
        UserError: the config lacks a size, so that the model is not Llama-like.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
    )
    missing = [name for name in names if not isinstance(getattr(config, name, None), int)]
    if missing:
        raise UserError(
            "the formula for activations needs a Llama-like model",
            got=f"{getattr(config, 'model_type', type(config).__name__)} without "
            f"{', '.join(missing)}",
            allowed="Llama, Mistral, Qwen, SmolLM2 and others of that shape",
            do="Call weight_parts(model) for what the weights occupy",
        )
    layers, hidden, intermediate, heads, vocabulary = (getattr(config, name) for name in names)
    head_size = getattr(config, "head_dim", None) or hidden // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    return LayerShape(
        layers,
        hidden,
        intermediate,
        heads,
        heads * head_size,
        key_value_heads * head_size,
        vocabulary,
    )


def layer_bytes_per_token(
    shape: LayerShape,
    rank_sum: int = 7 * 16,
    value_bytes: int = 2,
    separate_casts: bool = False,
) -> int:
    """Bytes that one layer keeps for its backward pass for one token; the formula is above.

    Args:
        shape: the model's sizes.
        rank_sum: sum of the ranks of one layer's adapters.
        value_bytes: 2 in float16 and bfloat16, 4 in float32.
        separate_casts: whether each linear layer casts its input for itself, as PEFT on a CPU under
            autocast does.

    Returns:
        Bytes per token and layer.

    Example:
        >>> layer_bytes_per_token(LayerShape(32, 4096, 14336, 32, 4096, 1024, 128256))
        184680
    """
    values = 2 * shape.hidden + 2 * (shape.query + shape.key_value) + 4 * shape.intermediate
    values += rank_sum
    if separate_casts:
        values += 3 * shape.hidden + shape.query
    return 8 * shape.hidden + value_bytes * values + 4 * shape.heads + 8


def layer_input_bytes_per_token(shape: LayerShape, value_bytes: int = 2) -> int:
    """Bytes that a checkpointed layer keeps for one token: its input, nothing else."""
    return value_bytes * shape.hidden


def other_bytes_per_token(
    shape: LayerShape, value_bytes: int = 2, checkpointing: bool = True
) -> int:
    """Bytes kept for one token outside the layers.

    The last RMSNorm keeps its input in float32 and its output, which the head reads. The
    embedding's output is a checkpointed layer's input already; otherwise it stays as well.
    """
    values = shape.hidden if checkpointing else 2 * shape.hidden
    return 4 * shape.hidden + 4 + value_bytes * values
