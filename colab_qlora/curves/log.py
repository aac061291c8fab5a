"""The loss log: one JSON object a line, readable after a kill at any moment.

    {"run": {"learning_rate": 0.0002, "r": 16}, "format": "colab_qlora.loss_log/1"}
    {"step": 0, "eval_loss": 2.31}
    {"step": 1, "loss": 2.41, "learning_rate": 4e-05, "grad_norm": 1.3}

The header line is optional. Only `step` is required in a record; the other keys that this package
knows are epoch, loss, eval_loss, learning_rate, grad_norm, tokens, seconds and peak_memory_gib, and
unknown keys are kept. JSON has no nan, so nan and inf are written as the strings "nan", "inf" and
"-inf" and come back as floats.

Every line reaches the operating system before `append` returns, so a killed process loses at most
the line that it was writing. Whatever changes earlier lines writes a new file and renames it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from colab_qlora.curves.records import (
    FORMAT,
    Record,
    as_stored,
    json_line,
    number_or_none,
    parse_lines,
    parse_trainer_state,
    step_of,
    trainer_state,
)
from colab_qlora.errors import UserError

__all__ = ["LossLog", "eval_points", "read_log", "train_points", "write_atomically"]

_LOSS_KEYS = ("loss", "eval_loss")


class LossLog:
    """The records of one run, oldest first, and the file that they are appended to.

    `LossLog.open` gives a log that can be appended to; `read_log` gives one that can only be read.

    Attributes:
        records: one dict a line, oldest first; append through `append`, not here.
        run: the hyperparameters in the header line; empty without a header.
        path: the file, or None.

    Example:
        >>> with LossLog.open("work/loss.jsonl", run={"learning_rate": 2e-4}) as log:
        ...     log.append({"step": 1, "loss": 2.41})
    """

    def __init__(
        self,
        records: Iterable[Record] = (),
        run: Mapping[str, Any] | None = None,
        path: Path | None = None,
    ) -> None:
        self.records: list[Record] = list(records)
        self.run: Record = dict(run or {})
        self.path = path
        self._file: BinaryIO | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], run: Mapping[str, Any] | None = None) -> LossLog:
        """Opens a log for appending, and creates it and its folder where they are missing.

        What is in the file stays, for a resumed run; call `truncate_after(resumed_step)` then, or
        `truncate_after(-1)` to start afresh. A last line that a kill cut off is dropped.

        Args:
            path: the JSON lines file.
            run: hyperparameters for the header line; they replace those of an existing header.

        Returns:
            The log, with the records that the file already held.

        Raises:
            UserError: the file cannot be opened, or holds something that is not a loss log.
        """
        path = Path(path).expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise _cannot_open(path, error) from error
        old_run, records, is_whole = parse_lines(data, path)
        new_run = old_run if run is None else as_stored(run)
        log = cls(records, new_run, path)
        try:
            if is_whole and (old_run or {}) == (new_run or {}):
                log._file = path.open("ab")
            else:
                log._rewrite()
        except OSError as error:
            raise _cannot_open(path, error) from error
        return log

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one record and hands its line to the operating system.

        Args:
            record: `step` (int, 0 or more) and any other keys. Numbers of numpy and torch become
                plain numbers; what JSON cannot hold becomes its `str`.

        Raises:
            UserError: the log is closed or was opened by `read_log`, or the record has no step.
        """
        if self._file is None:
            raise UserError(
                "this loss log is closed or read-only", do="Open it with LossLog.open(path)"
            )
        stored = as_stored(record)
        stored["step"] = step_of(stored, "the record")
        # one write of the whole line, so that a kill can cut it but never mix it with another
        self._file.write(json_line(stored))
        self._file.flush()
        self.records.append(stored)

    def truncate_after(self, step: int) -> int:
        """Removes the records of later steps, for a run that resumes from a checkpoint.

        Args:
            step: the resumed step; its own records stay. -1 removes every record.

        Returns:
            The number of records removed.

        Raises:
            UserError: the log is closed or was opened by `read_log`.
        """
        if self._file is None:
            raise UserError(
                "this loss log is closed or read-only", do="Open it with LossLog.open(path)"
            )
        kept = [record for record in self.records if record["step"] <= step]
        removed = len(self.records) - len(kept)
        if removed:
            self.records = kept
            self._rewrite()
        return removed

    def close(self) -> None:
        """Closes the file; the records stay readable. A second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> LossLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def _rewrite(self) -> None:
        assert self.path is not None
        self.close()  # Windows refuses to replace a file that is open
        header = [json_line({"run": self.run, "format": FORMAT})] if self.run else []
        write_atomically(
            self.path, b"".join(header + [json_line(record) for record in self.records])
        )
        self._file = self.path.open("ab")


def read_log(path: str | os.PathLike[str]) -> LossLog:
    """Reads a loss log, or the `trainer_state.json` of a transformers checkpoint, and closes it.

    Args:
        path: the JSON lines file, or trainer_state.json. A cut-off last line is left out.

    Returns:
        The log, read-only. For trainer_state.json `run` holds the few settings that it records.

    Raises:
        UserError: the file is missing or empty, a line is broken or has no step, or no record has
            a loss.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError("that is a folder", got=path, allowed="a loss log or trainer_state.json")
    if not path.exists():
        raise UserError("there is no such loss log", got=path, do="Check the path, or train first")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _cannot_open(path, error) from error
    if not data.strip():
        raise UserError("the loss log is empty", got=path, do="Wait for the first logged step")
    run: Record | None
    state = trainer_state(data)
    if state is not None:
        run, records = parse_trainer_state(state, path)
    else:
        run, records, _ = parse_lines(data, path)
    values = (number_or_none(record.get(key)) for record in records for key in _LOSS_KEYS)
    if all(value is None for value in values):
        raise UserError(
            "the loss log has no loss values",
            got=path,
            allowed="records with loss or eval_loss",
            do="Wait for the first logged step, or set logging_steps=1",
        )
    return LossLog(records, run, path)


def train_points(records: Iterable[Mapping[str, Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The train loss against the step.

    Args:
        records: a LossLog or its records.

    Returns:
        steps, int64 `(points,)`, rising, and losses, float64 `(points,)`, in which nan and inf
        stay. Where a resumed run repeated a step the last record counts.
    """
    return _points(records, "loss")


def eval_points(records: Iterable[Mapping[str, Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The eval loss against the step; otherwise as `train_points`."""
    return _points(records, "eval_loss")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a kill, sees the old content or the new, never a part.

    Args:
        path: the file to create or replace; a link is followed.
        data: the whole content.
    """
    target = Path(os.path.realpath(path))
    # beside the target, because a rename is atomic only inside one file system
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _points(records: Iterable[Mapping[str, Any]], key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    by_step: dict[int, float] = {}
    for record in records:
        value = number_or_none(record.get(key))
        if value is not None:
            by_step[step_of(record, "the record")] = value
    steps = sorted(by_step)
    return np.array(steps, np.int64), np.array([by_step[step] for step in steps], np.float64)


def _cannot_open(path: Path, error: OSError) -> UserError:
    return UserError(
        "the loss log cannot be opened",
        got=f"{path} ({error.strerror or error})",
        do="Choose a file in a folder that you can write to",
    )
