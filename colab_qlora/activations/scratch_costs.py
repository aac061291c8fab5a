"""Bytes of the scratch memory that all layers share, and the chunks that the MLP works in."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from colab_qlora.activations.cost_settings import DEFAULT, CostSettings
from colab_qlora.activations.costs import HALVES, HEADS
from colab_qlora.activations.model_shape import ModelShape, Rank
from colab_qlora.layers.linear import LinearPart
from colab_qlora.layers.linear_group import PADDING
from colab_qlora.layers.saved import checked_plan
from colab_qlora.layers.span import spans_of

# models/fused_state.py: least tokens of a chunk of the MLP's backward pass
_LEAST_CHUNK_TOKENS = 2048


def mlp_chunks(
    plan: Collection[str], tokens: int, settings: CostSettings = DEFAULT
) -> tuple[int, int]:
    """Tokens that the MLP works on at a time, forward and backward: `FusedState.mlp_chunks`."""
    if settings.mlp_tokens is not None:
        return min(settings.mlp_tokens, tokens), min(settings.mlp_tokens, tokens)
    if checked_plan(plan) >= HALVES or settings.has_dropout:
        return tokens, tokens
    return tokens, min(max(_LEAST_CHUNK_TOKENS, -(-tokens // 2)), tokens)


def scratch_bytes(
    shape: ModelShape,
    tokens: int,
    rank: Rank,
    plans: Collection[Collection[str]],
    settings: CostSettings = DEFAULT,
) -> dict[str, int]:
    """Bytes of the slots of `layers.scratch.Scratch` after one training step, exactly.

    A slot has the size of the largest request of any layer, and stays. Batches with more tokens
    before this one leave it larger.

    Args:
        plans: names that layers keep; each different one once is enough.
    """
    slots: dict[str, int] = {}
    for plan in {checked_plan(plan) for plan in plans}:
        for slot, numbers in _slot_requests(shape, tokens, rank, plan, settings):
            if numbers:
                slots[slot] = max(slots.get(slot, 0), numbers * settings.itemsize)
    return slots


def _slot_requests(
    shape: ModelShape, tokens: int, rank: Rank, plan: frozenset[str], settings: CostSettings
) -> list[tuple[str, int]]:
    """Every (slot, numbers) that a layer with this plan asks for."""
    spare = {group: settings.spare(shape, rank, group) for group in shape.groups}
    forward, backward = mlp_chunks(plan, tokens, settings)
    chunk = max(forward, backward)
    found = [
        ("x", tokens * (shape.hidden + spare["qkv"])),
        ("x", tokens * (shape.query + spare["o"]) if spare["o"] else 0),
        ("x", chunk * (shape.hidden + spare["gate_up"])),
        ("d_o", tokens * (shape.hidden + spare["o"])),
        ("m", forward * (shape.intermediate + spare["down"]) if plan >= HALVES else 0),
    ]
    if shape.has_branch_norms:
        found.append(("d_branch", tokens * (shape.hidden + spare["o"])))
        found.append(("d_branch", backward * (shape.hidden + spare["down"])))
    for group, linears in shape.groups.items():
        slot = "weight_gate_up" if group == "gate_up" and settings.holds_gate_up else "weight"
        width = shape.linear(linears[0])[0] + spare[group]
        heights = _span_heights(shape, rank, group, plan, settings)
        found += [(slot, (height + spare[group]) * width) for height in heights]
        if _products_alone(group, plan):
            found.append(("lora_a", spare[group] * width))
    return found


def _products_alone(group: str, plan: frozenset[str]) -> bool:
    """True if the backward pass computes a group's products again, but none of its outputs."""
    outputs = {"qkv": HEADS, "o": {"h1"}, "gate_up": HALVES, "down": set()}[group]
    return f"xa_{group}" not in plan and plan >= outputs


def _span_heights(
    shape: ModelShape, rank: Rank, group: str, plan: frozenset[str], settings: CostSettings
) -> list[int]:
    """Rows of the weights that are decoded together, forward and when outputs are rebuilt."""
    sizes = [shape.linear(name) for name in shape.groups[group]]
    most = settings.max_weight_bytes
    if most is None and not plan >= HALVES and not settings.holds_gate_up:
        every = [shape.linear(name) for name in shape.linears]
        most = max(2 * outer * (inner + PADDING["cuda"]) for inner, outer in every)
    nothing = cast(Any, None)
    parts = [
        LinearPart(name, "nf4", outer, inner, nothing, None, nothing)
        for name, (inner, outer) in zip(shape.groups[group], sizes, strict=True)
    ]
    rows = [sum(outer for _, outer in sizes[:count]) for count in range(len(sizes) + 1)]
    row_bytes = (sizes[0][0] + settings.spare(shape, rank, group)) * settings.itemsize
    members = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(group, ())
    missing = frozenset(i for i, name in enumerate(members) if name not in plan)
    if len(parts) == 1 and missing:
        missing = frozenset({0})
    spans = [
        span for only in (None, missing) for span in spans_of(parts, rows, row_bytes, most, only)
    ]
    return [span.last_row - span.first_row for span in spans]
