"""A rung of precision for each weight of a model: what goes into a choice, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from colab_qlora.errors import UserError
from colab_qlora.quantization.budget import NF4_64


@dataclass(frozen=True)
class Option:
    """A weight on one rung.

    Attributes:
        rung: one of `budget.RUNGS`.
        bytes: what it occupies.
        price: expected loss increase against 16 bit, in any unit that all options share.
        tie_break: decides between equal prices a byte (the output error).
    """

    rung: str
    bytes: int
    price: float
    tie_break: float = 0.0


@dataclass(frozen=True)
class LadderItem:
    """A weight and the rungs that it may stand on; weights that share a tensor are one item.

    Attributes:
        name: of the module.
        options: in any order, one a rung.
        plain_rung: where plain NF4 would leave it: nf4_64, or 16bit for embedding and head.
    """

    name: str
    options: tuple[Option, ...]
    plain_rung: str = NF4_64

    def option(self, rung: str) -> Option | None:
        return next((option for option in self.options if option.rung == rung), None)


@dataclass(frozen=True)
class Placement:
    """Where a weight stands, where plain NF4 would leave it, and why it is not there."""

    rung: str
    bytes: int
    price: float
    plain_rung: str
    plain_bytes: int
    plain_price: float
    why: str


@dataclass(frozen=True)
class PrecisionMap:
    """A rung for each weight, by name; `cap_bytes` is what they had to fit into."""

    placements: Mapping[str, Placement]
    cap_bytes: int

    def __getitem__(self, name: str) -> Placement:
        return self.placements[name]

    @property
    def rungs(self) -> dict[str, str]:
        return {name: placement.rung for name, placement in self.placements.items()}

    @property
    def bytes(self) -> int:
        return sum(placement.bytes for placement in self.placements.values())

    @property
    def price_before(self) -> float:
        """Of plain NF4."""
        return math.fsum(placement.plain_price for placement in self.placements.values())

    @property
    def price_after(self) -> float:
        return math.fsum(placement.price for placement in self.placements.values())


@dataclass(frozen=True)
class Change:
    """A weight that stands on another rung than before; prices are the new ones."""

    name: str
    before: str
    after: str
    added_bytes: int
    why: str


def changes(old: PrecisionMap, new: PrecisionMap) -> tuple[Change, ...]:
    """What has to be done to get from one map to the other, in the order of `new`."""
    if old.placements.keys() != new.placements.keys():
        raise other_names(old.placements, new.placements)
    return tuple(
        Change(name, old[name].rung, now.rung, now.bytes - old[name].bytes, now.why)
        for name, now in new.placements.items()
        if now.rung != old[name].rung
    )


def check_item(item: LadderItem, seen: Mapping[str, LadderItem]) -> None:
    """Raise UserError unless an item is new, complete, and has numbers that can be compared."""
    if item.name in seen:
        raise UserError("a weight is on the ladder twice", got=item.name, do="Pass each one once")
    rungs = [option.rung for option in item.options]
    if len(set(rungs)) < len(rungs) or item.plain_rung not in rungs:
        raise UserError(
            f"the rungs of {item.name} are not complete",
            got=", ".join(rungs) or "none",
            allowed=f"each rung once, {item.plain_rung} among them",
        )
    for option in item.options:
        numbers = (option.bytes, option.price, option.tie_break)
        if not all(0 <= number < math.inf for number in numbers):
            raise UserError(
                f"the ladder cannot use the price of {item.name} on {option.rung}",
                got=f"{option.bytes} bytes, price {option.price}, tie-break {option.tie_break}",
                allowed="0 or more of each",
                do="Look whether the loss of the calibration data is infinite or NaN",
            )


def other_names(old: Iterable[str], new: Iterable[str]) -> UserError:
    """The error for two maps that name different weights."""
    missing, extra = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    return UserError(
        "the two maps are not of the same weights",
        got=f"missing {', '.join(missing[:3]) or 'none'}; new {', '.join(extra[:3]) or 'none'}",
        do="Price the model that the map was made for",
    )
