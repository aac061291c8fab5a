"""Room on a disk, and what a failed write means, in the words that every saving function uses."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from colab_qlora.errors import UserError, error_chain

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# what Rust puts behind the system's words, whichever of its libraries writes
_OF_THE_SYSTEM = "(os error "
# safetensors and tokenizers (in Rust) and torch's archive writer raise no OSError for a full disk
_DISK_FULL_WORDS = (
    "No space left on device",
    *(f"os error {number}" for number in _DISK_FULL),
    "file write failed",
    "iostream error",
)


def size_words(size: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def check_space(
    place: str | PathLike[str], needed_bytes: int, what: str, target: str | PathLike[str], do: str
) -> None:
    """Refuse to begin what the disk cannot take.

    Args:
        place: a folder that exists on the disk.
        needed_bytes: that will be written.
        what: it is, as in "this export".
        target: what the message calls the disk's.
        do: the next step, for the message.

    Raises:
        UserError: less is free.
    """
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UserError(
            f"the disk of {target} is too small for {what}",
            got=f"{size_words(free)} free",
            allowed=f"{size_words(needed_bytes)} or more",
            do=do,
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space."""
    return any(
        getattr(seen, "errno", None) in _DISK_FULL
        or any(words in str(seen) for words in _DISK_FULL_WORDS)
        for seen in error_chain(error)
    )


@contextmanager
def readable_write_errors(target: Path) -> Iterator[None]:
    """Tell every failed write of a folder in the same words, whichever library wrote.

    Python and torch raise an OSError or a RuntimeError, safetensors an error of its own, tokenizers
    a plain Exception.

    Args:
        target: what the message calls the folder.

    Raises:
        UserError: a write failed. What is no failed write passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_failed_write(error):
            raise
        raise _write_error(error, target) from error


def _is_failed_write(error: Exception) -> bool:
    # whoever raises its error has imported it; nobody else needs it for this question
    safetensors = sys.modules.get("safetensors")
    if safetensors is not None and isinstance(error, safetensors.SafetensorError):
        return True
    return isinstance(error, OSError) or _OF_THE_SYSTEM in str(error) or is_disk_full(error)


def _write_error(error: Exception, target: Path) -> UserError:
    """What a failed write of a folder is told as; all that was written is removed by then."""
    text = next(iter(str(error).splitlines()), type(error).__name__)
    if is_disk_full(error):
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
