"""What each tensor of a layer costs: bytes to keep it, FLOPs to compute it again.

Per token and layer, with the letters of `model_shape.py`, T tokens in a sequence, b bytes a number
(2 in half precision) and n query heads; Llama-3-8B at rank 16 and T = 2,048 on the right:

    h0, h1             b H each                      8,192 bytes     h1: 33.8 MFLOP
    q; k, v            b Q; b K each                 8,192; 2,048    33.8; 8.55 each
    o, lse             b Q, 4 n                      8,192, 128      2 T Q = 16.8
    gate, up           b I each                      28,672          118 each
    xa_*, rstd1, 2     b r for each adapter, 4 each  224, 8          1.25 together, 0

94,568 bytes; a layer's forward pass is 455.6 MFLOP (2 in out for each linear, 2 r (in + out) for
its adapter). These are the numbers of table B3 in the project's notes on activations.

Beside h0, a layer that norms its branches (Gemma) keeps down's output, b H: see `layers/saved.py`.
What is exact and what is estimated: `phase_costs.py`.

Everything here is arithmetic on Python integers; no tensor is made.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

from colab_qlora.activations.cost_settings import DEFAULT, CostSettings
from colab_qlora.activations.model_shape import (
    LINEARS,
    ModelShape,
    Rank,
    group_rank,
    ranks_of,
)
from colab_qlora.layers.saved import ALL_NAMES, BRANCH, checked_plan

HEADS, HALVES = frozenset({"q", "k", "v"}), frozenset({"gate", "up"})
_OF_NAME = dict(zip(("q", "k", "v", "gate", "up"), LINEARS[:3] + LINEARS[4:6], strict=True))


@dataclass(frozen=True)
class Kept:
    """One tensor that a layer can keep from its forward for its backward pass.

    Attributes:
        bytes: what keeping it costs, alone; see `held_bytes` for those that share memory.
        rebuild_flops: to compute it again from `needs`: GEMMs with the tensor's own adapter, or
            attention; element-wise work counts nothing. A product of its own for each adapter:
            `rebuild_flops` of this module has what the wide GEMMs really do, 1.4 % more for a
            layer of Llama-3-8B at rank 16, 6 % for k or v alone.
        rebuild_bytes_moved: element-wise traffic of that (norm, rotation, copies, attention's
            inputs and outputs), without GEMMs and decoding. An estimate: each tensor is read and
            written once; of a norm that several names need, each counts all.
        decoded_numbers: base weights that are decoded again; a number of NF4 in half precision
            moves 0.5159 + 2 bytes.
        needs: names that it is computed from; empty if it cannot be computed again.
        together: names that come out of the same work for nothing.
    """

    bytes: int
    rebuild_flops: int = 0
    rebuild_bytes_moved: int = 0
    decoded_numbers: int = 0
    needs: tuple[str, ...] = ()
    together: tuple[str, ...] = ()


def attention_flops(shape: ModelShape, tokens: int, seq_length: int) -> int:
    """FLOPs of causal attention forward: 2 T Q a token, less if a window is shorter than T.

    Half of what torch's counter says, which counts the masked half too. Kernels work in tiles, and
    so do up to (T + tile) / T of it: 6 % more at T = 2,048 and tiles of 128.
    """
    seen = min(shape.window or seq_length, seq_length)
    return 2 * shape.query * tokens * seen * (2 * seq_length - seen) // max(seq_length, 1)


def forward_flops(shape: ModelShape, tokens: int, seq_length: int, rank: Rank) -> dict[str, int]:
    """FLOPs of one layer's forward pass: "linears", "adapters" and "attention".

    Linears and adapters are exact for the model's own code: 2 in out and 2 r (in + out) a token.
    """
    ranks = ranks_of(rank, shape.linears)
    adapters = sum(2 * r * sum(shape.linear(name)) for name, r in ranks.items())
    return {
        "linears": 2 * tokens * shape.layer_weights,
        "adapters": tokens * adapters,
        "attention": attention_flops(shape, tokens, seq_length),
    }


def kept_costs(
    shape: ModelShape, tokens: int, seq_length: int, rank: Rank, itemsize: int = 2
) -> dict[str, Kept]:
    """The costs of every name in `layers.saved.ALL_NAMES`, and of others that a layer keeps.

    Args:
        tokens: of a micro-batch, all sequences together.
        seq_length: tokens in a sequence (T), or in the mean document of a packed batch.
        rank: of all adapters, or of each by the linear's name.
        itemsize: bytes of an activation; statistics take 4, or 8 beside 8.
    """
    key = rank if isinstance(rank, int) else tuple(sorted(rank.items()))
    return dict(_kept_costs(shape, tokens, seq_length, key, itemsize))


# a planner asks for the same few thousands of times
@functools.lru_cache(maxsize=64)
def _kept_costs(
    shape: ModelShape,
    tokens: int,
    seq_length: int,
    rank: int | tuple[tuple[str, int], ...],
    itemsize: int,
) -> dict[str, Kept]:
    layer = _Layer(shape, tokens, rank if isinstance(rank, int) else dict(rank), itemsize)
    attention = attention_flops(shape, tokens, seq_length)
    found = {**_attention_costs(layer, attention), **_mlp_costs(layer)}
    branch = {BRANCH: Kept(layer.row * shape.hidden)} if shape.has_branch_norms else {}
    return {name: found[name] for name in ALL_NAMES} | branch


@dataclass(frozen=True)
class _Layer:
    """One layer and a batch; `row` is the bytes of one column of an activation."""

    shape: ModelShape
    tokens: int
    rank: Rank
    itemsize: int

    @property
    def row(self) -> int:
        return self.tokens * self.itemsize

    @property
    def norm(self) -> int:
        """Bytes moved by a norm: its input read, its output written."""
        return 2 * self.row * self.shape.hidden

    @property
    def statistic(self) -> int:
        return self.tokens * CostSettings(itemsize=self.itemsize).statistic_bytes

    def linear(self, name: str, moved: int, needs: tuple[str, ...], *together: str) -> Kept:
        """The output of a linear with its adapter, or the share of one linear that has a name."""
        width, whole = self.shape.linear(name)[1], self.holding(name)
        (inner, outer), rank = self.shape.linear(whole), self.ranks[whole]
        flops = 2 * self.tokens * (inner * outer + rank * (inner + outer))
        return Kept(self.row * width, flops, moved, inner * outer, needs, together)

    @property
    def ranks(self) -> dict[str, int]:
        return ranks_of(self.rank, self.shape.linears)

    def holding(self, name: str) -> str:
        """The linear that computes what `name` does."""
        if name in self.shape.linears:
            return name
        return "qkv_proj" if name in LINEARS[:3] else "gate_up_proj"

    def beside(self, *names: str) -> tuple[str, ...]:
        """What of these comes out of the same linear."""
        return names if self.shape.has_fused_projections else ()

    def products(self, group: str, moved: int, needs: tuple[str, ...], *together: str) -> Kept:
        """X A^T of all adapters of a group."""
        width = self.shape.linear(self.shape.groups[group][0])[0]
        columns = group_rank(self.shape, self.rank, group)
        flops = 2 * self.tokens * width * columns
        return Kept(self.row * columns, flops, moved, 0, needs, together)


def _attention_costs(layer: _Layer, attention: int) -> dict[str, Kept]:
    shape, row, norm = layer.shape, layer.row, layer.norm
    query, key_value, lse = shape.query, shape.key_value, layer.statistic * shape.q_heads
    # where heads are normed, q and k are kept before that and turned in a copy
    turn = 0 if shape.has_head_norms else 2 * row
    moved = row * 2 * (query + key_value) + lse
    moved += 4 * row * (query + key_value) if shape.has_head_norms else 0
    heads, root, beside = ("q", "k", "v"), ("h0",), ("rstd1", "xa_qkv")
    return {
        "h0": Kept(row * shape.hidden),
        "rstd1": Kept(layer.statistic, 0, norm, needs=root),
        "xa_qkv": layer.products("qkv", norm, root, "rstd1"),
        "q": layer.linear("q_proj", norm + turn * query, root, *beside, *layer.beside("k", "v")),
        "k": layer.linear(
            "k_proj", norm + turn * key_value, root, *beside, *layer.beside("q", "v")
        ),
        "v": layer.linear("v_proj", norm, root, *beside, *layer.beside("q", "k")),
        "o": Kept(row * query, attention, moved, 0, heads, ("lse",)),
        "lse": Kept(lse, attention, moved, 0, heads, ("o",)),
        "xa_o": layer.products("o", 2 * row * query, ("o",)),
        "h1": layer.linear("o_proj", row * (2 * query + shape.hidden), ("h0", "o"), "xa_o"),
    }


def _mlp_costs(layer: _Layer) -> dict[str, Kept]:
    norm, root, beside = layer.norm, ("h1",), ("rstd2", "xa_gate_up")
    # without xa_down the gradients of the MLP's adapters need passes of their own
    passes = 5 * layer.row * layer.shape.intermediate
    return {
        "rstd2": Kept(layer.statistic, 0, norm, needs=root),
        "xa_gate_up": layer.products("gate_up", norm, root, "rstd2"),
        "gate": layer.linear("gate_proj", norm, root, *beside, *layer.beside("up")),
        "up": layer.linear("up_proj", norm, root, *beside, *layer.beside("gate")),
        "xa_down": layer.products("down", passes, ("gate", "up")),
    }


def stored_names(shape: ModelShape, plan: Collection[str]) -> frozenset[str]:
    """What a layer stores whose plan names these."""
    names = checked_plan(plan)
    return names | {BRANCH} if shape.has_branch_norms else names


def root_bytes(shape: ModelShape, tokens: int, itemsize: int) -> int:
    """Bytes of what a layer cannot compute again."""
    return tokens * itemsize * shape.hidden * (2 if shape.has_branch_norms else 1)


def held_bytes(
    shape: ModelShape,
    tokens: int,
    seq_length: int,
    rank: Rank,
    plan: Collection[str],
    settings: CostSettings = DEFAULT,
) -> int:
    """Bytes of memory that one layer's store keeps from being freed, exactly.

    The sum of the plan's `kept_costs`, and what is held beside them: q, k and v are columns of one
    buffer, so any of them holds all three; gate and up, if both are kept, are columns of one with
    spare columns; and the memory-efficient attention has rows of lse for a multiple of 32 tokens.
    """
    names = stored_names(shape, plan)
    costs = kept_costs(shape, tokens, seq_length, rank, settings.itemsize)
    total = sum(costs[name].bytes for name in names)
    row = tokens * settings.itemsize
    if names & HEADS:
        total += row * shape.qkv - sum(costs[name].bytes for name in names & HEADS)
    if names >= HALVES:
        total += row * mlp_spare(shape, rank, settings)
    if "lse" in names and settings.attention == "efficient" and seq_length:
        padded = tokens // seq_length * (-seq_length % 32)
        total += padded * shape.q_heads * settings.statistic_bytes
    return total


def mlp_spare(shape: ModelShape, rank: Rank, settings: CostSettings) -> int:
    return max(settings.spare(shape, rank, group) for group in ("gate_up", "down"))


def rebuild_flops(
    shape: ModelShape,
    tokens: int,
    seq_length: int,
    rank: Rank,
    plan: Collection[str],
    settings: CostSettings = DEFAULT,
) -> dict[str, int]:
    """FLOPs that one layer's backward pass spends on what the plan leaves out, as the code runs.

    Returns:
        "linears", exact: GEMMs with the spare columns beside them and the products that fill these,
        once for all names that share them; and "attention" as in `attention_flops`.
    """
    names = checked_plan(plan)
    hidden, query, wide = shape.hidden, shape.query, shape.intermediate
    spare = {group: settings.spare(shape, rank, group) for group in shape.groups}
    total = 0
    for group, members, width in (
        ("qkv", ("q", "k", "v"), hidden),
        ("gate_up", ("gate", "up"), hidden),
    ):
        gone = [name for name in members if name not in names]
        # one linear is computed whole or not at all
        again = members if gone and shape.has_fused_projections else gone
        missing = [shape.linear(_OF_NAME[name])[1] for name in again]
        if missing or f"xa_{group}" not in names:
            total += width * spare[group] + sum(missing) * (width + spare[group])
    if not names >= {"h1", "xa_o"}:
        total += query * spare["o"]
    if "h1" not in names:
        total += hidden * (query + spare["o"])
    if "xa_down" not in names:
        total += wide * spare["down"]
    is_kept = names >= {"o", "lse"}
    attention = 0 if is_kept else attention_flops(shape, tokens, seq_length)
    return {"linears": 2 * tokens * total, "attention": attention}
