"""Machines of round numbers to plan for: arithmetic on them is the same wherever tests run."""

from __future__ import annotations

from colab_qlora.activations.gpu_profile import GpuProfile
from colab_qlora.activations.memory_plan import Machine
from colab_qlora.activations.model_shape import ModelShape

LLAMA_3_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128_256)
GIB = 2**30

LARGE = GpuProfile(
    name="large",
    source="round numbers",
    capability=(9, 0),
    memory_bytes=80 * GIB,
    host_bytes=64 * GIB,
    gemm_flops_per_s=700e12,
    attention_flops_per_s=450e12,
    attention_backward_flops_per_s=350e12,
    move_bytes_per_s=2.4e12,
    decode_bytes_per_s=2e12,
    copy_down_bytes_per_s=50e9,
    copy_up_bytes_per_s=50e9,
    layer_launch_s=4e-3,
    step_launch_s=5e-3,
    attention="cudnn",
    is_measured=True,
)
SMALL = GpuProfile(
    name="small",
    source="round numbers",
    capability=(7, 5),
    memory_bytes=15 * GIB,
    host_bytes=7 * GIB,
    gemm_flops_per_s=30e12,
    attention_flops_per_s=13e12,
    attention_backward_flops_per_s=9e12,
    move_bytes_per_s=260e9,
    decode_bytes_per_s=220e9,
    copy_down_bytes_per_s=10e9,
    copy_up_bytes_per_s=10e9,
    layer_launch_s=8e-3,
    step_launch_s=10e-3,
    attention="efficient",
    is_measured=False,
)


def machine(profile: GpuProfile, gib: float, host_gib: float = 0.0) -> Machine:
    return Machine(profile, int(gib * GIB), int(host_gib * GIB))
