"""What a decoder layer is made of, and what one pass through it needs besides its input."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from colab_qlora.kernels.attention import AttentionShape
from colab_qlora.layers.linear_group import GroupCall, LinearGroup
from colab_qlora.layers.scratch import Scratch


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: weight (width,), the eps under its root, and whether it has 1 + weight."""

    weight: torch.nn.Parameter
    eps: float
    adds_one: bool = False


@dataclass(frozen=True)
class LayerParts:
    """The weights of one decoder layer in one pass, and the sizes that follow from its config.

    Attributes:
        qkv, o, gate_up, down: the four groups of linears that share an input.
        norm1, norm2: before the attention and before the MLP.
        q_norm, k_norm: per-head norms between projection and rotation (Qwen3, Gemma 3), else None.
        branch_norms: of what the attention half and the MLP half add to the residual stream
            (Gemma 2 and 3), else None.
        activation: of the gated MLP, a name of `kernels.swiglu`.
        uses_rope: False in layers without positions (some of SmolLM3's).
        window: reach of sliding-window attention in tokens, or None.
        score_cap: attention scores s become cap tanh(s / cap) (Gemma 2), or None.
    """

    qkv: LinearGroup
    o: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    norm1: Norm
    norm2: Norm
    q_heads: int
    kv_heads: int
    head_dim: int
    activation: str
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    branch_norms: tuple[Norm, Norm] | None = None
    uses_rope: bool = True
    window: int | None = None
    score_cap: float | None = None

    def groups(self) -> tuple[LinearGroup, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def norms(self) -> list[Norm]:
        found = (self.norm1, self.norm2, self.q_norm, self.k_norm, *(self.branch_norms or ()))
        return [norm for norm in found if norm is not None]

    def trainable(self) -> list[torch.nn.Parameter]:
        """All parameters that a gradient is returned for, in a fixed order, each once."""
        return self._trainable

    @functools.cached_property
    def draws_in_mlp(self) -> bool:
        """True if random numbers may be drawn in the MLP half."""
        return any(
            group.has_modules or any(block.dropout for _, _, block in group.blocks)
            for group in (self.gate_up, self.down)
        )

    @functools.cached_property
    def mlp_is_plain(self) -> bool:
        """True if each linear of the MLP has one adapter, which learns, and nothing draws."""
        groups = (self.gate_up, self.down)
        blocks = [entry for group in groups for entry in group.blocks]
        one_each = [index for group in groups for index in range(len(group.parts))]
        return (
            not self.draws_in_mlp
            and [index for index, _, _ in blocks] == one_each
            and all(b.a.requires_grad and b.b.requires_grad for _, _, b in blocks)
        )

    @functools.cached_property
    def _trainable(self) -> list[torch.nn.Parameter]:
        found = [n.weight for n in self.norms() if n.weight.requires_grad]
        for group in self.groups():
            found += group.trainable()
        return list({id(p): p for p in found}.values())


class MlpChunks(NamedTuple):
    """Most tokens that the MLP half works on at a time, forward and backward; None: all."""

    forward: int | None = None
    backward: int | None = None


@dataclass
class Pass:
    """One forward pass and its backward pass through one layer.

    Attributes:
        attention: shapes, documents and mask of the batch.
        cos, sin: rotation tables (positions, head_dim); positions divide the tokens.
        lead: leading shape of the hidden states, (batch, length).
        autocast: whether the caller runs under autocast, and its dtype.
        backend: the attention that runs, chosen at the first call and kept for the backward pass.
        mlp_chunks: how many tokens the MLP half works on at a time.
        calls: what each group has to remember.
    """

    attention: AttentionShape
    cos: torch.Tensor
    sin: torch.Tensor
    lead: tuple[int, ...]
    scratch: Scratch
    autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)
    mlp_chunks: MlpChunks = MlpChunks()
    backend: str | None = None
    calls: dict[str, GroupCall] = field(default_factory=dict)

    def call(self, name: str) -> GroupCall:
        return self.calls.setdefault(name, GroupCall(self.autocast))


def token_chunks(tokens: int, most: int | None) -> list[slice]:
    """Slices of at most so many tokens that cover all; at least one, also of an empty batch."""
    size = min(most or tokens, tokens) or 1
    return [slice(i, min(i + size, tokens)) for i in range(0, max(tokens, 1), size)]
