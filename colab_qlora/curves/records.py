"""One line of a loss log: between Python values and strict JSON, and from bytes to records.

Reading is forgiving in one place only: the last line may be cut off, because a kill does that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from colab_qlora.errors import UserError

FORMAT = "colab_qlora.loss_log/1"
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

Record = dict[str, Any]


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


def parse_lines(data: bytes, path: Path) -> tuple[Record | None, list[Record], bool]:
    """Gives the header's run, the records, and whether the file may be appended to as it is."""
    run: Record | None = None
    records: list[Record] = []
    is_whole = not data or data.endswith(b"\n")
    # a machine that went down can leave a tail of NUL bytes
    stripped = (raw.strip(b"\0 \t\r") for raw in data.split(b"\n"))
    lines = [(number, text) for number, text in enumerate(stripped, 1) if text]
    for index, (number, text) in enumerate(lines):
        where = f"{path}:{number}"
        try:
            value = json.loads(text.decode("utf-8-sig"))
        except ValueError as error:
            # a cut-off line is the start of an object; after good lines any broken tail is ours
            if index == len(lines) - 1 and (index > 0 or text.startswith(b"{")):
                return run, records, False
            raise UserError(
                f"{where} is not JSON",
                got=repr(text[:40].decode("utf-8", "replace")),
                allowed="one JSON object a line",
                do="Remove that line, or give another file",
            ) from error
        if not isinstance(value, dict):
            raise UserError(f"{where} is not a JSON object", got=repr(value)[:40])
        if index == 0 and "step" not in value and isinstance(value.get("run"), dict):
            run = _header_run(value, where)
            continue
        record = _from_json(value)
        record["step"] = step_of(record, where)
        records.append(record)
    return run, records, is_whole


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


def parse_trainer_state(state: Record, path: Path) -> tuple[Record, list[Record]]:
    """Gives the settings that a trainer_state.json records, and its log as records."""
    records = []
    for index, entry in enumerate(state["log_history"]):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: log_history[{index}] is not an object", got=repr(entry)[:40])
        if "train_runtime" in entry:
            continue  # the summary of a finished run; its train_loss is a mean over all steps
        record = _from_json(entry)
        record["step"] = step_of(record, f"{path}: log_history[{index}]")
        records.append(record)
    settings = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps")
    return {key: state[key] for key in settings if state.get(key) is not None}, records


def step_of(record: Mapping[str, Any], where: str) -> int:
    """Gives the record's step as an int; `where` names the record in the error."""
    step = record.get("step")
    value = number_or_none(step)
    if value is None or not value.is_integer() or value < 0:
        raise UserError(
            f"{where} has no step" if step is None else f"{where} has a step that is no count",
            got=f"keys {', '.join(map(str, record)) or 'none'}" if step is None else repr(step),
            allowed="step, an integer from 0 up",
        )
    return int(value)


def number_or_none(value: object) -> float | None:
    """Gives a number as a float, nan and inf included, and anything else as None."""
    # Real and not float alone, because records kept in memory may hold numpy scalars
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    return None
