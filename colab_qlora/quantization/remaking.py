"""Bring a model that trains from the map that it has to another one, weight by weight.

Demoted weights are made first, then promoted ones, so that memory never exceeds the cap by more
than one matrix. After each weight the model's state says what stands where: whatever ends this
early leaves a map that is true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.budget import BLOCK_SIZES
from colab_qlora.quantization.dynamic import (
    DynamicQuantization,
    MapChange,
    Source,
    dynamic_state,
)
from colab_qlora.quantization.map_file import read_map
from colab_qlora.quantization.placing import place
from colab_qlora.quantization.precision_map import Change, PrecisionMap
from colab_qlora.quantization.weight_source import SourceGone

__all__ = ["MapCopy", "follow_map", "follow_or_say", "readable", "remake"]

Say = Callable[[str], None]


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
    columns: Mapping[str, torch.Tensor | None],
    again: Iterable[str] = (),
    *,
    done: Callable[[Change], None] = lambda change: None,
) -> SourceGone | None:
    """Make all weights anew that stand on another rung in `wanted`, from the source.

    Args:
        model: with the state.
        state: its map, and E[x_j^2] of the weights that are made, follow.
        wanted: the same weights.
        columns: new E[x_j^2] by name, for those that have one; None makes a weight without.
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
        _set_columns(state, change.name, squares)
        placements[change.name] = wanted[change.name]
        state.map = PrecisionMap(dict(placements), state.cap_bytes)
        done(change)
    return None


@dataclass(frozen=True)
class MapCopy:
    """What a base was made by at some step; its matrices are not in it.

    Attributes:
        map, column_weights, history: as of `DynamicQuantization`, at that step.
    """

    map: PrecisionMap
    column_weights: Mapping[str, torch.Tensor]
    history: tuple[MapChange, ...]

    @classmethod
    def of(cls, model: Any) -> MapCopy | None:
        """Of a model as it is now; None for one that is not dynamically quantised."""
        state = dynamic_state(model)
        if state is None:
            return None
        return cls(state.map, dict(state.column_weights), tuple(state.history))


def follow_map(model: Any, folder: str | Path, say: Say) -> None:
    """Give a model's weights the bits that they had when a checkpoint was saved.

    Prices and the cap stay the model's own. Nothing happens without a map file.

    Args:
        model: dynamically quantised, from the same checkpoint of 16 bit.
        folder: the training checkpoint.
        say: takes one line for people.

    Raises:
        UserError: a map file that cannot be read.
        torch.OutOfMemoryError: while a weight was made; map and history say which were made.
    """
    recorded = read_map(folder)
    if recorded is None:
        return
    state = dynamic_state(model)
    if state is None:
        say(
            f"the adapter in {folder} was trained over weights of mixed precision, which this "
            "model does not have: load it with "
            f'FastLanguageModel.from_pretrained("{folder}")'
        )
        return
    copy = MapCopy(recorded.map, recorded.column_weights, tuple(recorded.history))
    if reason := _follow(model, state, copy):
        say(f"weights do not have the precision that they had in {folder}: {reason}")


def follow_or_say(model: Any, goal: str | Path | MapCopy | None, say: Say) -> None:
    """Go back to the base that an adapter was trained over, as far as that can be done.

    The adapter is worth more than its base: whatever keeps a weight from being made is said, and
    no error.

    Args:
        model: with the adapter.
        goal: the adapter's folder, or a copy; None, as of a model of one precision: nothing to do.
        say: takes one line for people.
    """
    when = "when the adapter was copied" if isinstance(goal, MapCopy) else f"in {goal}"
    reason = ""
    try:
        if isinstance(goal, (str, Path)):
            follow_map(model, goal, say)
        elif goal is not None and (state := dynamic_state(model)) is not None:
            reason = _follow(model, state, goal)
    except UserError as error:
        reason = str(error)
    except torch.OutOfMemoryError as error:
        reason = f"there is not enough memory ({str(error).split('. ')[0]})"
    if reason:
        say(f"weights do not have the precision that they had {when}: {reason}")


def _follow(model: Any, state: DynamicQuantization, goal: MapCopy) -> str:
    """Make what differs from the goal; what kept the rest from being made, or ""."""
    if goal.map.placements.keys() != state.map.placements.keys():
        return "its map is of another model"
    if goal.map.bytes > state.cap_bytes:
        return "they do not fit into the budget that the model was loaded with"
    columns = {name: goal.column_weights.get(name) for name in goal.map.placements}
    rungs, own = state.map.rungs, list(state.history)
    again = [n for n in columns if rungs[n] in BLOCK_SIZES and _differ(state, n, columns[n])]
    as_wanted = {n for n, rung in goal.map.rungs.items() if rung == rungs[n]} - set(again)
    for name in as_wanted:
        # no scale of theirs was searched for by other ones
        _set_columns(state, name, columns[name])

    def note(change: Change | None = None) -> None:
        if change is not None:
            as_wanted.add(change.name)
        found = [c for c in goal.history if c.name in as_wanted]
        found += [c for c in own if c.name not in as_wanted]
        state.history = sorted(found, key=lambda c: c.step)

    note()
    stopped_by = remake(model, state, goal.map, columns, again, done=note)
    return "" if stopped_by is None else str(stopped_by)


def _differ(state: DynamicQuantization, name: str, columns: torch.Tensor | None) -> bool:
    present = state.column_weights.get(name)
    if present is None or columns is None:
        return present is not columns
    return not torch.equal(present.cpu().float(), columns.cpu().float())


def _set_columns(state: DynamicQuantization, name: str, columns: torch.Tensor | None) -> None:
    if columns is None:
        state.column_weights.pop(name, None)
    else:
        state.column_weights[name] = columns
