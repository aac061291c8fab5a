"""A step of AdamW over the LoRA matrices of a model, as four optimisers make it.

Such a step is bound by the host: hundreds of small tensors, each with launches of its own, or one
flat tensor. So a row has the time until `step()` returns, the time until the GPU is done, the GPU's
own work, and the number of launches. Every step finds new gradient tensors, as autograd leaves
them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_timing import Timer, profile_call
from colab_qlora.training.optimizer import FlatAdamW

# Llama 3 8B: outputs and inputs of the linears of a layer
LINEARS = (
    (4096, 4096),
    (1024, 4096),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (14336, 4096),
    (4096, 14336),
)
LINEARS_DRY = ((64, 64), (128, 64))
LAYERS, LAYERS_DRY = 32, 2
RANK = 16
STEPS, WARM_UPS = 10, 3
SETTINGS = {"lr": 2e-4, "weight_decay": 0.01}


def lora_parameters(device: torch.device, *, is_dry: bool) -> list[torch.nn.Parameter]:
    """A and B of every linear in float32: 448 matrices, 42 M numbers for the 8B."""
    linears = LINEARS_DRY if is_dry else LINEARS
    shapes = [shape for out, into in linears for shape in ((RANK, into), (out, RANK))]
    shapes *= LAYERS_DRY if is_dry else LAYERS
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02)
        for shape in shapes
    ]


def measure_optimizers(timer: Timer, *, is_dry: bool) -> list[dict[str, Any]]:
    """A row for each optimiser."""
    rows = []
    for name, make in _optimizers().items():
        if name == "torch.optim.AdamW fused" and not timer.is_gpu:
            continue
        rows.append({"optimizer": name} | _measure(make, timer, is_dry=is_dry))
    return rows


def _optimizers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    import bitsandbytes

    return {
        "FlatAdamW(bits=8)": lambda p: FlatAdamW(p, bits=8, **SETTINGS),
        "FlatAdamW(bits=32)": lambda p: FlatAdamW(p, bits=32, **SETTINGS),
        "bitsandbytes AdamW8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, **SETTINGS),
        "torch.optim.AdamW fused": lambda p: torch.optim.AdamW(p, fused=True, **SETTINGS),
    }


def _measure(
    make: Callable[[Any], torch.optim.Optimizer], timer: Timer, *, is_dry: bool
) -> dict[str, Any]:
    parameters = lora_parameters(timer.device, is_dry=is_dry)
    gradients = [torch.randn_like(parameter) * 1e-3 for parameter in parameters]
    optimizer = make(parameters)

    def renew() -> None:
        optimizer.zero_grad(set_to_none=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    host, wall = [], []
    for _ in range(WARM_UPS + (2 if is_dry else STEPS)):
        renew()
        host_ms, wall_ms = timer.host_and_wall_ms(optimizer.step)
        host.append(host_ms)
        wall.append(wall_ms)
    renew()
    # the step before the one that is recorded leaves its own gradients in place
    found = profile_call(lambda: (renew(), optimizer.step()), timer.device)
    return {
        "tensors": len(parameters),
        "numbers": sum(parameter.numel() for parameter in parameters),
        "host_ms": statistics.median(host[WARM_UPS:]),
        "wall_ms": statistics.median(wall[WARM_UPS:]),
        "gpu_ms": found.device_ms if found else None,
        "launches": found.launches if found else None,
        "copies": found.copies if found else None,
    }
