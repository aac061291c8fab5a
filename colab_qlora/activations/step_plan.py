"""What the layers of a step keep, offload and recompute, and what the step then costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from colab_qlora.activations.held_layers import held_layer_bytes
from colab_qlora.activations.phase_costs import Moment
from colab_qlora.activations.plan import Plan
from colab_qlora.activations.recording import can_record, may_record
from colab_qlora.activations.saved_classes import host_blocks, names_of
from colab_qlora.activations.step_time import KERNEL_GAP_S, RECOMPUTED_KERNELS, Batch


@dataclass(frozen=True)
class StepPlan:
    """What every layer of a model keeps, offloads and recomputes, and what the step then costs.

    Attributes:
        batch: the micro-batch and GPU it was made for, with the settings that were chosen.
        sequences: sequences in the micro-batch.
        plan: by classes of tensors (`saved_classes.CLASSES`), from the first layer to the last.
        moments: of each phase of the step its worst moment, as `phase_costs.step_moments`.
        other_bytes: GPU memory that belongs to something else, part of the peak.
        held_layers: the first so many layers' weights stay decoded.
    """

    batch: Batch
    sequences: int
    plan: Plan
    moments: dict[str, Moment]
    other_bytes: int = 0
    held_layers: int = 0

    @property
    def peak_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated will show."""
        return self.peak.bytes + self.other_bytes + self.held_bytes

    @property
    def held_bytes(self) -> int:
        """Of decoded weights that stay, part of the peak."""
        batch = self.batch
        return self.held_layers * held_layer_bytes(batch.shape, batch.rank, batch.settings)

    @property
    def peak(self) -> Moment:
        """The moment at which most memory is in use."""
        return max(self.moments.values(), key=lambda moment: moment.bytes)

    @cached_property
    def keep(self) -> tuple[frozenset[str], ...]:
        """Names of tensors (`layers/saved.py`) that stay on the GPU, for each layer."""
        return tuple(names_of(classes, self.batch.shape) for classes in self.plan.keep)

    @cached_property
    def offload(self) -> tuple[frozenset[str], ...]:
        """Names of tensors that wait in host memory, for each layer."""
        return tuple(names_of(classes, self.batch.shape) for classes in self.plan.offload)

    @cached_property
    def stored(self) -> tuple[frozenset[str], ...]:
        """Names of tensors that are kept or offloaded, for each layer."""
        return tuple(kept | moved for kept, moved in zip(self.keep, self.offload, strict=True))

    def host_blocks(self) -> list[int]:
        """Bytes of each block of host memory that the plan uses, of all layers."""
        batch = self.batch
        layer = (batch.shape, batch.tokens, batch.tokens // self.sequences, batch.rank)
        return [
            size
            for classes in self.plan.offload
            for size in host_blocks(*layer, sorted(classes), batch.settings)
        ]

    @property
    def step_s(self) -> float:
        """Predicted seconds of one micro-batch with the optimiser's step, layers as ever."""
        seconds = self.batch.step_s(
            self.plan.recompute, offloaded=self.plan.offload, held_layers=self.held_layers
        )
        return seconds + self.plan.exposed_s + self.plan.setting_s

    @property
    def recorded_s(self) -> float:
        """The same with recorded layers (`recording.py`)."""
        seconds = self.batch.step_s(
            self.plan.recompute, is_recorded=True, held_layers=self.held_layers
        )
        return seconds + self.plan.setting_s

    def seconds_with(self, budget_bytes: int) -> float:
        """Predicted seconds where so much memory may be used: recorded, if there is room for it."""
        is_recorded = may_record(self, budget_bytes - self.peak_bytes)
        return self.recorded_s if is_recorded else self.step_s

    @property
    def full_checkpointing_s(self) -> float:
        """Predicted seconds of a step that runs every layer forward twice, recorded if it can be:
        it needs the least memory."""
        nothing = [frozenset[str]()] * self.batch.shape.layers
        is_recorded = can_record(self.batch, self.sequences)
        once_s = self.batch.step_s(nothing, is_recorded=is_recorded)
        again_s = self.batch.forward_s + RECOMPUTED_KERNELS * KERNEL_GAP_S
        return once_s + self.batch.shape.layers * again_s

    @property
    def recompute_share(self) -> float:
        """Seconds of recomputation, as a share of running every layer forward once more."""
        return self.plan.recompute_s / (self.batch.shape.layers * self.batch.forward_s)
