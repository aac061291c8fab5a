"""Rotary positions in a GGUF file: the keys `rope.*`, and factors by which waves are lengthened.

llama.cpp stretches positions by `rope.scaling.*`. Llama 3's and LongRoPE's are tensors of factors,
float32, (rotated dimensions / 2,), by which it divides the frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from colab_qlora.errors import UserError

_ELSEWHERE = "Save the model with save_pretrained_merged"
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")


@dataclass(frozen=True)
class Rope:
    """One model's.

    Attributes:
        values: key without the architecture's prefix -> value.
        tensors: name in the file -> factors.
        notes: where llama.cpp differs, in words.
    """

    values: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_rope(config: Any, head_dim: int, kinds: tuple[str, ...]) -> Rope:
    """Read a config's positions; those of full attention, where layers differ.

    Args:
        config: of a transformers model.
        head_dim: dimensions of a head.
        kinds: values of rope_type that llama.cpp's architecture knows.

    Raises:
        UserError: another type.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope = dict(rope.get("full_attention") or rope)
    kind = rope.get("rope_type", rope.get("type", "default")) or "default"
    share = rope.get("partial_rotary_factor", 1.0) or 1.0
    rotated = int(head_dim * share)
    if kind not in kinds or (share != 1.0 and "longrope" not in kinds):
        raise UserError(
            "these rotary positions cannot be written as GGUF here",
            got=f"rope_type {kind!r}" + (f", of {share} of a head" if share != 1.0 else ""),
            allowed=", ".join(kinds),
            do=_ELSEWHERE,
        )
    base = float(rope.get("rope_theta", getattr(config, "rope_theta", None) or 10000.0))
    values: dict[str, Any] = {"rope.dimension_count": rotated, "rope.freq_base": base}
    if kind == "llama3":
        return Rope(values, {"rope_freqs.weight": llama3_factors(rope, base, rotated)})
    if kind == "longrope":
        return _longrope(rope, config, values)
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        values |= _yarn(rope, config.max_position_embeddings)
    return Rope(values)


def llama3_factors(rope: dict[str, Any], base: float, rotated: int) -> torch.Tensor:
    """float32, (rotated / 2,): by how much Llama 3.1 lengthens each wave.

    1 below `original / high_freq_factor` tokens, `factor` above `original / low_freq_factor`, and
    in between the harmonic mean that transformers' `_compute_llama3_parameters` takes.
    """
    factor, original = float(rope["factor"]), rope["original_max_position_embeddings"]
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    exponents = torch.arange(0, rotated, 2, dtype=torch.float64) / rotated
    waves = 2 * math.pi * base**exponents
    smooth = ((original / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _yarn(rope: dict[str, Any], positions: int) -> dict[str, Any]:
    others = set(rope) - {*_YARN, "rope_type", "type", "rope_theta", "partial_rotary_factor"}
    given = sorted(name for name in others if rope[name] is not None)
    if given and not (given == ["truncate"] and rope["truncate"]):
        raise UserError(
            "this form of YaRN cannot be written as GGUF here",
            got=", ".join(f"{name}={rope[name]}" for name in given),
            allowed=", ".join(_YARN),
            do=_ELSEWHERE,
        )
    factor = float(rope["factor"])
    original = rope.get("original_max_position_embeddings") or positions
    values: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(original),
    }
    for name in ("beta_fast", "beta_slow"):
        if rope.get(name) is not None:
            values[f"rope.scaling.yarn_{name}"] = float(rope[name])
    scale = rope.get("attention_factor")
    if scale is not None:
        # llama.cpp multiplies by YaRN's own temperature, which transformers replaces
        values["rope.scaling.attn_factor"] = float(scale) / (0.1 * math.log(factor) + 1.0)
    return values


def _longrope(rope: dict[str, Any], config: Any, values: dict[str, Any]) -> Rope:
    """Phi's: short factors up to the original length, long ones for a context beyond it."""
    original = int(
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )
    stretch = config.max_position_embeddings / original
    scale = rope.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    values = {
        **values,
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(scale),
    }
    tensors = {
        f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
        for kind in ("long", "short")
    }
    note = (
        f"LongRoPE: llama.cpp takes the long factors where its context is set beyond {original} "
        "tokens, transformers where the text is longer"
    )
    return Rope(values, tensors, [note])
