"""Precision changes during a training: at a few points prices are measured anew, and the map moves.

What a weight's error costs is not known before the training: gradients on the user's rows look
different once the adapters have learnt the form of the answers. So at 2, 10 and 33 % of the steps

    prices and E[x_j^2]    live_prices.py, on the micro-batches that were trained on last
    the map moves          ladder.reprice, under the same cap, with hysteresis
    weights change         remaking.py, from the 16-bit source; demoted first, then promoted

so that memory never exceeds the cap by more than one matrix. Adapters and their optimiser state are
not touched. The last point lies at a third: what is left is trained on a base that stays.

A weight that trains itself, that the map does not name, or that is under a DoRA layer keeps what it
has: PEFT takes the norms of DoRA's weights, and of int8 it would take those of the codes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.dynamic import DynamicQuantization, MapChange
from colab_qlora.quantization.ladder import HYSTERESIS, reprice
from colab_qlora.quantization.live_prices import LivePrices, smoothed
from colab_qlora.quantization.precision_map import Change, LadderItem, PrecisionMap
from colab_qlora.quantization.remaking import remake
from colab_qlora.quantization.rung_prices import ladder_items
from colab_qlora.quantization.weight_source import SourceGone

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ScheduleSettings:
    """When precision may change during a training, and how readily.

    Attributes:
        points: shares of the run's optimiser steps, each above 0 and below 1.
        micro_batches: how many of the last micro-batches are measured on, at most.
        rows: as many rows are enough; fewer micro-batches are taken then.
        hysteresis: promoting has to be worth this many times what is given up for it, 1 or more.
        smoothing: share of the earlier prices in the average with the new ones, 0 to below 1; see
            `live_prices`.
        enabled: False changes nothing during the training.

    Raises:
        UserError: a number out of its range.
    """

    points: tuple[float, ...] = (0.02, 0.10, 0.33)
    micro_batches: int = 4
    rows: int = 16
    hysteresis: float = HYSTERESIS
    smoothing: float = 0.5
    enabled: bool = True

    def __post_init__(self) -> None:
        checks = (
            ("points", all(0 < point < 1 for point in self.points), "shares between 0 and 1"),
            ("micro_batches", self.micro_batches >= 1, "1 or more"),
            ("rows", self.rows >= 1, "1 or more"),
            ("hysteresis", 1 <= self.hysteresis < math.inf, "1 or more"),
            ("smoothing", 0 <= self.smoothing < 1, "0 or more, below 1"),
        )
        for name, is_right, allowed in checks:
            if not is_right:
                raise UserError(
                    f"{name} of the quantisation schedule is out of range",
                    got=getattr(self, name),
                    allowed=allowed,
                )

    def due_steps(
        self, total_steps: int, rows_a_micro_batch: int = 1, micro_batches_a_step: int = 1
    ) -> tuple[int, ...]:
        """The optimiser steps after which prices are measured, rising.

        None is earlier than enough micro-batches can have been kept, and none follows the last
        step, after which nothing is trained any more.
        """
        wanted = min(self.micro_batches, math.ceil(self.rows / max(1, rows_a_micro_batch)))
        first = math.ceil(wanted / max(1, micro_batches_a_step))
        # 0.07 * 100 is a little above 7
        steps = {max(first, math.ceil(round(p * total_steps, 6))) for p in self.points}
        return tuple(sorted(step for step in steps if step < total_steps))


class LastBatches:
    """The last micro-batches of a training, as many as are measured on; nothing is copied.

    They have been trained on already, so that measuring draws no row and no random number.
    """

    def __init__(self, settings: ScheduleSettings) -> None:
        self._settings = settings
        self._kept: deque[Batch] = deque(maxlen=settings.micro_batches)

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Keep the tensors of one micro-batch, the model's keyword arguments."""
        tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.ndim}
        rows, most = _rows(tensors), self._settings.rows
        if rows > most:
            tensors = {k: v[:most] if v.shape[0] == rows else v for k, v in tensors.items()}
        self._kept.append(tensors)
        while sum(map(_rows, list(self._kept)[1:])) >= most:
            self._kept.popleft()

    @property
    def are_enough(self) -> bool:
        rows = sum(map(_rows, self._kept))
        return len(self._kept) == self._kept.maxlen or rows >= self._settings.rows

    def batches(self) -> list[Batch]:
        return list(self._kept)

    def clear(self) -> None:
        self._kept.clear()


