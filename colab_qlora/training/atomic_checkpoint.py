"""Checkpoints that are there whole or not at all.

    output_dir/.saving/checkpoint-8/...     written file by file, and flushed to the disk
    output_dir/.saving/replaced             what had the name before, if anything had
    output_dir/checkpoint-8                 the written folder, renamed: one step of the file system

Whatever kills the process before the last line, no reader (a resume, or Drive's synchronisation)
meets half a checkpoint under its name. A kill between the two renames leaves none under it:
`finish_killed_save` gives the written one its name before anything is looked for or cleared away.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

from colab_qlora.training.resume import what_is_missing

SAVING = ".saving"
_REPLACED = "replaced"
_STATE = "trainer_state.json"
# fsync of a file system that has none, such as Drive's; a full or broken disk is another matter
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def new_staging(run_dir: str | Path) -> Path:
    """An empty folder to write a checkpoint into; a save that was killed is finished or cleared."""
    finish_killed_save(run_dir)
    staging = Path(run_dir) / SAVING
    staging.mkdir(parents=True)
    return staging


def finish_killed_save(run_dir: str | Path) -> Path | None:
    """Put the checkpoint that a killed save had written in place, and clear what else it left.

    It is put in place if it is whole and there is none of its name.

    Args:
        run_dir: the folder with the checkpoints; it need not be there.

    Returns:
        The checkpoint, or None if there was nothing to put in place.

    Raises:
        OSError: the disk is full, or the folder cannot be renamed; what is there stays then.
    """
    run, staging = Path(run_dir), Path(run_dir) / SAVING
    written = next(staging.glob("checkpoint-*"), None)  # a save writes one
    final = None if written is None else run / written.name
    # the old one was moved away only when the new one was whole
    is_whole = (staging / _REPLACED).exists() or (written and what_is_missing(written) is None)
    if written and final and not final.exists() and is_whole:
        _name_best_by_its_place(written, final)
        put_in_place(written, final)
    else:
        final = None
    shutil.rmtree(staging, ignore_errors=True)
    return final


def put_in_place(written: Path, final: Path) -> None:
    """Flush a written folder to the disk and give it its name; one that is there is replaced.

    Args:
        written: a folder below `new_staging`.
        final: the folder that it is to be, on the same file system.

    Raises:
        OSError: the disk is full, or the folder cannot be renamed; one that was there is there
            again then.
    """
    _flush_all(written)
    replaced = written.parent / _REPLACED
    had_one = final.exists()
    if had_one:
        final.rename(replaced)
    try:
        written.rename(final)
    except OSError:
        if had_one:
            replaced.rename(final)
        raise
    # the new name lasts before the old folder goes
    _flush(final.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def _name_best_by_its_place(written: Path, final: Path) -> None:
    """Where the checkpoint calls itself the best by its path in staging, give it the final one."""
    path = written / _STATE
    state = json.loads(path.read_text(encoding="utf-8"))
    if Path(state.get("best_model_checkpoint") or "").parts[-2:] == (SAVING, written.name):
        state["best_model_checkpoint"] = str(final)
        changed = path.with_suffix(".new")
        changed.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        changed.replace(path)


def _flush_all(folder: Path) -> None:
    """What a folder holds, then the names in it, then its own name."""
    inside = list(folder.rglob("*"))
    for path in inside:
        if path.is_file():
            _flush(path)
    for path in (*filter(Path.is_dir, inside), folder, folder.parent):
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)
