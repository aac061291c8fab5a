"""One line of a loss log: between Python values and strict JSON, and from bytes to records.

Reading is forgiving in one place only: the last line may be cut off, because a kill does that.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from colab_qlora.errors import UserError

FORMAT = "colab_qlora.loss_log/1"
# whole numbers up to here survive being a float
MOST_STEPS = 2**53
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_LINES_AT_ONCE = 4096
_PADDING = b"\0 \t\r"

Record = dict[str, Any]


@dataclass
class Section:
    """What stands below one header of a file: records of one run, or of more by their steps.

    Attributes:
        run: the hyperparameters in the header; None without a header.
        records: in the order of the file.
        places: where each record stands in the file, from 1.
        unit: what `places` counts.
        name: the run's name where the file has one, else "".
        notes: what a reader should know about how it was read, as sentences.
    """

    run: Record | None = None
    records: list[Record] = field(default_factory=list)
    places: array[int] = field(default_factory=lambda: array("q"))
    unit: str = "line"
    name: str = ""
    notes: tuple[str, ...] = ()

    def add(self, records: list[Record], places: Iterable[int]) -> None:
        """Adds records and their places, of which there are as many."""
        self.records.extend(records)
        self.places.extend(places)

    def place(self, index: int) -> str:
        """Says where a record stands: "line 12 (step 1)"."""
        return f"{self.unit} {self.places[index]} (step {self.records[index]['step']})"


def json_line(record: Mapping[str, Any]) -> bytes:
    """Gives the line, with its line end, that stands for a record in the file."""
    return json.dumps(_to_json(record), allow_nan=False).encode("ascii") + b"\n"


def as_stored(values: Mapping[str, Any]) -> Record:
    """Gives the values exactly as reading the file will give them."""
    return _from_json(json.loads(json_line(values)))


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_to_json(item) for item in value]
    if callable(getattr(value, "tolist", None)):  # a scalar or an array of numpy or torch
        plain = value.tolist()
        if type(plain) is not type(value):  # numpy.longdouble gives itself
            return _to_json(plain)
    return str(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value


def parse_lines(data: bytes, path: Path) -> tuple[list[Section], bool]:
    """Reads JSON lines.

    Args:
        data: the file's content.
        path: the file, for the errors.

    Returns:
        The sections, each with a header's run and the records below it (there is at least one, and
        none but a lone one is empty), and whether the file may be appended to as it is.

    Raises:
        UserError: a line before the last is broken, or has no step.
    """
    lines = data.split(b"\n")
    is_whole = not data or data.endswith(b"\n")
    sections = [Section()]
    with _collector_paused():
        for start in range(0, len(lines), _LINES_AT_ONCE):
            some = lines[start : start + _LINES_AT_ONCE]
            records = _parse_at_once(some)
            if records is not None:
                sections[-1].add(records, range(start + 1, start + 1 + len(records)))
            elif not _parse_one_by_one(lines, start, sections, path):
                is_whole = False
    if len(sections) > 1 and not sections[-1].records:
        # the run that this header announced has logged nothing yet
        del sections[-1]
        is_whole = False
    return sections, is_whole


def _parse_at_once(lines: list[bytes]) -> list[Record] | None:
    """Gives the records of lines that are all plain records, in a third of the time, or None."""
    if not lines[-1]:
        lines = lines[:-1]  # what follows the last line end
    joined = b"[" + b",".join(lines) + b"]"
    try:
        values = json.loads(joined.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if len(values) != len(lines) or set(map(type, values)) != {dict}:
        return None
    steps = [value.get("step") for value in values]
    if set(map(type, steps)) != {int} or min(steps) < 0 or max(steps) > MOST_STEPS:
        return None
    if b'"nan"' in joined or b'inf"' in joined:
        return [_from_json(value) for value in values]
    return values


def _parse_one_by_one(lines: list[bytes], start: int, sections: list[Section], path: Path) -> bool:
    """Adds the records of up to `_LINES_AT_ONCE` lines; False where the last line was cut off."""
    for index in range(start, min(start + _LINES_AT_ONCE, len(lines))):
        # a machine that went down can leave a tail of NUL bytes
        text = lines[index].strip(_PADDING)
        if not text:
            continue
        where = f"{path}:{index + 1}"
        is_first = not sections[0].records and sections[0].run is None
        try:
            value = json.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            # a cut-off line is the start of an object; after good lines any broken tail is ours
            is_last = not b"".join(lines[index + 1 :]).strip(_PADDING)
            if is_last and (not is_first or text.startswith(b"{")):
                return False
            raise UserError(
                f"{where} is not JSON",
                got=repr(text[:40].decode("utf-8", "replace")),
                allowed="one JSON object a line",
                do="Remove that line, or give another file",
            ) from error
        if not isinstance(value, dict):
            raise UserError(f"{where} is not a JSON object", got=repr(value)[:40])
        if "step" not in value and isinstance(value.get("run"), dict):
            _begin_section(sections, _header_run(value, where))
            continue
        record = _from_json(value)
        record["step"] = step_of(record, where)
        sections[-1].add([record], [index + 1])
    return True


def _begin_section(sections: list[Section], run: Record) -> None:
    if sections[-1].records:
        sections.append(Section())
    sections[-1].run = run


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Keeps the garbage collector from walking over a million new dicts again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _header_run(header: Record, where: str) -> Record:
    if header.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{where} is a loss log of another format",
            got=header["format"],
            allowed=FORMAT,
            do="Update colab_qlora",
        )
    return _from_json(header["run"])


def trainer_state(data: bytes) -> Record | None:
    """Gives the parsed trainer_state.json, or None where the file is something else."""
    if b'"log_history"' not in data:
        return None
    try:
        state = json.loads(data.decode("utf-8-sig"))
    except ValueError:
        return None
    return state if isinstance(state, dict) and isinstance(state.get("log_history"), list) else None


def parse_trainer_state(state: Record, path: Path) -> Section:
    """Gives the settings that a trainer_state.json records, and its log as records."""
    settings = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps")
    run = {key: state[key] for key in settings if state.get(key) is not None}
    section = Section(run, unit="record")
    for index, entry in enumerate(state["log_history"]):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: log_history[{index}] is not an object", got=repr(entry)[:40])
        if "train_runtime" in entry:
            continue  # the summary of a finished run; its train_loss is a mean over all steps
        record = _from_json(entry)
        record["step"] = step_of(record, f"{path}: log_history[{index}]")
        section.add([record], [index + 1])
    return section


def step_of(record: Mapping[str, Any], where: str) -> int:
    """Gives the record's step as an int; `where` names the record in the error."""
    step = record.get("step")
    value = number_or_none(step)
    if value is None or not value.is_integer() or not 0 <= value <= MOST_STEPS:
        raise UserError(
            f"{where} has no step" if step is None else f"{where} has a step that is no count",
            got=f"keys {', '.join(map(str, record)) or 'none'}"
            if step is None
            else repr(step)[:40],
            allowed="step, an integer from 0 up",
        )
    return int(value)


def number_or_none(value: object) -> float | None:
    """Gives a number as a float, nan and inf included, and anything else as None."""
    if not is_number(type(value)):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number of more than 308 digits
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def is_number(kind: type) -> bool:
    """Whether values of this type count as numbers; a bool does not."""
    # Real and not float alone, because records kept in memory may hold numpy scalars
    return issubclass(kind, Real) and not issubclass(kind, bool)
