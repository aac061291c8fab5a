"""Files that appear together when all of them are written, or not at all.

They are written into a hidden folder beside the target. Whatever stops it before its end (a full
disk, an interrupt, a weight that cannot be read) removes that folder, and what the target held
before, an adapter for instance, is as it was.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from colab_qlora.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_new(folder: str | PathLike[str]) -> Path:
    """The folder as a path.

    Raises:
        UserError: it is a file, or holds something.
    """
    target = Path(folder).expanduser()
    inside = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if inside or (target.exists() and not target.is_dir()):
        names = ", ".join(inside[:6]) + (", ..." if len(inside) > 6 else "")
        raise UserError(
            f"{target} is there already, and nothing is overwritten",
            got=f"a folder with {names}" if inside else "a file",
            allowed="a new or an empty folder",
            do="Choose another folder, or delete this one first",
        )
    return target


@contextmanager
def whole_files(folder: str | PathLike[str], needed_bytes: int) -> Iterator[Path]:
    """A hidden folder whose files move into `folder` if nothing fails, and else disappear.

    Args:
        folder: is made if it is not there; a file in it is replaced by a new one of its name.
        needed_bytes: room on the disk that is checked before anything is written.

    Raises:
        UserError: too little room, a disk that becomes full, or a folder that cannot be written.
    """
    target = Path(folder).expanduser()
    partial = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}.partial"
    made = _missing(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        _check_space(target, needed_bytes)
        partial.mkdir()
        yield partial
        for file in sorted(partial.iterdir()):
            # on one file system, so each is moved at once
            os.replace(file, target / file.name)
        made = []
    except OSError as error:
        raise _readable(error, target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for empty in made:
            shutil.rmtree(empty, ignore_errors=True)


def _missing(target: Path) -> list[Path]:
    """The folders that are made for the target, from the innermost out."""
    found = []
    while not target.exists():
        found.append(target)
        target = target.parent
    return found


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed:
        raise UserError(
            f"the disk of {target} is too small for this export",
            got=f"{size_words(free)} free",
            allowed=f"{size_words(needed)} or more",
            do="Free some space, or choose a folder on another disk; nothing was written",
        )


def size_words(size: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _readable(error: OSError, target: Path) -> UserError:
    text = next(iter(str(error).splitlines()), type(error).__name__)
    if error.errno in _DISK_FULL:
        return UserError(
            f"the disk became full while {target} was written",
            got=text,
            do="Free some space, or choose a folder on another disk; what was written is removed",
        )
    return UserError(
        f"{target} cannot be written",
        got=text,
        allowed="a folder that you may write to",
        do="Choose another folder; what was written is removed",
    )
