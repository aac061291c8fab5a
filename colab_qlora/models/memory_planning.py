"""`plan_memory`: what training a model will need on a GPU, before it is loaded or after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from colab_qlora.activations.cost_settings import CostSettings
from colab_qlora.activations.gpu_profile import profile_named
from colab_qlora.activations.memory_plan import (
    Machine,
    MemoryPlan,
    Workload,
    machine_of,
    plan_for,
)
from colab_qlora.activations.model_shape import ModelShape, shape_of
from colab_qlora.activations.recorded_shapes import RECORDED_SHAPES, recorded_shape
from colab_qlora.activations.this_machine import this_machine
from colab_qlora.errors import UserError
from colab_qlora.models.embedded import EMBEDDED_NAME
from colab_qlora.models.smart import model_device, profile_for, resident_bytes, workload_of

# the free Colab GPU, which most users of a machine without one plan for
DEFAULT_GPU = "T4"


def plan_memory(
    model_or_name: Any,
    batch_size: int = 2,
    max_seq_length: int = 2048,
    gpu: str | None = None,
    *,
    r: int = 16,
    memory_budget_gib: float | None = None,
    host_budget_gib: float | None = None,
    load_in_4bit: bool = True,
    token: str | None = None,
    revision: str | None = None,
) -> MemoryPlan:
    """Plan a training step: what fits, what is kept, offloaded and recomputed, how long it takes.

    Args:
        model_or_name: a model (with adapters, or `r` is taken), or a name: "embedded", a folder, a
            well-known model ("llama-3-8b"), or a hub id, of which the config alone is fetched.
        batch_size: sequences in a micro-batch (per_device_train_batch_size).
        max_seq_length: tokens in each.
        gpu: "T4", "L4", "A100", "H100" by their recorded rates; None: this machine's GPU, measured
            once, or a T4 where there is none.
        r: rank of LoRA on all linears of the layers, for a model without adapters.
        memory_budget_gib: most GPU memory (torch.cuda.max_memory_allocated) in GiB; None: all.
        host_budget_gib: most page-locked host memory in GiB; None: what is free; 0: none.
        load_in_4bit: NF4 weights, for a name; of a model it is seen.
        token, revision: of a hub model, as in `FastLanguageModel.from_pretrained`.

    Returns:
        A `MemoryPlan`: print it for a table, `draw()` it for a picture, `sentence()` for one line;
        `fits`, `step_seconds`, `hours(examples)`, `largest_batch_size`, `longest_seq_length` and
        `cheapest_change` answer the rest. Predicted, not promised: see the README for how close.

    Raises:
        UserError: a name that is not found, an architecture whose costs are not known, a size that
            is none.

    Example:
        >>> plan_memory("llama-3-8b", batch_size=2, max_seq_length=2048, gpu="T4").fits
        True
    """
    workload = _workload(model_or_name, r, load_in_4bit, token, revision)
    workload = replace(workload, batch_size=batch_size, seq_length=max_seq_length)
    is_model = not isinstance(model_or_name, str | Path)
    budgets = (memory_budget_gib, host_budget_gib)
    return plan_for(workload, _machine(model_or_name if is_model else None, workload, gpu, budgets))


def _workload(
    model_or_name: Any, r: int, load_in_4bit: bool, token: str | None, revision: str | None
) -> Workload:
    if not isinstance(model_or_name, str | Path):
        found = workload_of(model_or_name)
        has_adapters = any(dict(found.rank).values()) if not isinstance(found.rank, int) else True
        if has_adapters:
            return found
        return Workload(found.model_name, found.shape, r, 1, 1, settings=found.settings)
    name = str(model_or_name)
    shape = _shape_of_name(name, token, revision)
    place = "gpu" if shape.is_tied else "either"
    settings = CostSettings(is_4bit=load_in_4bit, embedding=place)
    return Workload(name, shape, r, 1, 1, settings=settings)


def _shape_of_name(name: str, token: str | None, revision: str | None) -> ModelShape:
    if name == EMBEDDED_NAME:
        return RECORDED_SHAPES["smollm2-135m"]
    is_folder = Path(name).expanduser().is_dir()
    found = None if is_folder else recorded_shape(name)
    if found is not None:
        return found
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(Path(name).expanduser()) if is_folder else name, token=token, revision=revision
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the config of {name!r} cannot be read",
            got=str(error).strip().splitlines()[0],
            allowed="a folder with config.json, a hub id, "
            f"{EMBEDDED_NAME!r}, or one of {', '.join(RECORDED_SHAPES)}",
        ) from error
    return shape_of(config)


def _machine(
    model: Any,
    workload: Workload,
    gpu: str | None,
    budgets: tuple[float | None, float | None],
) -> Machine:
    if gpu is not None:
        return machine_of(profile_named(gpu), *budgets)
    if not torch.cuda.is_available():
        return machine_of(profile_named(DEFAULT_GPU), *budgets)
    device = torch.device("cuda") if model is None else model_device(model)
    if device.type != "cuda":
        device = torch.device("cuda")
    profile = profile_for(device, workload)
    # of a model that is not loaded, nothing is resident yet
    return this_machine(device, profile, resident_bytes(workload), *budgets)
