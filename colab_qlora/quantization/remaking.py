"""Bring a model that trains from the map that it has to another one, weight by weight.

Demoted weights are made first, then promoted ones, so that memory never exceeds the cap by more
than one matrix. After each weight the model's state says what stands where: whatever ends this
early leaves a map that is true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.dynamic import DynamicQuantization, Source, dynamic_state
from colab_qlora.quantization.map_file import RecordedMap, read_map
from colab_qlora.quantization.placing import place
from colab_qlora.quantization.precision_map import Change, PrecisionMap
from colab_qlora.quantization.weight_source import SourceGone

__all__ = ["follow_map", "readable", "remake"]


def readable(source: Source) -> Source:
    """A source that raises `SourceGone` whatever keeps it from giving a matrix."""

    def read(name: str) -> torch.Tensor:
        try:
            return source(name)
        except SourceGone:
            raise
        except (OSError, LookupError, UserError) as error:
            what = f"{type(error).__name__}: {error}"
            raise SourceGone(f"the 16-bit weight of {name} cannot be read", got=what) from error

    return read


def remake(
    model: Any,
    state: DynamicQuantization,
    wanted: PrecisionMap,
    columns: Mapping[str, torch.Tensor],
    again: Iterable[str] = (),
    *,
    done: Callable[[Change], None] = lambda change: None,
) -> SourceGone | None:
    """Make all weights anew that stand on another rung in `wanted`, from the source.

    Args:
        model: with the state.
        state: its map, and E[x_j^2] of the weights that are made, follow.
        wanted: the same weights.
        columns: new E[x_j^2] by name, for those that have one.
        again: names of weights that are made anew on the rung that they have.
        done: called after each weight.

    Returns:
        What kept the rest from being made, or None.

    Raises:
        torch.OutOfMemoryError: while a weight was made.
    """
    before, items = state.map, {item.name: item for item in weight_items(model)}
    names = [n for n, p in wanted.placements.items() if p.rung != before[n].rung]
    names += [name for name in again if name not in names]
    todo = [
        Change(name, before[name].rung, now.rung, now.bytes - before[name].bytes, now.why)
        for name, now in ((name, wanted[name]) for name in names)
    ]
    # new prices and reasons, with the old rungs of what is still to be made
    placements = {**wanted.placements, **{name: before[name] for name in names}}
    state.map = PrecisionMap(dict(placements), state.cap_bytes)
    for change in sorted(todo, key=lambda change: change.added_bytes):
        squares = columns.get(change.name, state.column_weights.get(change.name))
        try:
            weight = readable(state.source)(change.name)
        except SourceGone as error:
            return error
        place(
            model,
            items[change.name],
            change.after,
            weight,
            column_weights=squares,
            compute_dtype=state.compute_dtype,
        )
        if squares is not None:
            state.column_weights[change.name] = squares
        placements[change.name] = wanted[change.name]
        state.map = PrecisionMap(dict(placements), state.cap_bytes)
        done(change)
    return None


def follow_map(model: Any, folder: str | Path, say: Callable[[str], None]) -> None:
    """Give a model's weights the precision that they had when a checkpoint was saved.

    Prices and the cap stay the model's own. Nothing happens without a state or a map file.

    Args:
        model: dynamically quantised, from the same checkpoint of 16 bit.
        folder: the training checkpoint.
        say: takes one line for people.
    """
    state = dynamic_state(model)
    recorded = None if state is None else read_map(folder)
    if state is None or recorded is None:
        return
    if recorded.history == state.history and recorded.map.rungs == state.map.rungs:
        return
    reason = _why_not(state, recorded)
    if not reason:
        # these were made with E[x_j^2] of the training
        again = {change.name for change in recorded.history}
        stopped_by = remake(model, state, recorded.map, recorded.column_weights, sorted(again))
        state.history = list(recorded.history)
        reason = "" if stopped_by is None else str(stopped_by)
    if reason:
        say(f"weights do not have the precision that they had in {folder}: {reason}")


def _why_not(state: DynamicQuantization, recorded: RecordedMap) -> str:
    if recorded.map.placements.keys() != state.map.placements.keys():
        return "its map is of another model"
    if recorded.map.bytes > state.cap_bytes:
        return "they do not fit into the budget that the model was loaded with"
    return ""
