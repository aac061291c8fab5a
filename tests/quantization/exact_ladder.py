"""Exact solvers for the ladder's problem, written apart from the ladder: fewest price within a cap.

An item is a list of (bytes, price). `enumerate_all` tries every combination. `front` adds item
after item to the set of all (bytes, price) that no other one beats, which answers every cap at once
and handles whole models.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right


def options_of(items):
    return [[(option.bytes, option.price) for option in item.options] for item in items]


def enumerate_all(items, cap):
    """Least sum of prices; infinite if nothing fits."""
    best = math.inf
    for chosen in itertools.product(*options_of(items)):
        if sum(size for size, _ in chosen) <= cap:
            best = min(best, math.fsum(price for _, price in chosen))
    return best


def front(items, most):
    """(bytes rising, prices falling) of all sums that are not beaten, up to `most` bytes."""
    sums = [(0, 0.0)]
    for options in options_of(items):
        merged = sorted(
            (size + more, price + added)
            for size, price in sums
            for more, added in options
            if size + more <= most
        )
        sums, least = [], math.inf
        for size, price in merged:
            if price < least:
                sums.append((size, price))
                least = price
    return [size for size, _ in sums], [price for _, price in sums]


def least_price(solved, cap):
    """The answer of a `front` for one cap."""
    sizes, prices = solved
    index = bisect_right(sizes, cap)
    return prices[index - 1] if index else math.inf
