"""The class that an RMSNorm's instance is given, so that one kernel computes it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from colab_qlora.kernels.rms_norm import rms_norm
from colab_qlora.models.fused_class import reduce_by

# modules of transformers that compute weight * x / rms(x), or with 1 + weight, in float32 inside:
# class -> (the attribute that is eps, whether 1 is added to the weight)
_PLAIN = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Granite", "Mixtral")
RMS_NORMS = {
    **{f"{name}RMSNorm": ("variance_epsilon", False) for name in _PLAIN},
    **{f"{name}RMSNorm": ("eps", True) for name in ("Gemma", "Gemma2", "Gemma3")},
}


def can_fuse_norm(module: Any) -> bool:
    kind = type(module)
    return (
        kind.__name__ in RMS_NORMS
        and kind.__module__.startswith("transformers.models.")
        and "forward" not in module.__dict__
    )


def norm_formula(module: Any) -> tuple[str, bool]:
    """The attribute that is a norm's eps, and whether 1 is added to its weight."""
    return RMS_NORMS[type(module).__name__]


@functools.cache
def fused_norm_class(stock: Any) -> Any:
    """The subclass of an RMSNorm whose forward and backward are one kernel each."""
    made: Any = type(
        stock.__name__, (stock,), {"__module__": stock.__module__, "_fused_norm": True}
    )
    made.forward = _forward
    made.__reduce_ex__ = reduce_by(fused_norm_class)
    return made


def is_fused_norm(module: Any) -> bool:
    return "_fused_norm" in type(module).__dict__


def _forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    device = hidden_states.device.type
    eps, adds_one = norm_formula(self)
    with torch.autocast(device, enabled=False), torch.cuda.device_of(hidden_states):
        return rms_norm(hidden_states, self.weight, getattr(self, eps), adds_one=adds_one)
