"""What of this machine's memory a training step may take, asked at the moment of planning."""

from __future__ import annotations

from dataclasses import replace

import torch

from colab_qlora.activations.gpu_profile import GpuProfile
from colab_qlora.activations.memory_plan import (
    GIB,
    LEAST_MARGIN_BYTES,
    MARGIN_SHARE,
    Machine,
    machine_of,
)
from colab_qlora.activations.static_costs import CUDA_CONTEXT_BYTES
from colab_qlora.errors import UserError
from colab_qlora.host import host_memory_gib

# an assumption: what the process and the rest of the host need beside what is pinned
HOST_RESERVE_BYTES = 2 * GIB
# of a CPU's free memory, which activations share with everything else
CPU_SHARE = 0.5

# A CPU's step time is not predicted. The rates only rank what is worth keeping, as on a T4
CPU_PROFILE = GpuProfile(
    name="CPU",
    source="no rates: a CPU's step time is not predicted",
    capability=(0, 0),
    memory_bytes=0,
    host_bytes=0,
    gemm_flops_per_s=3e11,
    attention_flops_per_s=1e11,
    attention_backward_flops_per_s=1e11,
    move_bytes_per_s=1e10,
    decode_bytes_per_s=2e9,
    copy_down_bytes_per_s=0.0,
    copy_up_bytes_per_s=0.0,
    layer_launch_s=0.0,
    step_launch_s=0.0,
    attention="cpu_flash",
    is_measured=False,
)


def this_machine(
    device: torch.device,
    profile: GpuProfile,
    resident_bytes: int,
    memory_budget_gib: float | None = None,
    host_budget_gib: float | None = None,
) -> Machine:
    """The budgets that hold now.

    Args:
        device: where the model is.
        profile: its rates; on a CPU `CPU_PROFILE`.
        resident_bytes: what the model itself should have allocated by now.
        memory_budget_gib: most that torch's allocator may hand out; None: all that is free.
        host_budget_gib: most host memory to pin; None: what is free, less a reserve.

    Raises:
        UserError: a budget above what is free, with what holds the rest.
    """
    host_total, host_free = host_memory_gib()
    if device.type != "cuda":
        free = int((host_free if host_free is not None else host_total or 4.0) * GIB * CPU_SHARE)
        budget = free + resident_bytes
        if memory_budget_gib is not None:
            budget = int(memory_budget_gib * GIB)
        return Machine(profile, budget, 0, is_budget_given=memory_budget_gib is not None)
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allocated = torch.cuda.memory_allocated(device)
    # a cap that somebody set (torch.cuda.set_per_process_memory_fraction) counts like a full GPU
    cap = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    others = max(0, total - free - reserved - CUDA_CONTEXT_BYTES)
    free = min(free, max(0, cap - reserved))
    margin = max(LEAST_MARGIN_BYTES, int(MARGIN_SHARE * cap))
    usable = max(0, reserved + free - margin)
    host_bytes = max(0, int((host_free or 0.0) * GIB) - HOST_RESERVE_BYTES)
    if memory_budget_gib is not None and int(memory_budget_gib * GIB) > reserved + free:
        capped = "" if cap == total else f"; this process may have {cap / GIB:.2f} of it"
        raise UserError(
            "memory_budget_gib is more than this process can have",
            got=memory_budget_gib,
            allowed=f"up to {usable / GIB:.2f} GiB of {total / GIB:.2f}: other processes hold "
            f"about {others / GIB:.2f} GiB, CUDA itself {CUDA_CONTEXT_BYTES / GIB:.2f}{capped}",
            do="Lower it, leave it out, or end what else runs on the GPU (nvidia-smi lists it)",
        )
    machine = machine_of(profile, memory_budget_gib, host_budget_gib, usable=usable)
    if host_budget_gib is None:
        machine = replace(machine, host_bytes=host_bytes)
    return replace(machine, other_bytes=max(0, allocated - resident_bytes))
