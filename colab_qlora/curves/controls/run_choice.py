"""Which runs an explorer offers: logs by name, from what a user has at hand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from colab_qlora.curves.log import LossLog, read_log, read_runs
from colab_qlora.errors import UserError
from colab_qlora.samples import sample_path

__all__ = ["OWN_LOG", "OWN_NAME", "RECORDED", "named_runs", "recorded_runs"]

Log = Iterable[Mapping[str, Any]]  # a LossLog is one too

# name -> file; they were recorded with the kit, see data_samples/README.md
RECORDED = {
    "healthy": "curves/healthy.jsonl",
    "overfitting": "curves/overfitting.jsonl",
    "learning rate too high": "curves/learning_rate_too_high.jsonl",
}
OWN_NAME = "your run"
# where notebook 05 leaves its log, unless its work_dir says otherwise
OWN_LOG = Path("work") / "loss_log.jsonl"
# names that say nothing about the run in them
_USUAL_STEMS = ("loss_log", "trainer_state", "loss", "log")


def recorded_runs() -> dict[str, LossLog]:
    """The three runs that the kit brings, by name; add your own to compare with them.

    Example:
        >>> runs = {**recorded_runs(), "mine": read_log("work/loss_log.jsonl")}
    """
    return {name: read_log(sample_path(file)) for name, file in RECORDED.items()}


def named_runs(runs: Any = None) -> dict[str, Log]:
    """Gives the logs by name, as they are or read from their files.

    Args:
        runs: a log (LossLog or list of records), a path that `read_log` takes, a list of paths, a
            dict from name to log or path, or None for the recorded runs and work/loss_log.jsonl,
            if it is there.

    Returns:
        A dict with at least one run. A log without a name is "run", one from a file has the name
        of the file, or of its folder where the file has the usual name of a log; several in one
        file are numbered.

    Raises:
        UserError: a file is no log, or there is no run.
    """
    if runs is None:
        own = _from_path(OWN_NAME, OWN_LOG) if OWN_LOG.is_file() else {}
        found: dict[str, Log] = {**own, **recorded_runs()}
    elif _is_path(runs):
        found = _from_paths([runs])
    elif isinstance(runs, Mapping) and "step" not in runs:
        found = {}
        for name, log in runs.items():
            found |= _from_path(str(name), log) if _is_path(log) else {str(name): log}
    elif isinstance(runs, (list, tuple)) and runs and all(map(_is_path, runs)):
        found = _from_paths(runs)
    else:
        found = {"run": runs}
    if not found:
        raise UserError("there is no run to show", allowed="a log, or a dict of 1 or more logs")
    return found


def _is_path(value: object) -> bool:
    return isinstance(value, (str, os.PathLike))


def _from_paths(paths: Iterable[Any]) -> dict[str, Log]:
    found: dict[str, Log] = {}
    places = set()
    for path in (Path(path).expanduser() for path in paths):
        if path.resolve() in places:
            raise UserError("the same log twice", got=path, do="Leave one of them out")
        places.add(path.resolve())
        stem = path.name if path.is_dir() else path.stem
        name = path.absolute().parent.name if stem in _USUAL_STEMS else stem
        logs = _from_path(name or str(path), path)
        if found.keys() & logs.keys():
            logs = _from_path(str(path), path)
        found |= logs
    return found


def _from_path(name: str, path: Any) -> dict[str, Log]:
    logs = read_runs(path)
    if len(logs) == 1:
        return {name: logs[0]}
    return {f"{name} {number}": log for number, log in enumerate(logs, 1)}
