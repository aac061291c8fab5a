"""The class that an RMSNorm's instance is given, so that one kernel computes it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from colab_qlora.kernels.rms_norm import rms_norm
from colab_qlora.models.fused_class import reduce_by

# modules of transformers that compute weight * x / rms(x), with float32 inside; Gemma's, say, adds
# 1 to the weight
RMS_NORMS = frozenset(
    f"{name}RMSNorm"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Granite", "Mixtral")
)


def can_fuse_norm(module: Any) -> bool:
    kind = type(module)
    return (
        kind.__name__ in RMS_NORMS
        and kind.__module__.startswith("transformers.models.")
        and "forward" not in module.__dict__
    )


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
    with torch.autocast(device, enabled=False), torch.cuda.device_of(hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
