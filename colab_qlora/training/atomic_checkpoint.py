"""Checkpoints that are there whole or not at all.

    output_dir/.saving/checkpoint-8/...     written file by file, and flushed to the disk
    output_dir/checkpoint-8                 the same folder, renamed: one step of the file system

Whatever kills the process before the last line, no reader (a resume, or Drive's synchronisation)
meets half a checkpoint under its name.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SAVING = ".saving"


def new_staging(run_dir: str | Path) -> Path:
    """An empty folder to write a checkpoint into; what a killed save left there is gone."""
    staging = Path(run_dir) / SAVING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def put_in_place(written: Path, final: Path) -> None:
    """Flush a written folder to the disk and give it its name; one that is there is replaced.

    Args:
        written: a folder below `new_staging`.
        final: the folder that it is to be, on the same file system.

    Raises:
        OSError: the disk is full, or the folder cannot be renamed.
    """
    for path in written.rglob("*"):
        if path.is_file():
            _flush(path)
    if final.exists():
        final.rename(written.parent / "replaced")
    written.rename(final)
    shutil.rmtree(written.parent, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
