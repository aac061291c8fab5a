"""Rates of named GPUs, for planning on a machine that has none of them.

H100: derived from steps of Llama-3-8B (2 x 2,048 tokens, rank 16) measured on 2026-11-24 with this
code, torch 2.11.0 and triton 3.6.0: 152 ms of GEMMs for the 114.3 TFLOP of all linears (163 less
what LoRA's narrow products and the gaps between kernels count for), 23 ms of attention for 7.7
TFLOP; copies at 51 and 55 GB/s, bitsandbytes' decoding at 1.95 TB/s, copies on the GPU at 3.02 TB/s
of which element-wise kernels are taken to reach 0.8; and from 53 ms of host time for the 16 layers
of Llama-3.2-1B.

The others: peak rates and bandwidths of NVIDIA's data sheets (T4: 65 TFLOP/s, 320 GB/s; L4: 121 and
300; A100: 312 and 1,555 or 2,039), and of them what such kernels usually reach: assumptions, until
somebody measures. A T4 with a long run clocks down; 25 to 40 TFLOP/s have been reported.
"""

from __future__ import annotations

from colab_qlora.activations.gpu_profile import GpuProfile

GIB = 2**30
_SHEET = "data sheet, rates assumed"

PROFILES = {
    "T4": GpuProfile(
        name="T4",
        source=_SHEET,
        capability=(7, 5),
        memory_bytes=int(14.74 * GIB),  # what torch sees of 16 GB
        host_bytes=7 * GIB,  # of Colab's 12.7 GB; the process has about 4
        gemm_flops_per_s=30e12,
        attention_flops_per_s=13e12,
        attention_backward_flops_per_s=9e12,
        move_bytes_per_s=260e9,
        decode_bytes_per_s=220e9,
        copy_down_bytes_per_s=11e9,  # PCIe 3.0, 16 lanes: 15.8 GB/s less what protocols take
        copy_up_bytes_per_s=11e9,
        layer_launch_s=6e-3,  # twice the H100's: Colab lends two slow cores
        step_launch_s=8e-3,
        attention="efficient",
        is_measured=False,
    ),
    "L4": GpuProfile(
        name="L4",
        source=_SHEET,
        capability=(8, 9),
        memory_bytes=int(22.1 * GIB),
        host_bytes=40 * GIB,
        gemm_flops_per_s=70e12,
        attention_flops_per_s=55e12,
        attention_backward_flops_per_s=40e12,
        move_bytes_per_s=240e9,
        decode_bytes_per_s=220e9,
        copy_down_bytes_per_s=20e9,  # PCIe 4.0, 16 lanes
        copy_up_bytes_per_s=20e9,
        layer_launch_s=5e-3,
        step_launch_s=6e-3,
        attention="flash",
        is_measured=False,
    ),
    "A100": GpuProfile(
        name="A100",
        source=_SHEET,
        capability=(8, 0),
        memory_bytes=int(39.5 * GIB),
        host_bytes=70 * GIB,
        gemm_flops_per_s=250e12,
        attention_flops_per_s=190e12,
        attention_backward_flops_per_s=140e12,
        move_bytes_per_s=1.25e12,
        decode_bytes_per_s=1.1e12,
        copy_down_bytes_per_s=22e9,  # PCIe 4.0, 16 lanes
        copy_up_bytes_per_s=22e9,
        layer_launch_s=5e-3,
        step_launch_s=6e-3,
        attention="flash",
        is_measured=False,
    ),
    "A100-80GB": GpuProfile(
        name="A100-80GB",
        source=_SHEET,
        capability=(8, 0),
        memory_bytes=int(79.2 * GIB),
        host_bytes=140 * GIB,
        gemm_flops_per_s=250e12,
        attention_flops_per_s=190e12,
        attention_backward_flops_per_s=140e12,
        move_bytes_per_s=1.6e12,
        decode_bytes_per_s=1.35e12,
        copy_down_bytes_per_s=22e9,
        copy_up_bytes_per_s=22e9,
        layer_launch_s=5e-3,
        step_launch_s=6e-3,
        attention="flash",
        is_measured=False,
    ),
    "H100": GpuProfile(
        name="H100",
        source="measured 2026-11-24 on an H100 80GB, torch 2.11.0",
        capability=(9, 0),
        memory_bytes=int(79.1 * GIB),
        host_bytes=100 * GIB,
        gemm_flops_per_s=750e12,
        attention_flops_per_s=450e12,
        attention_backward_flops_per_s=304e12,
        move_bytes_per_s=2.4e12,
        decode_bytes_per_s=1.95e12,
        copy_down_bytes_per_s=51e9,
        copy_up_bytes_per_s=55e9,
        layer_launch_s=3.1e-3,
        step_launch_s=3.7e-3,
        attention="cudnn",
        is_measured=True,
    ),
}
