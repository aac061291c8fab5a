"""LoRA targets by the names that tutorials use, in models that have one linear for several of them.

Phi-3 and Phi-4 compute q, k and v by one linear, `qkv_proj`, and gate and up by another,
`gate_up_proj`. Each takes one adapter: its A is shared by what the linear computes, so at the same
r it has fewer parameters than three or two adapters of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

_TOGETHER = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_WHOLE = {part: whole for whole, parts in _TOGETHER.items() for part in parts}


def linear_names(model: Any) -> list[str]:
    """Full names of the linear layers that an adapter can be put on: all but the output head."""
    import torch

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def targets_of_model(
    wanted: Sequence[str], present: Collection[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """The targets by the model's own names, each once and in their order.

    Args:
        wanted: short or full names, such as "q_proj" or "model.layers.0.self_attn.q_proj".
        present: full names of the model's linears.

    Returns:
        The targets; and those of them that compute more than was asked for, with what was.

    Example:
        >>> targets_of_model(["q_proj", "o_proj"], ["self_attn.qkv_proj", "self_attn.o_proj"])
        (['qkv_proj', 'o_proj'], {'qkv_proj': ['q_proj']})
    """
    targets: dict[str, list[str]] = {}
    for name in wanted:
        owner, dot, short = name.rpartition(".")
        own = owner + dot + _WHOLE.get(short, short)
        # a name that is there stays, and so does an unknown one, which the caller will say
        if is_present(name, present) or not is_present(own, present):
            own = name
        targets.setdefault(own, []).append(name)
    beyond = {own: names for own, names in targets.items() if _asks_for_a_part(own, names)}
    return list(targets), beyond


def _asks_for_a_part(own: str, names: Sequence[str]) -> bool:
    parts = _TOGETHER.get(own.rpartition(".")[2], ())
    asked = {name.rpartition(".")[2] for name in names}
    return own not in names and not asked >= set(parts)


def is_present(name: str, present: Collection[str]) -> bool:
    """True if a linear has this full name, or one that ends in it."""
    return any(full == name or full.endswith("." + name) for full in present)
