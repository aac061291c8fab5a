"""Time training steps of one loaded implementation: forward, backward, optimiser.

The host's time is that until the step is queued. Where an implementation waits for the GPU in
between, that wait is in it: the kit's loss reads once how many rows are labelled, when the forward
pass of the layers is queued, so its host time holds the GPU's forward pass.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_timing import Profile, profile_call, synchronize
from benchmarks.train_step_models import IMPLEMENTATIONS, Request, make_optimizer

# what a Colab T4 shows
T4_GIB = 14.74
# token ids from here on are words in every checkpoint that random_model.py writes
FIRST_WORD = 3
KERNELS_SHOWN = 16


def imitate_t4() -> None:
    """Cap the memory and switch off the attention kernels that a T4 does not have."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, T4_GIB * 2**30 / total))
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def measure_implementation(
    name: str,
    request: Request,
    optimizer_name: str,
    shapes: list[tuple[int, int]],
    steps: tuple[int, int],
    take: Callable[[dict[str, Any]], None],
    *,
    shows_kernels: bool = False,
) -> None:
    """Load `name` and hand over a row for each (batch, length) of `shapes`.

    Args:
        name: a key of `IMPLEMENTATIONS`.
        request: what to load.
        optimizer_name: "flat" or "bnb".
        shapes: rows and tokens a row of each batch.
        steps: warm-up steps, and steps that count.
        take: given each row.
        shows_kernels: put the GPU's longest kernels into the rows.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, optimizer, about = _load(name, request, optimizer_name, device)
    is_profiled = False
    for batch, length in shapes:
        row = {**about, "shape": f"{batch}x{length}"}
        step = make_step(model, optimizer, (batch, length), device)
        found = time_unless_full(step, steps, batch * length, device)
        row |= found or {}
        # as many launches for every shape, and a profile of 8B takes seconds to read
        if found and (shows_kernels or not is_profiled):
            row |= _look_inside(step, model, device, shows_kernels)
            is_profiled = True
        row |= {"out_of_memory": found is None, "stock_passes": _stock_passes(model)}
        take(row | {"is_recorded": is_recorded(model)})
        optimizer.zero_grad(set_to_none=True)
        free_memory(model, device)


def _load(
    name: str, request: Request, optimizer_name: str, device: torch.device
) -> tuple[Any, torch.optim.Optimizer, dict[str, Any]]:
    """Model, optimiser, and what all rows of an implementation have in common."""
    began = time.perf_counter()
    if name.startswith("unsloth"):
        import unsloth  # noqa: F401  # it wants to be imported before transformers
    model = IMPLEMENTATIONS[name](request).train()
    optimizer = make_optimizer(optimizer_name, model)
    synchronize(device)
    about = {
        "implementation": name,
        "optimizer": optimizer_name,
        "dtype": str(request.dtype).removeprefix("torch."),
        "is_lean": request.is_lean,
        "load_s": time.perf_counter() - began,
        "base_gib": _gib(torch.cuda.memory_allocated()) if device.type == "cuda" else None,
    }
    return model, optimizer, about


def make_step(
    model: Any, optimizer: Any, shape: tuple[int, int], device: torch.device
) -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    words = model.config.vocab_size

    def step() -> torch.Tensor:
        ids = torch.randint(FIRST_WORD, words, shape, device=device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def time_unless_full(
    step: Callable[[], torch.Tensor],
    steps: tuple[int, int],
    tokens: int,
    device: torch.device,
) -> dict[str, Any] | None:
    """None if it ran out of memory. Nothing of the error is kept: it would hold the tensors."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return _time_steps(step, steps, tokens, device)
    return None


def _time_steps(
    step: Callable[[], torch.Tensor],
    steps: tuple[int, int],
    tokens: int,
    device: torch.device,
) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    walls, hosts, losses = [], [], []
    for _ in range(sum(steps)):
        synchronize(device)
        began = time.perf_counter()
        losses.append(step())
        hosts.append(time.perf_counter() - began)
        synchronize(device)
        walls.append(time.perf_counter() - began)
    counted = walls[steps[0] :]
    median = statistics.median(counted)
    peaks = {"peak_gib": None, "reserved_gib": None}
    if device.type == "cuda":
        peaks["peak_gib"] = _gib(torch.cuda.max_memory_allocated())
        peaks["reserved_gib"] = _gib(torch.cuda.max_memory_reserved())
    return {
        "step_ms": median * 1e3,
        "fastest_ms": min(counted) * 1e3,
        "slowest_ms": max(counted) * 1e3,
        "tokens_per_s": tokens / median,
        "host_ms": statistics.median(hosts[steps[0] :]) * 1e3,
        "first_step_s": walls[0],
        **peaks,
        "loss": float(losses[-1]),
        "host_gib": _host_gib(),
    }


def _look_inside(
    step: Callable[[], torch.Tensor], model: Any, device: torch.device, shows_kernels: bool
) -> dict[str, Any]:
    found: Profile | None = None
    with contextlib.suppress(torch.OutOfMemoryError):
        found = profile_call(step, device)
    if found is None:
        return {}
    row: dict[str, Any] = {
        "launches_per_layer": found.launches / model.config.num_hidden_layers,
        "device_ms": found.device_ms,
    }
    if shows_kernels:
        row["kernels"] = found.kernels[:KERNELS_SHOWN]
    return row


def _stock_passes(model: Any) -> dict[str, int]:
    """Why layers of ours ran the model's own code, if any did: then the time is not ours."""
    state = _state(model)
    return dict(state.stock_passes) if state else {}


def is_recorded(model: Any) -> bool:
    """True if layers of ours run as CUDA graphs now."""
    state = _state(model)
    return bool(state and state.graphs.shapes)


def free_memory(model: Any, device: torch.device) -> None:
    state = _state(model)
    if state is not None:
        state.free()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _state(model: Any) -> Any:
    """What the fused layers of ours share; None for the others, which never import the kit."""
    fuse = sys.modules.get("colab_qlora.models.fuse")
    return fuse.state_of(model) if fuse else None


def _gib(size: int) -> float:
    return size / 2**30


def _host_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # bytes on macOS, KiB elsewhere
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
