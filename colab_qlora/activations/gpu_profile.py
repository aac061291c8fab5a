"""The rates and sizes of a GPU that plans are made for, recorded or measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colab_qlora.errors import UserError

if TYPE_CHECKING:
    from colab_qlora.activations.model_shape import ModelShape


@dataclass(frozen=True)
class GpuProfile:
    """What a GPU and its host can do.

    Attributes:
        name: "T4", or what torch calls the device.
        source: where the rates are from.
        capability: (major, minor).
        memory_bytes: what a process can have at most.
        host_bytes: host memory that can be pinned.
        gemm_flops_per_s: half-precision GEMMs of a layer's size.
        attention_flops_per_s: causal attention forward, of 2 T Q FLOPs a token.
        attention_backward_flops_per_s: backward, of 2.5 times as many.
        move_bytes_per_s: element-wise kernels, read and written.
        decode_bytes_per_s: NF4 decoding, read and written.
        copy_down_bytes_per_s, copy_up_bytes_per_s: between GPU and pinned host memory.
        layer_launch_s: what the host needs to start a layer's kernels, forward and backward.
        step_launch_s: the same for all else in a step.
        attention: backend of dense causal attention, a name of `kernels.attention_choice`.
        is_measured: whether the rates were measured on such a GPU.
    """

    name: str
    source: str
    capability: tuple[int, int]
    memory_bytes: int
    host_bytes: int
    gemm_flops_per_s: float
    attention_flops_per_s: float
    attention_backward_flops_per_s: float
    move_bytes_per_s: float
    decode_bytes_per_s: float
    copy_down_bytes_per_s: float
    copy_up_bytes_per_s: float
    layer_launch_s: float
    step_launch_s: float
    attention: str
    is_measured: bool


def profile_named(name: str) -> GpuProfile:
    """A recorded profile: "T4", "L4", "A100", "H100", also as the driver calls them.

    Raises:
        UserError: no such record.
    """
    from colab_qlora.activations.recorded_profiles import PROFILES

    words = set(re.split(r"[^a-z0-9]+", str(name).lower()))
    key = next((key for key in PROFILES if key.lower() in words), None)
    if key == "A100" and "80gb" in words:
        key = "A100-80GB"
    if key is None:
        raise UserError(
            "no rates are recorded for this GPU",
            got=repr(name),
            allowed=", ".join(PROFILES),
            do="Name the one that is nearest, or run on the GPU itself, which is then measured",
        )
    return PROFILES[key]


def profile_of_this_machine(shape: ModelShape, tokens: int, seq_length: int) -> GpuProfile:
    """The rates of this machine's GPU at a model's sizes: measured once (about 2 s), then kept.

    Raises:
        UserError: there is no GPU.
    """
    import torch

    from colab_qlora.activations.profile_cache import cached_profile

    if not torch.cuda.is_available():
        raise UserError(
            "this machine has no GPU to measure", do='Name one: gpu="T4", "L4", "A100" or "H100"'
        )
    return cached_profile(shape, tokens, seq_length)
