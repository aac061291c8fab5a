"""Which saved tensors of each layer to keep, to offload and to recompute.

A plan minimises the seconds a step that are spent on recomputing and on copies that do not hide,

    seconds = sum of the chosen settings' extra_s + sum of recompute_s + exposed copy time

    GPU bytes = settings' fixed_bytes + kept bytes + layers_in_flight * most bytes a layer offloads
                <= budget
    host bytes = offloaded bytes <= host_bytes_cap
    copies of a layer <= share of its compute time, in each direction

The last line binds all tensors that can be rebuilt: a byte that waits for its copies costs 40 ps at
50 GB/s and 200 at 10 GB/s, and its rebuild mostly less (1 to 18 ps on an H100, 40 to 310 on a T4,
where most copies hide). What cannot be rebuilt may exceed it, and the wait is counted.

What is assumed:
    Costs add. Every tensor of the set is needed by some backward pass whatever else is kept, and
    q, k, v (as gate, up) are rebuilt by separate parts of one GEMM, so no rebuild comes for free
    with another one.
    The peak is at the end of the forward pass, when everything kept is there. What a layer needs
    while it is rebuilt is the same for all layers and part of a setting's fixed_bytes.

How: each combination of settings is tried with each set of names to offload, and what memory is
left is filled by seconds saved per byte. Without offloading that is provably within one item's
seconds of the optimum, and more memory is never slower (both but for SAME_WORTH). With offloading,
tests found it within one item too if layers are alike.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from colab_qlora.activations.offload_sets import offload_sets
from colab_qlora.activations.plan import BudgetTooSmall, CopyLimits, Item, Plan, Setting
from colab_qlora.errors import UserError

# items whose seconds per byte differ by less are filled name by name, so that layers look alike;
# predicted times are no better than this
SAME_WORTH = 0.01
# gains below this part of a plan's seconds are rounding
_ROUNDING = 1e-9


def make_plan(
    items: Sequence[Item],
    settings: Sequence[Sequence[Setting]],
    budget_bytes: int,
    copy_limits: CopyLimits | None = None,
) -> Plan:
    """The fastest plan found within all limits; the same for the same arguments in any order.

    Args:
        items: the tensors of all layers.
        settings: for each choice its alternatives; one alternative for what is simply there (the
            weights, say).
        budget_bytes: GPU memory for all that settings and items name.
        copy_limits: None to offload nothing.

    Raises:
        BudgetTooSmall: not even what cannot be rebuilt fits.
        UserError: a choice without alternatives, one name twice in a layer, a size or time that
            is negative or no number, a copy rate of 0.
    """
    return Planner(items, copy_limits).plan(settings, budget_bytes)


class Planner:
    """`make_plan` for many budgets and settings: what the tensors alone decide is worked out once.

    Args:
        items, copy_limits: as in `make_plan`.

    Raises:
        UserError: as `make_plan`.
    """

    def __init__(self, items: Sequence[Item], copy_limits: CopyLimits | None = None) -> None:
        _check(items, (), copy_limits)
        self.items, self.limits = _in_order(items), copy_limits
        self._candidates = [
            _Candidate(self.items, moved, copy_limits)
            for moved in offload_sets(self.items, copy_limits)
        ]

    @property
    def least_bytes(self) -> int:
        """GPU memory of what cannot be rebuilt, where most of it is offloaded."""
        return min(candidate.forced_bytes for candidate in self._candidates)

    def plan(self, settings: Sequence[Sequence[Setting]], budget_bytes: int) -> Plan:
        """As `make_plan`."""
        _check((), settings, None)
        best_s, best = math.inf, None
        for choice in sorted(itertools.product(*settings), key=_extra_s):
            if _extra_s(choice) >= best_s:
                break
            room = budget_bytes - _fixed_bytes(choice)
            for candidate in self._candidates:
                # of equals the first wins, which has the faster settings and offloads less
                limit_s = (best_s - _extra_s(choice)) * (1 - _ROUNDING)
                spent_s = candidate.seconds(room, limit_s)
                if spent_s < limit_s:
                    best_s, best = _extra_s(choice) + spent_s, (choice, candidate, room)
        if best is None:
            raise _too_small(self.items, settings, budget_bytes, self.limits, self._candidates)
        return _plan(self.items, *best, self.limits)


class _Candidate:
    """A set of items to offload; the others fill the memory in their order.

    Attributes:
        items: all items, as `_in_order` has them.
        moved: positions of those to offload.
        forced_bytes: GPU memory without anything that can be rebuilt.
        exposed_s: seconds a step that the copies do not hide.
    """

    def __init__(
        self, items: Sequence[Item], moved: frozenset[int], limits: CopyLimits | None
    ) -> None:
        self.items, self.moved = items, moved
        in_flight, self.exposed_s = _copies([items[index] for index in moved], limits)
        stay = [item for index, item in enumerate(items) if index not in moved]
        self.held = [item for item in stay if item.must_keep_or_offload]
        self.forced_bytes = in_flight + sum(item.bytes for item in self.held)
        self.rest = stay[len(self.held) :]
        self._bytes_to = list(itertools.accumulate(item.bytes for item in self.rest))
        # summed from the end, so that keeping all of them leaves exactly 0
        times = (item.recompute_s for item in reversed(self.rest))
        self._seconds_from = list(itertools.accumulate(times, initial=0.0))[::-1]

    def seconds(self, room: int, limit_s: float) -> float:
        """Seconds a step in `room` bytes; infinite if that is too few or `limit_s` not met."""
        room -= self.forced_bytes
        if room < 0:
            return math.inf
        fits = bisect_right(self._bytes_to, room)
        spent_s = self.exposed_s + self._seconds_from[fits]
        if fits == len(self.rest):
            return spent_s
        room -= self._bytes_to[fits - 1] if fits else 0
        # no item further on is worth more a byte than this one, give or take SAME_WORTH
        if spent_s - room * _worth(self.rest[fits]) / (1 - SAME_WORTH) >= limit_s:
            return math.inf
        for item in self.rest[fits:]:
            if item.bytes <= room:
                room -= item.bytes
                spent_s -= item.recompute_s
        return spent_s

    def stored(self, room: int) -> tuple[list[Item], list[Item]]:
        """The items kept and offloaded in `room` bytes: those of `seconds`, with fewer copies."""
        room -= self.forced_bytes
        kept = list(self.held)
        for item in self.rest:
            if item.bytes <= room:
                room -= item.bytes
                kept.append(item)
        offloaded: list[Item] = []
        # what still fits need not leave; the last layers' tensors would be back first
        for index in sorted(self.moved, key=lambda index: (-self.items[index].layer, index)):
            item = self.items[index]
            stays = item.bytes <= room and not self.exposed_s
            room -= item.bytes if stays else 0
            (kept if stays else offloaded).append(item)
        return kept, offloaded


def _copies(offloaded: Iterable[Item], limits: CopyLimits | None) -> tuple[int, float]:
    """GPU bytes that copies in flight hold, and the seconds that layers wait for them."""
    layer_bytes: dict[int, int] = defaultdict(int)
    for item in offloaded:
        layer_bytes[item.layer] += item.bytes
    if limits is None or not layer_bytes:
        return 0, 0.0
    exposed_s = sum(limits.exposed_s(size) for size in layer_bytes.values())
    return limits.layers_in_flight * max(layer_bytes.values()), exposed_s


def _in_order(items: Sequence[Item]) -> list[Item]:
    """What cannot be rebuilt; then by seconds saved per byte, by name, from the last layer back."""

    def name_then_layer(item: Item) -> tuple[str, int]:
        return item.name, -item.layer

    held = sorted((item for item in items if item.must_keep_or_offload), key=name_then_layer)
    rest = [item for item in items if not item.must_keep_or_offload]
    ranked, rank, first_worth = [], 0, math.inf
    for item in sorted(rest, key=lambda item: (-_worth(item), name_then_layer(item))):
        if _worth(item) < first_worth * (1 - SAME_WORTH):
            rank, first_worth = rank + 1, _worth(item)
        ranked.append((rank, name_then_layer(item), item))
    return held + [item for _, _, item in sorted(ranked, key=lambda entry: entry[:2])]


def _worth(item: Item) -> float:
    """Seconds that a byte saves."""
    return item.recompute_s / item.bytes if item.bytes else math.inf


def _extra_s(choice: Iterable[Setting]) -> float:
    return sum(setting.extra_s for setting in choice)


def _fixed_bytes(choice: Iterable[Setting]) -> int:
    return sum(setting.fixed_bytes for setting in choice)


def _plan(
    items: Sequence[Item],
    choice: Sequence[Setting],
    candidate: _Candidate,
    room: int,
    limits: CopyLimits | None,
) -> Plan:
    kept, offloaded = candidate.stored(room)
    recomputed = set(items).difference(kept, offloaded)
    in_flight, exposed_s = _copies(offloaded, limits)
    layers = 1 + max((item.layer for item in items), default=-1)
    return Plan(
        keep=_names(kept, layers),
        offload=_names(offloaded, layers),
        recompute=_names(recomputed, layers),
        settings=tuple(setting.name for setting in choice),
        recompute_s=math.fsum(item.recompute_s for item in recomputed),
        exposed_s=exposed_s,
        setting_s=_extra_s(choice),
        gpu_bytes=_fixed_bytes(choice) + in_flight + sum(item.bytes for item in kept),
        host_bytes=sum(item.bytes for item in offloaded),
    )


def _names(items: Iterable[Item], layers: int) -> tuple[frozenset[str], ...]:
    names: list[set[str]] = [set() for _ in range(layers)]
    for item in items:
        names[item.layer].add(item.name)
    return tuple(frozenset(layer) for layer in names)


def _too_small(
    items: Sequence[Item],
    settings: Sequence[Sequence[Setting]],
    budget_bytes: int,
    limits: CopyLimits | None,
    candidates: Sequence[_Candidate],
) -> BudgetTooSmall:
    smallest = [min(choice, key=lambda setting: setting.fixed_bytes) for choice in settings]
    candidate = min(candidates, key=lambda candidate: candidate.forced_bytes)
    parts: dict[str, int] = defaultdict(int)
    for part in smallest:
        parts[part.name] += part.fixed_bytes
    for item in candidate.held:
        parts[item.name] += item.bytes
    parts["copies in flight"] += candidate.forced_bytes - sum(i.bytes for i in candidate.held)
    floor_bytes = sum(parts.values())
    lasting = sum(part.fixed_bytes for part in smallest if not part.grows_with_tokens)
    share = (budget_bytes - lasting) / (floor_bytes - lasting) if budget_bytes > lasting else None
    held = [item for item in items if item.must_keep_or_offload]
    held_bytes = sum(item.bytes for item in held)
    host_bytes = None
    if limits is not None and limits.host_bytes_cap < held_bytes:
        more = replace(limits, host_bytes_cap=held_bytes)
        with contextlib.suppress(BudgetTooSmall):
            host_bytes = make_plan(
                held, [[part] for part in smallest], budget_bytes, more
            ).host_bytes
    largest_first = sorted(parts.items(), key=lambda part: -part[1])
    parts = {name: size for name, size in largest_first if size}
    return BudgetTooSmall(floor_bytes, budget_bytes, parts, host_bytes, share)


def _check(
    items: Sequence[Item], settings: Sequence[Sequence[Setting]], limits: CopyLimits | None
) -> None:
    if limits is not None and not min(limits.bytes_down_per_s, limits.bytes_up_per_s) > 0:
        raise UserError(
            "the planner cannot use the rates of copies",
            got=f"{limits.bytes_down_per_s} bytes/s down, {limits.bytes_up_per_s} bytes/s up",
            allowed="more than 0",
            do="Pass copy_limits=None to offload nothing",
        )
    if not all(settings):
        raise UserError(
            "a choice of settings has no alternatives",
            got=[[setting.name for setting in choice] for choice in settings],
            do="Pass one Setting at least for each choice",
        )
    numbers = [(f"{i.name} of layer {i.layer}", i.bytes, i.recompute_s) for i in items]
    numbers += [(s.name, s.fixed_bytes, s.extra_s) for choice in settings for s in choice]
    for name, size, seconds in numbers:
        if not (size >= 0 and 0 <= seconds < math.inf):
            raise UserError(
                f"the planner cannot use the costs of {name}",
                got=f"{size} bytes and {seconds} s",
                allowed="0 or more of each",
            )
    seen = set()
    for item in items:
        if item.layer < 0 or (item.layer, item.name) in seen:
            raise UserError(
                "each tensor of a layer is one item, and layers count from 0",
                got=f"{item.name} of layer {item.layer}",
                do="Pass each tensor once",
            )
        seen.add((item.layer, item.name))
