"""Smart activation checkpointing on a model: reads what the planner has to know, and wires it in.

Fused layers are planned tensor by tensor (`activations/runtime.py`), layers that run their own code
as wholes (`stock_checkpointing.py`).
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.activations.cost_settings import CostSettings
from colab_qlora.activations.gpu_profile import GpuProfile, profile_of_this_machine
from colab_qlora.activations.memory_plan import Machine, Workload
from colab_qlora.activations.model_shape import ALL_LINEARS, Rank, shape_of
from colab_qlora.activations.runtime import ActivationRuntime
from colab_qlora.activations.static_costs import static_bytes
from colab_qlora.activations.this_machine import CPU_PROFILE, this_machine
from colab_qlora.layers.linear_group import PADDING
from colab_qlora.models.fuse import causal_model, fused_layers, state_of
from colab_qlora.models.host_embedding import (
    bring_back,
    is_on_host,
    move_to_host,
    why_not_on_host,
)
from colab_qlora.models.settings import settings_of
from colab_qlora.models.stock_checkpointing import (
    StockPlanner,
    attach_stock_planner,
    detach_stock_planner,
    stock_planner_of,
)

# parts of `static_bytes` that are not there when a model is loaded
_FROM_FIRST_STEP = ("optimizer states", "GEMM workspace")


def workload_of(model: Any, batch_size: int = 1, seq_length: int = 1) -> Workload:
    """What training this model means, read from its config, weights and adapters.

    Raises:
        UserError: an architecture whose costs are not known.
    """
    causal = causal_model(model)
    shape = shape_of(causal.config)
    device = model_device(model)
    linears = _linears(causal)
    ranks = {
        name: max((_rank(m) for m in linears.get(name, [])), default=0) for name in shape.linears
    }
    every = [module for found in linears.values() for module in found]
    is_4bit = any(getattr(_base(m).weight, "quant_state", None) is not None for m in every)
    settings = CostSettings(
        itemsize=_hidden_dtype(causal).itemsize,
        has_dropout=any(_dropout(module) > 0 for module in every),
        spare_multiple=PADDING.get(device.type, 1),
        is_4bit=is_4bit,
        embedding=_place_of_embedding(causal, device),
        records_layers=_records(model),
        # groups with a weight that is neither NF4 nor int8 count too, though they are not held
        holds_weights=state_of(model) is not None,
    )
    rank: Rank = ranks
    asked = settings_of(causal)
    # "embedded" and not the folder that it was unpacked into
    name = asked.model_name if asked is not None else getattr(causal.config, "_name_or_path", "")
    name = name or type(causal).__name__
    state = state_of(model)
    held = state.scratch.held.bytes_held() if state is not None else 0
    return Workload(name, shape, rank, batch_size, seq_length, settings=settings, held_bytes=held)


def plan_batches(
    model: Any,
    memory_budget_gib: float | None = None,
    host_budget_gib: float | None = None,
    earlier: ActivationRuntime | None = None,
) -> ActivationRuntime | StockPlanner | None:
    """Have a model planned from its next batch on.

    Args:
        model: with fused layers, or any other.
        memory_budget_gib, host_budget_gib: as `set_gradient_checkpointing` takes them.
        earlier: what planned it until now.

    Returns:
        What plans it: a fused model's layers tensor by tensor, others' as wholes, and None where
        not even that can be done.
    """
    stop_planning(model)
    state = state_of(model)
    if state is None or not fused_layers(model):
        return attach_stock_planner(causal_model(model), memory_budget_gib, print_line)
    device = model_device(model)
    source = _MachineNow(device, memory_budget_gib, host_budget_gib)
    # weakly: what holds the runtime can be copied without the model
    causal = weakref.ref(causal_model(model))
    state.runtime = ActivationRuntime(
        workload_of(model), source, print_line, device, lambda: move_to_host(causal())
    )
    if earlier is not None:
        state.runtime.follow(earlier)
    return state.runtime


def stop_planning(model: Any) -> None:
    """Have layers follow their gradient_checkpointing flag again, and the embedding come back."""
    bring_embedding_back(model)
    free_recordings(model)
    state = state_of(model)
    if state is not None:
        state.runtime = None
    detach_stock_planner(causal_model(model))


def free_recordings(model: Any, *, only_if_short: bool = False) -> None:
    """Let recorded passes and decoded weights go, whose memory nothing else can use meanwhile.

    Args:
        only_if_short: not where as much memory is free beside it.
    """
    state = state_of(model)
    held = state.scratch.held if state is not None else None
    if state is None or held is None or not (state.graphs.shapes or held.bytes_held()):
        return
    # the model need not be on the current device
    device = model_device(model)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        idle = state.graphs.idle_bytes()
        if only_if_short and _has_room_beside(idle, held.bytes_held()):
            return
        state.graphs.clear()
        held.free()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _has_room_beside(idle_bytes: int, held_bytes: int) -> bool:
    if not idle_bytes + held_bytes or not torch.cuda.is_available():
        return True
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    # what torch's allocator has at hand counts as free, the recordings' own part of it aside
    return torch.cuda.mem_get_info()[0] + cached - idle_bytes > idle_bytes + held_bytes


def bring_embedding_back(model: Any) -> None:
    """Have the embedding's table on the GPU again, if a plan had sent it to the host."""
    causal, runtime = causal_model(model), runtime_of(model)
    find = getattr(causal, "get_input_embeddings", None)
    if find is not None and is_on_host(find()):
        bring_back(causal, model_device(model))
    if runtime is not None:
        runtime.embedding_is_back()


