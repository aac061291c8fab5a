"""Choose a rung of precision for each weight so that all fit into a cap and the prices are least.

    minimise  sum of the chosen rungs' prices   with   sum of their bytes <= cap

How: all weights start on the rung of the fewest bytes. The move that takes away the most price a
byte is made first, which walks along the lower convex hull of each weight's rungs. A move that does
not fit never will, as room only shrinks; in its place comes the weight's next best move, off the
hull, so that what the large ones leave is filled in the same pass.

    Within one item: the fractional optimum is the hull's moves in this order, the last one cut. So
    the sum is at most the price of the first move that did not fit above the exact optimum.
    Monotone: where two caps part, the larger one makes a move that the smaller one has no room for,
    and whatever the smaller one does in its room is worth less a byte.

`reprice` moves from a map that is in use to one for new prices, and demotes something only for what
is worth more than `ratio` times as much a byte: prices are noisy, and every change moves weights.
Nothing here knows of torch: prices come from `prices.py`, bytes from `budget.py`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from colab_qlora.errors import UserError
from colab_qlora.quantization.precision_map import (
    Change,
    LadderItem,
    Option,
    Placement,
    PrecisionMap,
    changes,
    check_item,
    other_names,
)

__all__ = [
    "HYSTERESIS",
    "Change",
    "LadderItem",
    "Option",
    "Placement",
    "PrecisionMap",
    "changes",
    "choose_rungs",
    "reprice",
]

# promoting has to be worth this many times what is given up for it, a byte
HYSTERESIS = 1.5
_ANY_ROOM = 2**62


def choose_rungs(items: Sequence[LadderItem], cap_bytes: int) -> PrecisionMap:
    """The rungs of the least price that were found within the cap; the same in any order of items.

    Raises:
        UserError: not even the smallest rungs fit, an item twice or without its plain rung, bytes
            or a price that is negative or no number.
    """
    climb = _Climb(items, cap_bytes)
    climb.fill()
    return climb.map()


def reprice(
    current: PrecisionMap,
    items: Sequence[LadderItem],
    cap_bytes: int,
    ratio: float = HYSTERESIS,
) -> PrecisionMap:
    """Move a map that is in use towards new prices, with hysteresis.

    Room that is free is filled. Beyond that a weight is promoted where it saves more than `ratio`
    times the price a byte, and in all, of what is demoted for it. The sum of the new prices never
    grows, except where the cap has shrunk below the map.

    Args:
        current: the map in use.
        items: the same weights with their new prices.
        cap_bytes: the same cap, or another one.
        ratio: 1 or more.

    Raises:
        UserError: as `choose_rungs`; other weights than in the map; a ratio below 1.
    """
    if not 1 <= ratio < math.inf:
        raise UserError("the hysteresis of re-pricing is below 1", got=ratio, allowed="1 or more")
    climb = _Climb(items, cap_bytes)
    if current.placements.keys() != climb.items.keys():
        raise other_names(current.placements, climb.items)
    for name, placement in current.placements.items():
        climb.put(name, placement.rung)
    while climb.room < 0:
        name, option = climb.cheapest_demotions()[0]
        climb.move(name, option, "demoted: the cap is lower than what the weights had")
    climb.fill()
    while climb.swap(ratio):
        climb.fill()
    return climb.map()


class _Climb:
    """Items on their way up; `room` is what is left of the cap in bytes."""

    def __init__(self, items: Iterable[LadderItem], cap_bytes: int) -> None:
        self.items: dict[str, LadderItem] = {}
        for item in items:
            check_item(item, self.items)
            self.items[item.name] = item
        self.at = {
            name: min(item.options, key=lambda option: (option.bytes, option.price, option.rung))
            for name, item in self.items.items()
        }
        self.why: dict[str, str] = {}
        self.cap_bytes = cap_bytes
        self.room = cap_bytes - sum(option.bytes for option in self.at.values())
        if self.room < 0:
            raise UserError(
                "the byte cap is below what the weights need on their smallest rungs",
                got=f"{cap_bytes} bytes",
                allowed=f"{cap_bytes - self.room} bytes or more",
                do="Raise quantization_budget",
            )

    def put(self, name: str, rung: str) -> None:
        option = self.items[name].option(rung)
        if option is None:
            raise UserError(
                f"{name} stands on a rung that has no price",
                got=rung,
                allowed=", ".join(option.rung for option in self.items[name].options),
                do="Pass prices of all rungs in use",
            )
        self.room += self.at[name].bytes - option.bytes
        self.at[name] = option

    def move(self, name: str, option: Option, why: str) -> None:
        self.put(name, option.rung)
        self.why[name] = why

    def best_move(self, name: str, room: int) -> tuple[tuple[float, float, str], Option] | None:
        """The move up within `room` that saves most a byte, and its key: the best is least."""
        here, best = self.at[name], None
        for option in self.items[name].options:
            added, saved = option.bytes - here.bytes, here.price - option.price
            if saved <= 0 or not 0 <= added <= room:
                continue
            worth = saved / added if added else math.inf
            guard = (here.tie_break - option.tie_break) / max(1, added)
            key = (-worth, -guard, name)
            # of equal worth the longer one, which is where the shorter one would go on to
            if best is None or (key, -added) < (best[0], here.bytes - best[1].bytes):
                best = key, option
        return best

    def fill(self) -> None:
        """Make the best moves until none fits."""
        heap: list[tuple[float, float, str]] = []
        for name in self.items:
            if found := self.best_move(name, self.room):
                heapq.heappush(heap, found[0])
        while heap:
            key = heapq.heappop(heap)
            found = self.best_move(key[2], self.room)
            if found is None:
                continue
            if found[0] != key:
                # the best one does not fit any more
                heapq.heappush(heap, found[0])
                continue
            name, (_, option) = key[2], found
            added = option.bytes - self.at[name].bytes
            self.move(name, option, f"promoted: saves {_worth(self.at[name], option)}, +{added} B")
            if again := self.best_move(name, self.room):
                heapq.heappush(heap, again[0])

    def cheapest_demotions(self, besides: str = "") -> list[tuple[str, Option]]:
        """For each item the move down that costs least a byte, the cheapest first."""
        found = []
        for name, here in self.at.items():
            downs = [o for o in self.items[name].options if o.bytes < here.bytes]
            if downs and name != besides:
                option = min(downs, key=lambda o: (_slope(o, here), -o.bytes))
                found.append((_slope(option, here), name, option))
        return [(name, option) for _, name, option in sorted(found, key=lambda f: f[:2])]

    def swap(self, ratio: float) -> bool:
        """Promote the best item that others have to be demoted for; False if none is worth it."""
        moves = sorted(
            found for name in self.items if (found := self.best_move(name, self.cap_bytes))
        )
        for (negative_worth, _, name), option in moves:
            here, demoted, lost = self.at[name], [], 0.0
            room = self.room - (option.bytes - here.bytes)
            for other, down in self.cheapest_demotions(besides=name):
                if room >= 0 or not _slope(down, self.at[other]) * ratio < -negative_worth:
                    break
                demoted.append((other, down))
                lost += down.price - self.at[other].price
                room += self.at[other].bytes - down.bytes
            # what is demoted may be larger than what is promoted, so the sums have to agree too
            if room < 0 or not lost * ratio < here.price - option.price:
                continue
            for other, down in demoted:
                self.move(
                    other, down, f"demoted for {name}: saved only {_worth(down, self.at[other])}"
                )
            self.move(name, option, f"promoted: saves {_worth(here, option)}")
            return True
        return False

    def map(self) -> PrecisionMap:
        placements = {}
        for name, item in self.items.items():
            here, plain = self.at[name], item.option(item.plain_rung)
            assert plain is not None
            why = self.why.get(name) or self._why_it_stays(name)
            placements[name] = Placement(
                here.rung, here.bytes, here.price, plain.rung, plain.bytes, plain.price, why
            )
        return PrecisionMap(placements, self.cap_bytes)

    def _why_it_stays(self, name: str) -> str:
        found = self.best_move(name, _ANY_ROOM)
        if found is None:
            return "stays: nothing saves more"
        option = found[1]
        added = option.bytes - self.at[name].bytes
        saved = _worth(self.at[name], option)
        return f"stays: {option.rung} would save {saved}, but +{added} B do not fit"


def _slope(lower: Option, upper: Option) -> float:
    """Price that a byte of the way up saves."""
    return (lower.price - upper.price) / (upper.bytes - lower.bytes)


def _worth(lower: Option, upper: Option) -> str:
    saved, added = lower.price - upper.price, upper.bytes - lower.bytes
    return f"{saved:.3g}" + (f" ({saved / added * 2**20:.3g} a MiB)" if added else "")
