"""What training will need, said before it starts: does it fit, how long it takes, what would help.

`plan_for` answers for a workload (a model, a micro-batch) on a machine (a GPU's rates, a budget).
All of it is arithmetic: the machine need not be this one, nor the model be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from colab_qlora.activations.cost_settings import (
    GEMM_WORKSPACE_BYTES,
    GEMM_WORKSPACE_BYTES_BEFORE_HOPPER,
    CostSettings,
)
from colab_qlora.activations.gpu_profile import GpuProfile
from colab_qlora.activations.held_layers import with_held_weights
from colab_qlora.activations.model_shape import ModelShape, Rank
from colab_qlora.activations.plan import BudgetTooSmall
from colab_qlora.activations.recording import may_record
from colab_qlora.activations.static_costs import CUDA_CONTEXT_BYTES
from colab_qlora.activations.step_plan import StepPlan
from colab_qlora.activations.step_search import can_plan, plan_step
from colab_qlora.activations.step_time import Batch
from colab_qlora.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
# what the allocator reserves without handing it out, and what libraries load while training
MARGIN_SHARE, LEAST_MARGIN_BYTES = 0.02, 256 * 2**20
_LENGTH_STEP = 128
_MOST_TOKENS = 2**20


@dataclass(frozen=True)
class Machine:
    """A GPU and what of it may be used.

    Attributes:
        profile: the GPU's rates and sizes.
        budget_bytes: most that torch's allocator may hand out (torch.cuda.max_memory_allocated).
        host_bytes: host memory that may be pinned for offloaded tensors.
        other_bytes: what other tensors hold of the budget.
        is_budget_given: the budget was set by hand, so nothing may exceed it.
    """

    profile: GpuProfile
    budget_bytes: int
    host_bytes: int
    other_bytes: int = 0
    is_budget_given: bool = False


def usable_bytes(memory_bytes: int) -> int:
    """What torch's allocator can hand out of a GPU's memory, without context and margin."""
    margin = max(LEAST_MARGIN_BYTES, int(MARGIN_SHARE * memory_bytes))
    return max(0, memory_bytes - CUDA_CONTEXT_BYTES - margin)


def machine_of(
    profile: GpuProfile,
    memory_budget_gib: float | None = None,
    host_budget_gib: float | None = None,
    *,
    usable: int | None = None,
) -> Machine:
    """A machine whose budgets are all that there is, or what is given.

    Raises:
        UserError: a budget that is not positive, or above what the GPU has.
    """
    usable = usable_bytes(profile.memory_bytes) if usable is None else usable
    budget, host = usable, profile.host_bytes
    check_budgets(memory_budget_gib, host_budget_gib)
    if memory_budget_gib is not None:
        budget = int(memory_budget_gib * GIB)
        if budget > profile.memory_bytes:
            raise UserError(
                f"memory_budget_gib is more than a {profile.name} has",
                got=memory_budget_gib,
                allowed=f"up to {usable / GIB:.2f} GiB of {profile.memory_bytes / GIB:.2f}; CUDA "
                "itself and the allocator take the rest",
            )
    if host_budget_gib is not None:
        host = int(host_budget_gib * GIB)
    return Machine(profile, budget, host, is_budget_given=memory_budget_gib is not None)


def check_budgets(memory_budget_gib: float | None, host_budget_gib: float | None) -> None:
    """Raises UserError for a budget that is no size; None is none."""
    for name, value in (
        ("memory_budget_gib", memory_budget_gib),
        ("host_budget_gib", host_budget_gib),
    ):
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        may_be_zero = name == "host_budget_gib"
        if not is_number or not (0 < value < math.inf or (value == 0 and may_be_zero)):
            allowed = "GiB, more than 0" if name == "memory_budget_gib" else "GiB, 0 or more"
            raise UserError(f"{name} is not a size", got=repr(value), allowed=allowed)


@dataclass(frozen=True)
class Workload:
    """What is to be trained.

    Attributes:
        model_name: for people.
        shape, rank: sizes of the model and its adapters.
        batch_size: sequences in a micro-batch.
        seq_length: tokens in each, padding included.
        document_tokens: mean tokens of a document, where several are packed into a sequence.
        settings: how the step runs; attention and GEMM workspace are set for the machine.
        has_stepped: the optimiser's states are there already.
        held_bytes: that decoded weights take now which an earlier plan holds.
    """

    model_name: str
    shape: ModelShape
    rank: Rank
    batch_size: int
    seq_length: int
    document_tokens: int | None = None
    settings: CostSettings = field(default_factory=CostSettings)
    has_stepped: bool = False
    held_bytes: int = 0

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_length

    @property
    def input_bytes(self) -> int:
        """Of the hidden states that come out of the embedding."""
        return self.tokens * self.shape.hidden * self.settings.itemsize

    def batch_on(self, profile: GpuProfile) -> Batch:
        is_hopper = profile.capability >= (9, 0)
        workspace = GEMM_WORKSPACE_BYTES if is_hopper else GEMM_WORKSPACE_BYTES_BEFORE_HOPPER
        attention = self._attention_on(profile)
        if attention == "cpu_flash":
            workspace = 0
        settings = replace(self.settings, attention=attention, gemm_workspace_bytes=workspace)
        length = min(self.document_tokens or self.seq_length, self.seq_length)
        labelled = max(self.tokens - self.batch_size, 0)
        return Batch(self.shape, self.rank, self.tokens, length, profile, settings, labelled)

    def _attention_on(self, profile: GpuProfile) -> str:
        """The kernel that `kernels/attention_choice.py` will take; of two, what needs more."""
        slow = {"efficient": "efficient_varlen", "cpu_flash": "cpu_flash", "math": "math"}
        if self.shape.has_score_cap:
            # Triton's kernel bounds scores too, but knows no window; one document may fill a row
            is_global = self.seq_length <= (self.shape.local_window or self.seq_length)
            can_run = profile.attention not in slow and self.settings.itemsize == 2
            return "triton" if is_global and can_run else "math"
        if self.document_tokens is not None:
            return slow.get(profile.attention, "triton")
        return profile.attention


@dataclass(frozen=True)
class Change:
    """Something that makes a plan fit.

    Attributes:
        text: what to do, as an imperative clause.
        plan: what follows from it.
    """

    text: str
    plan: MemoryPlan


@dataclass(frozen=True)
class MemoryPlan:
    """A plan for training on a machine; `print` it, or `draw()` it.

    Attributes:
        workload, machine: what it was made for.
        step: what each layer keeps, offloads and recomputes; None if nothing fits.
        error: why nothing fits, with the smallest budget that would do; else None.
    """

    workload: Workload
    machine: Machine
    step: StepPlan | None
    error: BudgetTooSmall | None = None

    @property
    def fits(self) -> bool:
        return self.step is not None

    @property
    def peak_memory_gib(self) -> float:
        """Predicted torch.cuda.max_memory_allocated; without a plan, the least that would do."""
        if self.step is not None:
            return self.step.peak_bytes / GIB
        assert self.error is not None
        return self.error.floor_bytes / GIB

    @property
    def may_record(self) -> bool:
        """True if the layers run as CUDA graphs once a shape of batch has come often enough."""
        if self.step is None:
            return False
        return may_record(self.step, self.machine.budget_bytes - self.step.peak_bytes)

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a micro-batch, forward, backward and optimiser; nan if unfit."""
        if self.step is None:
            return math.nan
        return self.step.seconds_with(self.machine.budget_bytes)

    @property
    def tokens_per_second(self) -> float:
        return self.workload.tokens / self.step_seconds

    def hours(self, examples: int, epochs: float = 1.0) -> float:
        """Predicted hours for a data set whose rows fill the sequence length."""
        batches = math.ceil(examples * epochs / self.workload.batch_size)
        return batches * self.step_seconds / 3600

    @cached_property
    def largest_batch_size(self) -> int:
        """Most sequences of this length in a micro-batch for which there is a plan; 0 if none."""
        most = max(1, _MOST_TOKENS // self.workload.seq_length)
        return _largest(lambda size: self._can(batch_size=size), most)

    @cached_property
    def longest_seq_length(self) -> int:
        """Most tokens a sequence, in steps of 128, for which this batch size has a plan; or 0."""
        most = max(1, _MOST_TOKENS // (self.workload.batch_size * _LENGTH_STEP))
        return _LENGTH_STEP * _largest(lambda n: self._can(seq_length=n * _LENGTH_STEP), most)

    def holding_at_most(self, layers: int) -> MemoryPlan:
        """The same plan, with the weights of no more layers decoded for good."""
        if self.step is None or self.step.held_layers <= layers:
            return self
        return replace(self, step=replace(self.step, held_layers=layers))

    def with_changes(self, **changes: int | Rank) -> MemoryPlan:
        """The plan for another batch_size, seq_length or rank on the same machine."""
        return plan_for(replace(self.workload, **changes), self.machine)  # type: ignore[arg-type]

    @cached_property
    def cheapest_change(self) -> Change | None:
        """What to change first so that it fits; None if it fits, or if nothing of this helps."""
        return next(self._changes(), None) if not self.fits else None

    def _changes(self) -> Iterator[Change]:
        """Changes that fit, the cheapest first: first those that train the same."""
        size, length = self.workload.batch_size, self.workload.seq_length
        if size > 1 and (most := self.largest_batch_size):
            while size % most:
                most -= 1
            text = (
                f"set per_device_train_batch_size={most} and multiply "
                f"gradient_accumulation_steps by {size // most}: the same training"
            )
            yield Change(text, self.with_changes(batch_size=most))
        needed = self.error.host_bytes_needed if self.error else None
        if needed:
            machine = replace(self.machine, host_bytes=needed)
            text = f"use a machine with {math.ceil(10 * needed / GIB) / 10} GiB of free host memory"
            plan = plan_for(self.workload, machine)
            if plan.fits:
                yield Change(text, plan)
        if longest := self.longest_seq_length:
            yield Change(
                f"lower max_seq_length to {longest}", self.with_changes(seq_length=longest)
            )
        one = replace(self, workload=replace(self.workload, batch_size=1))
        if longest := one.longest_seq_length:
            shorter = min(longest, length)
            text = f"set per_device_train_batch_size=1 and lower max_seq_length to {shorter}"
            yield Change(text, self.with_changes(batch_size=1, seq_length=shorter))

    def _can(self, **changes: int) -> bool:
        workload = replace(self.workload, **changes)  # type: ignore[arg-type]
        machine = self.machine
        return can_plan(
            workload.batch_on(machine.profile),
            workload.batch_size,
            machine.budget_bytes,
            machine.host_bytes,
            machine.other_bytes,
        )

    def sentence(self) -> str:
        """The plan in one sentence."""
        from colab_qlora.activations.report import sentence

        return sentence(self)

    def __str__(self) -> str:
        from colab_qlora.activations.report import table

        return table(self)

    def draw(self) -> Figure:
        """A picture: where the memory goes, and what each layer keeps, offloads, recomputes."""
        from colab_qlora.teaching.plan_picture import draw_plan

        return draw_plan(self)


def plan_for(workload: Workload, machine: Machine) -> MemoryPlan:
    """Plan a workload on a machine; a misfit is an answer, not an error.

    Raises:
        UserError: a batch size or sequence length that is no positive integer.
    """
    for name in ("batch_size", "seq_length"):
        value = getattr(workload, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} is not a size", got=repr(value), allowed="1 or more")
    try:
        step = plan_step(
            workload.batch_on(machine.profile),
            workload.batch_size,
            machine.budget_bytes,
            machine.host_bytes,
            other_bytes=machine.other_bytes,
        )
    except BudgetTooSmall as error:
        return MemoryPlan(workload, machine, None, error.with_traceback(None))
    return MemoryPlan(workload, machine, with_held_weights(step, machine.budget_bytes))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, if smaller ones fit too; 0 if 1 does not."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
