"""Find the checkpoint to go on from, and refuse those that a kill or a full disk cut short.

The trainer names a checkpoint folder when all its files are written (`atomic_checkpoint.py`). One
that was copied, or written otherwise, file by file with trainer_state.json last, is whole when that
file parses, the weights' safetensors header accounts for the file's whole size, and the optimiser's
archive has its end.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

from colab_qlora.curves.log import read_log
from colab_qlora.errors import UserError

LOG_NAME = "loss_log.jsonl"
_NAME = re.compile(r"checkpoint-(\d+)$")
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


def what_is_missing(checkpoint: str | Path) -> str | None:
    """None for a whole checkpoint, else a clause that says what is wrong with it."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "it is not a folder"
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or cut off"
    weights = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    sharded = (folder / "model.safetensors.index.json").is_file()
    if not weights and not sharded:
        return "it holds no weights (adapter_model.safetensors)"
    for path in weights:
        if not _is_whole_safetensors(path):
            return f"{path.name} is cut off"
    for name in ("optimizer.pt", "scheduler.pt"):
        if not zipfile.is_zipfile(folder / name):
            return f"{name} is missing or cut off"
    return None


def _is_whole_safetensors(path: Path) -> bool:
    # format: 8 bytes little-endian header length, JSON header with data_offsets, then the data
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                return False
            header = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error):
        return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint-N below `output_dir`, or None."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    found = [(int(m.group(1)), p) for p in folder.iterdir() if (m := _NAME.search(p.name))]
    for _, path in sorted(found, reverse=True):
        if what_is_missing(path) is None:
            return path
    return None


def other_settings(output_dir: str | Path, run: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """How the run whose log is in `output_dir` differs from `run`: name -> (then, now).

    Empty if nothing differs, or if there is no log to compare with.
    """
    path = Path(output_dir) / LOG_NAME
    if not path.is_file():
        return {}
    try:
        then = read_log(path).run
    except UserError:  # a log without a loss yet, or a damaged one
        return {}
    return {k: (then[k], v) for k, v in run.items() if k in then and then[k] != v}


def set_aside(output_dir: str | Path) -> Path | None:
    """Move an earlier run's checkpoints and log into `earlier-<n>/`, so that runs never mix.

    Returns:
        The folder they are in now, or None if there was nothing to move.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    old = [p for p in folder.iterdir() if _NAME.search(p.name) or p.name == LOG_NAME]
    if not old:
        return None
    number = 1
    while (aside := folder / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)
    return aside


def check_checkpoint(checkpoint: str | Path) -> str:
    """Return the path of a whole checkpoint as a string.

    Raises:
        UserError: it is not whole; the message names the newest whole one beside it, if there is
            one.
    """
    reason = what_is_missing(checkpoint)
    if reason is None:
        return str(checkpoint)
    other = last_complete_checkpoint(Path(checkpoint).parent)
    raise UserError(
        f"cannot resume from {checkpoint}",
        got=reason,
        do=f"Resume from {other}" if other else "Start again without resume_from_checkpoint",
    )