def planner_of(model: Any) -> ActivationRuntime | StockPlanner | None:
    """What plans this model's batches, if anything does."""
    return runtime_of(model) or stock_planner_of(causal_model(model))


def runtime_of(model: Any) -> ActivationRuntime | None:
    """What plans the batches of a model with fused layers, if anything does."""
    state = state_of(model)
    return state.runtime if state is not None else None


def print_line(line: str) -> None:
    print(f"colab_qlora: {line}", flush=True)


def model_device(model: Any) -> torch.device:
    """Where the layers are; the embedding may be elsewhere."""
    linears = _linears(causal_model(model))
    modules = next(iter(linears.values()), None)
    found = _base(modules[0]).weight if modules else next(model.parameters())
    device: torch.device = found.device
    return device


def profile_for(device: torch.device, workload: Workload) -> GpuProfile:
    """Rates of the device at this workload's sizes; measured once on a GPU."""
    if device.type != "cuda":
        return CPU_PROFILE
    # the model need not be on the current device
    with torch.cuda.device(device):
        return profile_of_this_machine(workload.shape, workload.tokens, workload.seq_length)


def resident_bytes(workload: Workload) -> int:
    """What the model, its adapters and held weights should have allocated before a step."""
    sizes = static_bytes(workload.shape, workload.rank, workload.settings)
    later = {"CUDA context"}
    if not workload.has_stepped:
        later.update(_FROM_FIRST_STEP)
    if not workload.settings.has_gradients:
        later.add("gradients")
    return workload.held_bytes + sum(size for name, size in sizes.items() if name not in later)


@dataclass(frozen=True)
class _MachineNow:
    """The machine at the moment it is called; a class of its own, so that a model can be copied."""

    device: torch.device
    memory_budget_gib: float | None
    host_budget_gib: float | None

    def __call__(self, workload: Workload) -> Machine:
        return this_machine(
            self.device,
            profile_for(self.device, workload),
            resident_bytes(workload) + workload.input_bytes,
            self.memory_budget_gib,
            self.host_budget_gib,
        )


def _records(model: Any) -> bool:
    state = state_of(model)
    return state is not None and state.graphs.is_on


def _place_of_embedding(causal: Any, device: torch.device) -> str:
    if is_on_host(causal.get_input_embeddings()):
        return "host"
    return "gpu" if device.type != "cuda" or why_not_on_host(causal) else "either"


def _linears(causal: Any) -> dict[str, list[Any]]:
    """The modules behind each name of `ALL_LINEARS`, of all layers."""
    found: dict[str, list[Any]] = {}
    for layer in getattr(getattr(causal, "model", None), "layers", []):
        for owner in (layer.self_attn, layer.mlp):
            for name in ALL_LINEARS:
                if (module := getattr(owner, name, None)) is not None:
                    found.setdefault(name, []).append(module)
    return found


def _base(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _rank(module: Any) -> int:
    names = getattr(module, "active_adapters", [])
    return sum(module.r[name] for name in names if name in getattr(module, "r", {}))


def _dropout(module: Any) -> float:
    found = getattr(module, "lora_dropout", None) or {}
    return max((float(getattr(drop, "p", 0.0)) for drop in found.values()), default=0.0)


def _hidden_dtype(causal: Any) -> torch.dtype:
    """The residual stream's dtype: that of the embedding."""
    table = causal.get_input_embeddings()
    # a table of 8 bits says what it is decoded to
    dtype: torch.dtype = getattr(table, "compute_dtype", table.weight.dtype)
    return dtype
