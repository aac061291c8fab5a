"""Replaces a file so that no reader and no kill ever sees a part of it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["write_atomically"]


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
