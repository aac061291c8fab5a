"""How many layers' weights may stay decoded: what memory is left over goes there last.

A held layer is decoded once in a run and not twice a step. By the recorded rates a GiB of that
saves 1.3 ms of an 8B's step on an H100 and 12 on a T4; with 2 x 2048 tokens a GiB of gate and up,
which are not computed again, saves 7 and 155. So a plan holds weights only if it recomputes and
offloads nothing, with the memory that is still left then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from colab_qlora.activations.cost_settings import CostSettings
from colab_qlora.activations.model_shape import ModelShape, Rank
from colab_qlora.activations.recording import can_record, recording_bytes
from colab_qlora.activations.step_settings import WHOLE

if TYPE_CHECKING:
    from colab_qlora.activations.step_plan import StepPlan

# of the budget, left for what no plan knows of: an evaluation's logits, a cache for generation
LEFT_SHARE = 0.1


def held_layer_bytes(shape: ModelShape, rank: Rank, settings: CostSettings) -> int:
    """Bytes of one layer's decoded weights with room for its adapters beside and below them."""
    numbers = 0
    for group, names in shape.groups.items():
        spare = settings.spare(shape, rank, group)
        outer = sum(shape.linear(name)[1] for name in names)
        numbers += (outer + spare) * (shape.linear(names[0])[0] + spare)
    return numbers * settings.itemsize


def with_held_weights(step: StepPlan, budget_bytes: int) -> StepPlan:
    """The step with as many held layers as the budget leaves room for."""
    batch = step.batch
    settings, most = batch.settings, batch.settings.max_weight_bytes
    # a group that is decoded in parts has no buffer for all of it
    is_whole = most is None or most >= WHOLE
    if not (settings.is_4bit and settings.holds_weights and is_whole):
        return step
    if any(step.plan.recompute) or any(step.plan.offload):
        return step
    left = int((1 - LEFT_SHARE) * budget_bytes) - step.peak_bytes
    if can_record(batch, step.sequences):
        left -= recording_bytes(batch.shape, batch.rank, batch.tokens, settings)
    layers = max(0, left) // held_layer_bytes(batch.shape, batch.rank, settings)
    return replace(step, held_layers=min(layers, batch.shape.layers))
