"""The loss log: one JSON object a line, readable after a kill at any moment.

    {"run": {"learning_rate": 0.0002, "r": 16}, "format": "colab_qlora.loss_log/1"}
    {"step": 0, "eval_loss": 2.31}
    {"step": 1, "loss": 2.41, "learning_rate": 4e-05, "grad_norm": 1.3}

The header line is optional. JSON has no nan, so nan and inf are written as the strings "nan", "inf"
and "-inf" and come back as floats.

Every line reaches the operating system before `append` returns, so a killed process loses at most
the line that it was writing. Whatever changes earlier lines writes a new file and renames it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from colab_qlora.curves.logs.atomic import write_atomically
from colab_qlora.curves.logs.points import eval_points, train_points
from colab_qlora.curves.logs.records import (
    FORMAT,
    Record,
    as_stored,
    json_line,
    number_or_none,
    parse_lines,
    step_of,
)
from colab_qlora.curves.logs.runs import run_starts
from colab_qlora.curves.logs.sources import cannot_open, find_source, read_sections
from colab_qlora.errors import UserError

__all__ = ["LossLog", "eval_points", "read_log", "read_runs", "train_points", "write_atomically"]

_LOSS_KEYS = ("loss", "eval_loss")


class LossLog:
    """The records of one run, oldest first, and the file that they are appended to.

    `LossLog.open` gives a log that can be appended to; `read_log` gives one that can only be read.

    The keys of a record; only `step` is required, and unknown keys are kept:

        step: optimiser steps so far, an integer from 0 up; 0 is before training.
        epoch: passes over the training rows so far, a fraction.
        loss: train loss in nat, the mean since the last record that has one.
        eval_loss: loss on the eval rows in nat.
        learning_rate: that of this step.
        grad_norm: norm of the gradient before clipping.
        tokens: tokens trained on so far.
        seconds: time in training so far, in s.
        peak_memory_gib: highest memory in use so far, in GiB.
        event: a text that the plot marks at this step, for instance "resumed".
        is_end: true in the last record of a run that is over, with an `event` that says why where
            it was stopped; a run that is resumed loses it.

    Attributes:
        records: one dict a line, oldest first; append through `append`, not here.
        run: the hyperparameters in the header line; empty without a header.
        path: the file, or the folder of event files, or None.
        name: the run's name where the file has one, else "".
        notes: what a reader should know about how the log was read, as sentences.

    Example:
        >>> with LossLog.open("work/loss.jsonl", run={"learning_rate": 2e-4}) as log:
        ...     log.append({"step": 1, "loss": 2.41})
    """

    def __init__(
        self,
        records: Iterable[Record] = (),
        run: Mapping[str, Any] | None = None,
        path: Path | None = None,
        *,
        name: str = "",
        notes: Iterable[str] = (),
    ) -> None:
        self.records: list[Record] = list(records)
        self.run: Record = dict(run or {})
        self.path = path
        self.name = name
        self.notes = tuple(notes)
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
            raise cannot_open(path, error) from error
        sections, is_whole = parse_lines(data, path)
        if len(sections) > 1:
            raise UserError(
                f"the loss log holds {len(sections)} runs, so none can go on in it",
                got=f"{path}, in which run 2 begins at {sections[1].place(0)}",
                do="Choose another file",
            )
        old_run, records = sections[0].run, sections[0].records
        new_run = old_run if run is None else as_stored(run)
        log = cls(records, new_run, path)
        try:
            if is_whole and (old_run or {}) == (new_run or {}):
                log._file = path.open("ab")
            else:
                log._rewrite()
        except OSError as error:
            raise cannot_open(path, error) from error
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

        What said that the run was over is removed too, whatever its step.

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
        kept = [r for r in self.records if r["step"] <= step and r.get("is_end") is not True]
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


def read_log(path: str | os.PathLike[str], *, which_run: int | None = None) -> LossLog:
    """Reads the loss log of one run, and closes the file.

    Args:
        path: JSON lines, trainer_state.json of transformers, a CSV (of a spreadsheet, pandas, a
            notebook's table, wandb or TensorBoard), an event file of TensorBoard, or a folder that
            holds one of them: in order of preference loss_log.jsonl, trainer_state.json, event
            files, those of the newest checkpoint, those in runs/. `path` and `notes` of the log say
            which was read. A last line that a kill cut off is left out.
        which_run: which run of a file that holds several: 0 is the first, -1 the last. What
            separates runs from one that was resumed is written in runs.py.

    Returns:
        The log, read-only. For trainer_state.json `run` holds the few settings that it records.

    Raises:
        UserError: the file is missing, empty or of another kind, a line is broken or has no step,
            no record has a loss, the file holds several runs and `which_run` is not given, or
            TensorBoard's package is missing.
    """
    logs, places = _logs_and_places(path)
    if which_run is None and len(logs) > 1:
        raise UserError(
            f"{logs[0].path} holds {len(logs)} runs",
            got=f"run 2, which begins at {places[1]}",
            allowed=f"which_run=0 to {len(logs) - 1}, or -1 for the last",
            do="Pass read_log(path, which_run=-1), or read_runs(path) for all of them",
        )
    index = 0 if which_run is None else which_run
    if isinstance(index, bool) or not isinstance(index, int) or not -len(logs) <= index < len(logs):
        raise UserError(
            f"there is no such run in {logs[0].path}",
            got=f"which_run={which_run!r}",
            allowed=f"0 to {len(logs) - 1}, or -1 for the last",
        )
    _check_losses(logs[index].records, logs[index].path)
    return logs[index]


def read_runs(path: str | os.PathLike[str]) -> list[LossLog]:
    """Reads every run of a file, for instance to compare them.

    Args:
        path: as for `read_log`.

    Returns:
        One log a run, in the order of the file; most files hold one.

    Raises:
        UserError: as for `read_log`, apart from `which_run`.
    """
    logs, _ = _logs_and_places(path)
    _check_losses([record for log in logs for record in log.records], logs[0].path)
    return logs


def _logs_and_places(path: str | os.PathLike[str]) -> tuple[list[LossLog], list[str]]:
    """Gives the runs in a file, and where each begins."""
    source = Path(path).expanduser()
    if not source.exists():
        raise UserError(
            "there is no such loss log", got=source, do="Check the path, or train first"
        )
    note = None
    if source.is_dir():
        source, note = find_source(source)
    logs, places = [], []
    for section in read_sections(source):
        starts = run_starts(section.records)
        notes = [note] if note else []
        notes += section.notes
        if len(starts) > 1 and section.run:
            notes.append("The file has one header for several runs: it may be that of another.")
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            records = section.records[start:end]
            logs.append(LossLog(records, section.run, source, name=section.name, notes=notes))
            places.append(section.place(start) if records else "")
    return logs, places


def _check_losses(records: list[Record], path: Path | None) -> None:
    values = (number_or_none(record.get(key)) for record in records for key in _LOSS_KEYS)
    if all(value is None for value in values):
        raise UserError(
            "the loss log has no loss values",
            got=path,
            allowed="records with loss or eval_loss",
            do="Wait for the first logged step, or set logging_steps=1",
        )
