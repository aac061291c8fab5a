"""Plans the batches of one model as they come, and hands each layer the store of its tensors.

Lengths are put into buckets, so that a new plan is made a few times in a run and not for every
batch; a bucket's plan is that of its longest batch. Plans differ in what is kept, offloaded and
recomputed, never in results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from colab_qlora.activations.host_pool import HostMemoryRefused, HostPool
from colab_qlora.activations.memory_plan import GIB, Machine, MemoryPlan, Workload, plan_for
from colab_qlora.activations.stores import CopyLane, OffloadingStore
from colab_qlora.layers.saved import SavedTensors

# out of memory: the next plan has this share of the budget
LESS_BUDGET = 0.9
_LEAST_BUCKET = 64


@dataclass(frozen=True)
class BatchKind:
    """What of a batch its plan depends on.

    Attributes:
        batch_size: sequences, or rows.
        seq_length: tokens of a row, at most.
        document_tokens: mean tokens of a document where documents are packed, rounded up to a
            power of two; else None.
        has_gradients: an earlier micro-batch has left gradients.
    """

    batch_size: int
    seq_length: int
    document_tokens: int | None = None
    has_gradients: bool = False


def bucket_length(length: int) -> int:
    """The next length at or above, of eight in each power of two; 64 at least."""
    step = max(_LEAST_BUCKET, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


class ActivationRuntime:
    """Keeps the plans of one model and the stores of the pass that runs.

    Args:
        workload: the model and its adapters; batch sizes are filled in.
        machine: gives the budgets as they are now, for the micro-batch of a workload.
        say: takes one line for people.
        device: where the model is.
        move_embedding: sends the embedding's table to the host, once a plan wants that.

    Attributes:
        current: the plan of the pass that runs.
        is_at_floor: a plan was needed that takes the least memory there is; a lower budget would
            change nothing.
    """

    def __init__(
        self,
        workload: Workload,
        machine: Callable[[Workload], Machine],
        say: Callable[[str], None],
        device: torch.device,
        move_embedding: Callable[[], None] | None = None,
    ) -> None:
        self._move_embedding = move_embedding
        self.workload, self.say, self.device = workload, say, device
        self.share, self.is_at_floor = 1.0, False
        self.plans: dict[BatchKind, MemoryPlan] = {}
        self.current: MemoryPlan | None = None
        self._machine = machine
        self._can_offload = True
        # all plans hold the same layers: a batch that leaves less room decides for the others too,
        # whose recordings would have to be made anew whenever memory came and went
        self._most_held: int | None = None
        self._has_run = False
        self._lane: CopyLane | None = None
        self._last: OffloadingStore | None = None

    def follow(self, earlier: ActivationRuntime) -> None:
        """Take over from the planner that the model had: what its steps left is still there.

        An optimiser's states and the GEMMs' workspace would be counted twice otherwise, as what the
        first step will add and as what other tensors hold. Other adapters have other states.
        """
        before, now = earlier.workload, self.workload
        if (before.shape, before.rank) == (now.shape, now.rank):
            self._has_run = earlier._has_run
            self.workload = replace(now, has_stepped=before.has_stepped)

    def new_pass(self) -> None:
        """The next layer that asks for a store begins a forward pass."""
        self.current, self._last = None, None

    def plan_of(self, kind: BatchKind, held_bytes: int = 0) -> MemoryPlan:
        """The plan of the pass that runs; made, if its bucket has none yet.

        Args:
            held_bytes: what decoded weights take now that stay by an earlier plan.
        """
        if self.current is None:
            # gradients that an earlier pass left are gone: an optimiser has used them
            if self._has_run and not kind.has_gradients:
                self.workload = replace(self.workload, has_stepped=True)
            self._has_run = True
            bucket = replace(kind, seq_length=bucket_length(kind.seq_length))
            if bucket not in self.plans:
                self.plans[bucket] = self._new_plan(bucket, held_bytes)
                self._hold_alike(self.plans[bucket])
            self.current = self.plans[bucket]
        return self.current

    def store(self, layer: int) -> SavedTensors:
        """A store for one layer of the pass that runs."""
        assert self.current is not None
        assert self.current.step is not None
        step = self.current.step
        if not any(step.offload):
            return SavedTensors(step.keep[layer] | step.offload[layer])
        if self._lane is None:
            self._lane = CopyLane(self.device, HostPool(self.current.machine.host_bytes))
        self._last = OffloadingStore(step.keep[layer], step.offload[layer], self._lane, self._last)
        return self._last

    def lower_budget(self) -> str:
        """Forget all plans and make the next ones for less memory; a clause that says so."""
        self.share *= LESS_BUDGET
        self._forget_plans()
        self.new_pass()
        return f"planning again with {self.share:.0%} of the memory"

    def layers_are_not_recorded(self) -> None:
        """Plans that count on recorded layers no longer hold."""
        settings = self.workload.settings
        if settings.records_layers:
            self.workload = replace(self.workload, settings=replace(settings, records_layers=False))
            self._forget_plans()

    def embedding_is_back(self) -> None:
        """Its table is on the GPU again: plans that count on the host no longer hold."""
        settings = self.workload.settings
        if settings.embedding == "host":
            self.workload = replace(self.workload, settings=replace(settings, embedding="either"))
            self._forget_plans()
            self.new_pass()

    @property
    def predicted_peak_bytes(self) -> int:
        """The largest peak of all plans so far; 0 if there are none."""
        return max((p.step.peak_bytes for p in self.plans.values() if p.step), default=0)

    def __getstate__(self) -> dict[str, Any]:
        """Settings alone: of a copy nobody knows which table its plans could send away."""
        settings = self.workload.settings
        place = "gpu" if settings.embedding == "either" else settings.embedding
        workload = replace(self.workload, settings=replace(settings, embedding=place))
        now: dict[str, Any] = dict.fromkeys(("current", "_lane", "_last", "_move_embedding"))
        return {**vars(self), **now, "plans": {}, "workload": workload}

    def _forget_plans(self) -> None:
        self.plans.clear()
        self._most_held = None

    def _hold_alike(self, plan: MemoryPlan) -> None:
        """Have all plans hold as many layers' weights as the one that holds fewest."""
        if plan.step is None:
            return
        held = plan.step.held_layers
        self._most_held = held if self._most_held is None else min(held, self._most_held)
        self.plans = {k: p.holding_at_most(self._most_held) for k, p in self.plans.items()}

    def _new_plan(self, kind: BatchKind, held_bytes: int) -> MemoryPlan:
        settings = replace(self.workload.settings, has_gradients=kind.has_gradients)
        workload = replace(
            self.workload,
            batch_size=kind.batch_size,
            seq_length=kind.seq_length,
            document_tokens=kind.document_tokens,
            settings=settings,
            held_bytes=held_bytes,
        )
        machine = self._machine(workload)
        budget_bytes = int(machine.budget_bytes * self.share)
        host_bytes = machine.host_bytes if self._can_offload else 0
        machine = replace(machine, budget_bytes=budget_bytes, host_bytes=host_bytes)
        plan = plan_for(workload, machine)
        if plan.error is not None:
            if machine.is_budget_given and self.share == 1.0:
                raise plan.error
            least, self.is_at_floor = plan.error.floor_bytes, True
            self.say(
                f"the step is predicted to need {least / GIB:.2f} GiB of the "
                f"{budget_bytes / GIB:.2f} that are free; trying with the least memory"
            )
            plan = plan_for(workload, replace(machine, budget_bytes=least))
        if plan.step is not None and plan.step.batch.settings.embedding == "host":
            self._send_embedding()
        if plan.step is not None and any(plan.step.offload):
            plan = self._with_host_memory(plan, kind, held_bytes)
        if not self.plans:
            self.say(plan.sentence())
        return plan

    def _send_embedding(self) -> None:
        """From now on its table is on the host, also for batches that would have had room."""
        settings = self.workload.settings
        if settings.embedding != "host" and self._move_embedding is not None:
            self._move_embedding()
            self.workload = replace(self.workload, settings=replace(settings, embedding="host"))

    def _with_host_memory(self, plan: MemoryPlan, kind: BatchKind, held_bytes: int) -> MemoryPlan:
        """The plan, or one without offloading if the host gives no page-locked memory."""
        assert plan.step is not None
        if self._lane is None:
            self._lane = CopyLane(self.device, HostPool(plan.machine.host_bytes))
        try:
            self._lane.pool.reserve(plan.step.host_blocks())
        except HostMemoryRefused as error:
            self._can_offload, self._lane = False, None
            self.say(f"nothing is offloaded to the host: {error}")
            return self._new_plan(kind, held_bytes)
        return plan
