"""The installed packages and the machine that tests of environment, doctor and install pretend."""

from __future__ import annotations

from colab_qlora.environment import Environment

# what Colab preinstalls, as far as the table asks
COLAB = {
    "torch": "2.11.0+cu128",
    "triton": "3.6.0",
    "numpy": "2.1.3",
    "safetensors": "0.8.0",
    "transformers": "5.15.0",
    "accelerate": "1.14.0",
    "peft": "0.20.0",
    "datasets": "4.0.0",
    "matplotlib": "3.10.0",
    "ipywidgets": "7.7.1",
    "torchao": "0.10.0",
}
# the same after the install stage
READY = {**COLAB, "bitsandbytes": "0.50.2", "trl": "0.29.1", "torchao": "0.16.0"}
T4 = Environment(
    platform="colab",
    os="Linux x86_64",
    python="3.13.15",
    cpu_count=2,
    host_total_gib=12.7,
    host_free_gib=11.0,
    disk_free_gib=60.0,
    torch_version="2.11.0+cu128",
    cuda_build="12.8",
    gpu_count=1,
    gpu_name="Tesla T4",
    compute_capability=(7, 5),
    gpu_total_gib=14.74,
    gpu_free_gib=14.6,
    compute_dtype="float16",
    bitsandbytes_cuda=("126", "128", "130"),
    torchao_minimum="0.16.0",
    versions={**READY, "torchao": None},
)
