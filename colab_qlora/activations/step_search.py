"""The plan of a training step: `planner.py` on the costs of a real model, checked by its real peak.

The planner adds what is kept to a fixed number of bytes. The peak of a step is not quite such a
sum: while an early layer is rebuilt, later ones have let their tensors go. So the fixed number is
searched: the smallest one whose plan still has its true peak (`phase_costs.py`) inside the budget.

Beside what each layer keeps, a step has settings, each of which saves memory at the price of time:
the embedding's table on the host (its rows are gathered there), the MLP in chunks of tokens
(weights are decoded again for each chunk), gate and up decoded once or twice where they are
recomputed, one weight decoded at a time, smaller chunks of logits. Each combination is planned, the
fastest first, until no further one can win.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cached_property

from colab_qlora.activations.cost_settings import CostSettings
from colab_qlora.activations.phase_costs import Moment, step_moments
from colab_qlora.activations.plan import BudgetTooSmall, CopyLimits, Item, Plan, Setting
from colab_qlora.activations.planner import Planner
from colab_qlora.activations.recording import (
    can_record,
    may_record,
    recording_bytes,
    waits_for_host,
)
from colab_qlora.activations.saved_classes import (
    CLASSES,
    OFFLOADABLE,
    class_bytes,
    names_of,
)
from colab_qlora.activations.step_plan import StepPlan
from colab_qlora.activations.step_settings import settings_of_step, table_bytes
from colab_qlora.activations.step_time import Batch

_SEARCH_STEPS = 12


def plan_step(
    batch: Batch,
    sequences: int,
    budget_bytes: int,
    host_bytes: int = 0,
    *,
    other_bytes: int = 0,
) -> StepPlan:
    """The fastest step whose peak is within the budget.

    Args:
        batch: the micro-batch, its `settings.mlp_tokens`, `holds_gate_up`, `max_weight_bytes` and
            `logits_budget_bytes` are tried first, and kept wherever memory allows.
        sequences: sequences in the micro-batch.
        budget_bytes: most that torch's allocator may have handed out.
        host_bytes: pinned host memory; 0 to offload nothing.
        other_bytes: GPU memory of things that are not the model's.

    Where the layers would wait for the host, a plan that can be recorded (`recording.py`) may be
    faster although it recomputes more: it is looked for as well.

    Raises:
        BudgetTooSmall: no plan fits.
    """
    failure: BudgetTooSmall | None = None
    usual: StepPlan | None = None
    try:
        usual = _fastest(batch, sequences, budget_bytes, host_bytes, other_bytes)
    except BudgetTooSmall as error:
        failure = error.with_traceback(None)
    tries = can_record(batch, sequences) and waits_for_host(batch)
    if tries and usual is not None and not may_record(usual, budget_bytes - usual.peak_bytes):
        room = budget_bytes - recording_bytes(
            batch.shape, batch.rank, batch.tokens, usual.batch.settings
        )
        with contextlib.suppress(BudgetTooSmall):
            alone = _fastest(batch, sequences, room, host_bytes, other_bytes, offloads=False)
            if may_record(alone, budget_bytes - alone.peak_bytes):
                return min(usual, alone, key=lambda found: found.seconds_with(budget_bytes))
    if usual is None:
        assert failure is not None
        raise failure
    return usual


def _fastest(
    batch: Batch,
    sequences: int,
    budget_bytes: int,
    host_bytes: int,
    other_bytes: int,
    *,
    offloads: bool = True,
) -> StepPlan:
    """`plan_step` for layers that run as ever; without `offloads` the embedding alone may leave."""
    best: StepPlan | None = None
    failures: list[BudgetTooSmall] = []
    with_table: dict[CostSettings, float] = {}
    for extra_s, settings in sorted(settings_of_step(batch), key=lambda entry: entry[0]):
        if best is not None and best.plan.seconds <= extra_s:
            break
        table = table_bytes(batch, settings)
        beside = with_table.get(replace(settings, embedding="gpu"))
        if table > host_bytes:
            continue
        pinned = host_bytes - table if offloads else 0
        search = _Search(replace(batch, settings=settings), sequences, pinned, extra_s)
        # nothing is won even if the table's memory is filled with what saves most a byte (what is
        # offloaded saves more, so this may in theory leave out the best; 148 cases showed none)
        if best and beside and beside - table * search.most_worth + extra_s >= best.plan.seconds:
            continue
        try:
            found = search.best(budget_bytes - other_bytes)
        except BudgetTooSmall as error:
            # its frames would hold those of the model's forward pass, and all that is in them
            failures.append(error.with_traceback(None))
            continue
        found = replace(found, other_bytes=other_bytes)
        if settings.embedding == "gpu":
            with_table[settings] = found.plan.seconds - extra_s
        if best is None or found.plan.seconds < best.plan.seconds * (1 - 1e-9):
            best = found
    if best is None:
        smallest = min(failures, key=lambda error: error.floor_bytes)
        raise _with_others(smallest, budget_bytes, other_bytes)
    return best


def can_plan(
    batch: Batch, sequences: int, budget_bytes: int, host_bytes: int = 0, other_bytes: int = 0
) -> bool:
    """Whether any plan fits: those of the settings with the least memory are tried."""
    slowest: dict[str, tuple[tuple[bool, float], CostSettings]] = {}
    for extra_s, settings in settings_of_step(batch):
        found = (not settings.holds_gate_up, extra_s), settings
        place = settings.embedding
        slowest[place] = max(slowest.get(place, found), found, key=lambda entry: entry[0])
    for _, settings in slowest.values():
        pinned = host_bytes - table_bytes(batch, settings)
        if pinned < 0:
            continue
        search = _Search(replace(batch, settings=settings), sequences, pinned, 0.0)
        with contextlib.suppress(BudgetTooSmall):
            search.best(budget_bytes - other_bytes, is_any_enough=True)
            return True
    return False


def _with_others(error: BudgetTooSmall, budget_bytes: int, other_bytes: int) -> BudgetTooSmall:
    parts = {**error.parts, **({"other tensors": other_bytes} if other_bytes else {})}
    return BudgetTooSmall(
        error.floor_bytes + other_bytes,
        budget_bytes,
        dict(sorted(parts.items(), key=lambda part: -part[1])),
        error.host_bytes_needed,
        error.tokens_share,
    )


class _Search:
    """Plans with one combination of settings."""

    def __init__(self, batch: Batch, sequences: int, host_bytes: int, extra_s: float) -> None:
        self.batch, self.sequences, self.extra_s = batch, sequences, extra_s
        # packed documents are attended to one by one, but lie in memory as one sequence
        self.seq_length = batch.tokens // sequences
        self.items = _items(batch, self.seq_length)
        self.limits = _copy_limits(batch, host_bytes)
        self.most_worth = max((i.recompute_s / i.bytes for i in self.items if i.bytes), default=0.0)
        self.input_bytes = sum(item.bytes for item in self.items if item.name == "input")

    @cached_property
    def planner(self) -> Planner:
        return Planner(self.items, self.limits)

    def best(self, budget_bytes: int, *, is_any_enough: bool = False) -> StepPlan:
        """The fastest plan found, or the first one.

        Raises:
            BudgetTooSmall: none fits.
        """
        low = self.beside(frozenset(CLASSES))
        usual = self.beside(frozenset({"input"}))
        # leaves room for nothing but what cannot be rebuilt: the layers' inputs, or their copies
        high = max(usual, budget_bytes - self.planner.least_bytes)
        best: StepPlan | None = None
        for step in range(_SEARCH_STEPS):
            fixed = (usual, high)[step] if step < 2 else (low + high) // 2
            if step == 1 and best is not None:
                continue
            try:
                found = self.plan(budget_bytes, fixed)
            except BudgetTooSmall:
                if step != 1:
                    high = fixed
                continue
            if found.peak.bytes > budget_bytes:
                low = max(low, fixed) if step != 1 else low
                continue
            high = min(high, fixed)
            if best is None or found.plan.seconds <= best.plan.seconds:
                best = found
            if is_any_enough:
                break
        if best is None:
            raise self.too_small(budget_bytes)
        return best

    def plan(self, budget_bytes: int, fixed_bytes: int) -> StepPlan:
        setting = Setting("step", fixed_bytes, self.extra_s)
        plan = self.planner.plan([[setting]], budget_bytes)
        return StepPlan(self.batch, self.sequences, plan, self.moments(plan))

    def moments(self, plan: Plan) -> dict[str, Moment]:
        batch = self.batch
        return step_moments(
            batch.shape,
            self.sequences,
            self.seq_length,
            batch.rank,
            [names_of(classes, batch.shape) for classes in plan.keep],
            batch.settings,
            [names_of(classes, batch.shape) for classes in plan.offload],
        )

    def beside(self, kept: frozenset[str]) -> int:
        """Bytes at the peak beside what layers store, if all of them keep these classes."""
        stored = sum(item.bytes for item in self.items if item.name in kept)
        return self.peak(kept, frozenset()).bytes - stored

    def peak(self, kept: frozenset[str], offloaded: frozenset[str]) -> Moment:
        layers, nothing = self.batch.shape.layers, frozenset[str]()
        each = [(names,) * layers for names in (kept, offloaded, nothing)]
        plan = Plan(each[0], each[1], each[2], (), 0.0, 0.0, 0.0, 0, 0)
        return max(self.moments(plan).values(), key=lambda moment: moment.bytes)

    def too_small(self, budget_bytes: int) -> BudgetTooSmall:
        """The floor of these settings: what cannot be rebuilt is stored, and nothing else."""
        root = frozenset({"input"})
        kept = self.peak(root, frozenset())
        inputs = self.input_bytes
        floor, host_bytes = kept, None
        moved = self.peak(frozenset(), root)
        cap = self.limits.host_bytes_cap if self.limits else 0
        if moved.bytes < kept.bytes:
            if inputs <= cap:
                floor = moved
            elif moved.bytes <= budget_bytes:
                host_bytes = inputs
        parts = {name: size for name, size in floor.parts.items() if size}
        growing = sum(parts.get(n, 0) for n in ("batch", "kept activations", "copies", "at work"))
        lasting = floor.bytes - growing
        share = (budget_bytes - lasting) / growing if budget_bytes > lasting else None
        parts = dict(sorted(parts.items(), key=lambda part: -part[1]))
        return BudgetTooSmall(floor.bytes, budget_bytes, parts, host_bytes, share)


def _items(batch: Batch, seq_length: int) -> list[Item]:
    sizes = class_bytes(batch.shape, batch.tokens, seq_length, batch.rank, batch.settings)
    return [
        Item(
            layer,
            name,
            size,
            batch.recompute_s.get(name, 0.0),
            name in OFFLOADABLE,
            name == "input",
        )
        for layer in range(batch.shape.layers)
        for name, size in sizes.items()
    ]


def _copy_limits(batch: Batch, host_bytes: int) -> CopyLimits | None:
    down, up = batch.profile.copy_down_bytes_per_s, batch.profile.copy_up_bytes_per_s
    if host_bytes <= 0 or min(down, up) <= 0:
        return None
    return CopyLimits(down, up, batch.forward_s, batch.backward_s, host_bytes)
