"""Exact solvers for the planner's problem, written apart from the planner.

`enumerate_all` tries every action of every item. `dynamic_programme` handles whole models whose
sizes have a large common divisor: for each bound on what a layer offloads it adds layer after layer
to a table over (GPU units, host units). Both return the fewest seconds, infinite if nothing fits.
Copies have to hide, except, where `may_expose`, those of items that cannot be rebuilt.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np

KEEP, OFFLOAD, RECOMPUTE = range(3)


def actions_of(item, limits):
    """What may be done with an item."""
    actions = [KEEP]
    if item.can_offload and limits is not None:
        actions.append(OFFLOAD)
    if not item.must_keep_or_offload:
        actions.append(RECOMPUTE)
    return actions


def exposed_s(size, limits):
    """Seconds that a layer waits which copies `size` bytes each way."""
    down = size / limits.bytes_down_per_s - limits.share * limits.forward_s
    up = size / limits.bytes_up_per_s - limits.share * limits.backward_s
    # a copy that fills the time to the last byte may miss it by rounding
    return sum(late for late in (down, up) if late > 1e-12)


def enumerate_all(items, settings, budget_bytes, limits, *, may_expose=False):
    """Fewest seconds over all actions of all items and all settings."""
    best = math.inf
    fixed = [
        (sum(s.fixed_bytes for s in choice), sum(s.extra_s for s in choice))
        for choice in itertools.product(*settings)
    ]
    for actions in itertools.product(*(actions_of(item, limits) for item in items)):
        gpu_bytes, seconds, layer_bytes, exposes = 0, 0.0, defaultdict(int), set()
        for item, action in zip(items, actions, strict=True):
            if action == KEEP:
                gpu_bytes += item.bytes
            elif action == RECOMPUTE:
                seconds += item.recompute_s
            else:
                layer_bytes[item.layer] += item.bytes
                if not item.must_keep_or_offload:
                    exposes.add(item.layer)
        if layer_bytes:
            if sum(layer_bytes.values()) > limits.host_bytes_cap:
                continue
            late = {layer: exposed_s(size, limits) for layer, size in layer_bytes.items()}
            if any(late[layer] and (layer in exposes or not may_expose) for layer in late):
                continue
            seconds += sum(late.values())
            gpu_bytes += limits.layers_in_flight * max(layer_bytes.values())
        for fixed_bytes, extra_s in fixed:
            if fixed_bytes + gpu_bytes <= budget_bytes:
                best = min(best, seconds + extra_s)
    return best


def dynamic_programme(items, settings, budget_bytes, limits):
    """Fewest seconds, by a table over units of memory; no copy is exposed."""
    unit = math.gcd(*(item.bytes for item in items))
    has_cap = limits is not None and limits.host_bytes_cap < sum(item.bytes for item in items)
    layers = defaultdict(list)
    for item in items:
        layers[item.layer].append(item)
    choices = {layer: layer_choices(members, unit, limits) for layer, members in layers.items()}
    sums = {0} | {host for found in choices.values() for _, host, _ in found}
    best = math.inf
    for most in sorted(sums):
        in_flight = most * unit * limits.layers_in_flight if most else 0
        allowed = {
            layer: [choice for choice in found if choice[1] <= most]
            for layer, found in choices.items()
        }
        best = min(best, _fill(allowed, settings, budget_bytes - in_flight, limits, unit, has_cap))
    return best


def layer_choices(members, unit, limits):
    """(GPU units, host units, seconds) of those of a layer's choices that no other one beats."""
    found = {}
    for actions in itertools.product(*(actions_of(item, limits) for item in members)):
        pairs = list(zip(members, actions, strict=True))
        gpu, host = (
            sum(item.bytes for item, action in pairs if action == wanted) // unit
            for wanted in (KEEP, OFFLOAD)
        )
        if host and exposed_s(host * unit, limits):
            continue
        seconds = math.fsum(item.recompute_s for item, action in pairs if action == RECOMPUTE)
        found[gpu, host] = min(seconds, found.get((gpu, host), math.inf))
    ranked = sorted((seconds, gpu, host) for (gpu, host), seconds in found.items())
    front = []
    for seconds, gpu, host in ranked:
        if not any(g <= gpu and h <= host for g, h, _ in front):
            front.append((gpu, host, seconds))
    return front


def _fill(choices, settings, room_bytes, limits, unit, has_cap):
    if not has_cap:
        choices = {n: [(gpu, 0, s) for gpu, _, s in found] for n, found in choices.items()}
    most = sum(max(host for _, host, _ in found) for found in choices.values())
    cap = min(limits.host_bytes_cap // unit, most) if has_cap else 0
    fixed = [
        ((room_bytes - sum(s.fixed_bytes for s in choice)) // unit, sum(s.extra_s for s in choice))
        for choice in itertools.product(*settings)
    ]
    units = max(room for room, _ in fixed)
    if units < 0:
        return math.inf
    # more memory than all items need is of no use
    units = min(units, sum(max(gpu for gpu, _, _ in found) for found in choices.values()))
    cap = min(cap, most * len(choices))
    table = np.zeros((units + 1, cap + 1))  # (GPU units, host units) at most
    for found in choices.values():
        new = np.full_like(table, math.inf)
        for gpu, host, seconds in found:
            if gpu <= units and host <= cap:
                part = new[gpu:, host:]
                np.minimum(part, table[: units + 1 - gpu, : cap + 1 - host] + seconds, out=part)
        table = new
    return min(
        (table[min(room, units), cap] + extra_s for room, extra_s in fixed if room >= 0),
        default=math.inf,
    )
