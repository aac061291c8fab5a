"""Which sets of tensors the planner tries to offload."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from colab_qlora.activations.plan import CopyLimits, Item

# each set of names to offload is tried, 2 to this power of them at most
MOST_OFFLOAD_NAMES = 8


def offload_sets(items: Sequence[Item], limits: CopyLimits | None) -> Iterator[frozenset[int]]:
    """Sets of items to offload: none; for each set of names what hides; ever more that must go."""
    yield frozenset()
    if limits is None:
        return
    layers: dict[int, dict[str, int]] = defaultdict(dict)
    for index, item in sorted(enumerate(items), key=lambda pair: pair[1].layer):
        if item.can_offload:
            layers[item.layer][item.name] = index
    room, seen = limits.hidden_bytes(), {frozenset[int]()}
    for names in _name_sets(items):
        moved, host_room = [], limits.host_bytes_cap
        for layer in layers.values():
            layer_room = room
            for index in [layer[name] for name in names if name in layer]:
                size = items[index].bytes
                if size <= layer_room and size <= host_room:
                    moved.append(index)
                    layer_room, host_room = layer_room - size, host_room - size
        if (found := frozenset(moved)) not in seen:
            seen.add(found)
            yield found
    yield from _exposed_moves(items, layers.values(), limits)


def _exposed_moves(
    items: Sequence[Item], layers: Iterable[dict[str, int]], limits: CopyLimits
) -> Iterator[frozenset[int]]:
    """What cannot be rebuilt of ever more layers, if that does not hide."""
    moved: list[int] = []
    sets, hides, host_room = [], True, limits.host_bytes_cap
    for layer in layers:
        held = [index for index in layer.values() if items[index].must_keep_or_offload]
        size = sum(items[index].bytes for index in held)
        if size <= host_room:
            moved += held
            host_room -= size
            hides = hides and size <= limits.hidden_bytes()
            sets.append(frozenset(moved))
    if not hides:
        yield from sets


def _name_sets(items: Sequence[Item]) -> Iterator[tuple[str, ...]]:
    """Sets of names to offload; of names that are alike in all layers only the first ones."""
    members: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if item.can_offload:
            members[item.name].append(item)

    def what_cannot_be_rebuilt_then_size(name: str) -> tuple[bool, int, str]:
        held = any(item.must_keep_or_offload for item in members[name])
        return not held, -sum(item.bytes for item in members[name]), name

    names = sorted(members, key=what_cannot_be_rebuilt_then_size)[:MOST_OFFLOAD_NAMES]
    alike: dict[frozenset[Item], list[str]] = defaultdict(list)
    for name in names:
        alike[frozenset(replace(item, name="") for item in members[name])].append(name)
    for counts in itertools.product(*(range(len(group) + 1) for group in alike.values())):
        groups = zip(alike.values(), counts, strict=True)
        yield tuple(name for group, count in groups for name in group[:count])
