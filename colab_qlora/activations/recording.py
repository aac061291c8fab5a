"""Whether a planned step's layers may be recorded as CUDA graphs, and what that costs.

A recording takes the place of the memory that the pass would have taken (`models/pass_graphs.py`),
and needs a little beside: the two buffers that gradients go down through, and cuBLAS's workspace on
the stream that records. The host starts a recorded layer by one call a direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colab_qlora.activations.cost_settings import CostSettings
from colab_qlora.activations.model_shape import ModelShape, Rank

if TYPE_CHECKING:
    from colab_qlora.activations.step_plan import StepPlan
    from colab_qlora.activations.step_time import Batch

# what the host needs for a recorded layer, against starting its kernels: 0.07 to 0.12 in seven
# steps of an H200's host (host_ms in results/planner_*.json)
RECORDED_LAUNCHES = 0.11


def recording_bytes(shape: ModelShape, rank: Rank, tokens: int, settings: CostSettings) -> int:
    """GPU memory that a recorded pass needs beside what it needs anyway."""
    row = shape.hidden + settings.spare(shape, rank, "down")
    return 2 * tokens * row * settings.itemsize + settings.gemm_workspace_bytes


def waits_for_host(batch: Batch) -> bool:
    """True if the host needs longer to start a layer's kernels than the GPU to run them."""
    return batch.profile.layer_launch_s > batch.forward_s + batch.backward_s


def can_record(batch: Batch, sequences: int) -> bool:
    """True if layers that send nothing to the host can be recorded, given the memory."""
    if batch.settings.has_dropout or not batch.settings.records_layers:
        return False
    is_cpu = batch.profile.capability == (0, 0)
    # packed documents lie elsewhere in every batch
    return not is_cpu and batch.seq_length * sequences == batch.tokens


def may_record(step: StepPlan, left_bytes: int) -> bool:
    """True if the layers can be recorded where so much memory is left beside the step's peak."""
    batch = step.batch
    if any(step.offload) or not can_record(batch, step.sequences):
        return False
    return left_bytes >= recording_bytes(batch.shape, batch.rank, batch.tokens, batch.settings)