@dataclass(frozen=True)
class PointResult:
    """What came of one point.

    Attributes:
        changes: weights that stand on another rung now, in the order in which they were made.
        price_before, price_after: of the maps, nat^2, both by the smoothed new prices.
        stopped_by: what kept the rest of the changes from being made, or None.
    """

    changes: tuple[MapChange, ...]
    price_before: float
    price_after: float
    stopped_by: SourceGone | None = None

    def words(self, most: int = 3) -> str:
        """Like "2 weights changed precision: layers.4.mlp.down_proj nf4_64 -> int8, ...".

        Args:
            most: changes that are named.
        """
        if not self.changes:
            return "no weight changed precision"
        count = len(self.changes)
        named = [
            f"{change.name.removeprefix('model.')} {change.before} -> {change.after}"
            for change in sorted(self.changes, key=lambda change: -change.added_bytes)[:most]
        ]
        if count > len(named):
            named.append(f"{count - len(named)} more")
        share = self.price_after / self.price_before - 1 if self.price_before else 0.0
        weights = "1 weight" if count == 1 else f"{count} weights"
        return f"{weights} changed precision: {', '.join(named)}; price {share:+.0%}"


def move_map(
    model: Any,
    state: DynamicQuantization,
    measured: LivePrices,
    settings: ScheduleSettings,
    step: int,
) -> PointResult:
    """Move a model's map towards new prices and make the weights that change anew.

    The state's map, prices and history follow; E[x_j^2] is replaced for weights that change.

    Args:
        model: in training, between two optimiser steps.
        state: the model's.
        measured: on this model.
        settings: hysteresis and smoothing.
        step: optimiser steps so far, for the history.

    Raises:
        torch.OutOfMemoryError: while a weight was made anew; map and history say which were made.
    """
    # errors of bare numbers, which stand in for prices without data, are nothing to average with
    earlier = state.prices if state.has_data else {}
    state.prices = smoothed(earlier, measured.prices, settings.smoothing)
    state.has_data = True
    ladder = _movable(model, state)
    wanted = _wanted(state, ladder, settings.hysteresis)
    before = _price(ladder, state.map)
    made: list[MapChange] = []

    def note(change: Change) -> None:
        made.append(
            MapChange(
                step, change.name, change.before, change.after, change.added_bytes, change.why
            )
        )
        state.history.append(made[-1])

    stopped_by = remake(model, state, wanted, measured.mean_square, done=note)
    return PointResult(tuple(made), before, _price(ladder, state.map), stopped_by)


def _movable(model: Any, state: DynamicQuantization) -> list[LadderItem]:
    """What may move: frozen weights that the map names, with prices, and not under DoRA."""
    # PEFT keeps a magnitude for each adapter that is DoRA's
    under_dora = {
        id(layer.base_layer)
        for layer in model.modules()
        if getattr(layer, "lora_magnitude_vector", None)
    }
    frozen = {
        item.name
        for item in weight_items(model)
        if not item.weight.requires_grad and not under_dora & set(map(id, item.modules))
    }
    names = frozen & state.map.placements.keys()
    prices = {name: rungs for name, rungs in state.prices.items() if name in names}
    return [
        item
        for item in ladder_items(model, prices)
        if item.option(state.map[item.name].rung) is not None
    ]


def _wanted(state: DynamicQuantization, ladder: list[LadderItem], ratio: float) -> PrecisionMap:
    """The map that the new prices ask for; what cannot move keeps its place and its bytes."""
    names = {item.name for item in ladder}
    present = state.map.placements
    staying = {name: p for name, p in present.items() if name not in names}
    room = state.cap_bytes - sum(p.bytes for p in staying.values())
    moving = PrecisionMap({name: present[name] for name in present if name in names}, room)
    moved = reprice(moving, ladder, room, ratio) if ladder else moving
    placements = {name: staying.get(name) or moved[name] for name in present}
    return PrecisionMap(placements, state.cap_bytes)


def _price(ladder: list[LadderItem], precision: PrecisionMap) -> float:
    """Of a map by the ladder's prices, over what can move."""
    options = (item.option(precision[item.name].rung) for item in ladder)
    return math.fsum(option.price for option in options if option is not None)


def _rows(batch: Mapping[str, torch.Tensor]) -> int:
    return next((tensor.shape[0] for tensor in batch.values()), 0)
