"""Files that appear together when all of them are written, or not at all.

They are written into a hidden folder beside the target. Whatever stops it before its end (a full
disk, an interrupt, a weight that cannot be read) removes that folder, and what the target held
before, an adapter for instance, is as it was. Files are moved one by one at the end, and those
moved are moved back on an error; only a kill in the midst of that leaves some new and some old.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

from colab_qlora.disk import check_space, readable_write_errors
from colab_qlora.errors import UserError

_NO_ROOM = "Free some space, or choose a folder on another disk; nothing was written"
# one of them is in every folder of a model or an adapter
_OF_AN_EXPORT = ("config.json", "adapter_config.json")


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
            do="Choose another folder, or pass overwrite=True to replace this one by a whole one",
        )
    return target


@contextmanager
def whole_files(folder: str | PathLike[str], needed_bytes: int = 0) -> Iterator[Path]:
    """A hidden folder whose files move into `folder` if nothing fails, and else disappear.

    Args:
        folder: is made if it is not there; a file in it is replaced by a new one of its name.
        needed_bytes: room on the disk that is checked before anything is written; 0 where it is not
            known.

    Raises:
        UserError: too little room, a disk that becomes full, or a folder that cannot be written.
    """
    target = Path(folder).expanduser()
    partial = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}.partial"
    made = _missing(target)
    try:
        with readable_write_errors(target):
            target.mkdir(parents=True, exist_ok=True)
            check_space(target, needed_bytes, "this export", target, _NO_ROOM)
            partial.mkdir()
            yield partial
            _move_all(partial, target, made)
        made = []
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder_made in made:
            # what something else wrote there meanwhile stays
            with suppress(OSError):
                folder_made.rmdir()


@contextmanager
def folder_to_write(folder: str | PathLike[str], overwrite: bool) -> Iterator[Path]:
    """The folder, or a hidden one beside it that takes its place when it is whole.

    With `overwrite`, the folder of an earlier export is moved aside once the new one is written,
    and then removed; so both take room on the disk for a while. If anything fails, the old one
    stays. A kill between two renames leaves it under a hidden name that ends in ".old".

    Args:
        folder: to be written.
        overwrite: replace what is there, if it is a model's or an adapter's folder.

    Raises:
        UserError: there is something and `overwrite` is off; or it would remove what no export
            wrote; or the folder cannot be replaced.
    """
    target = Path(folder).expanduser()
    if not overwrite or not target.is_dir() or not any(target.iterdir()):
        yield check_new(target)
        return
    _check_earlier_export(target)
    place = target.resolve()
    hidden = place.parent / f".{place.name}-{uuid.uuid4().hex[:8]}"
    written, aside = hidden.with_name(f"{hidden.name}.new"), hidden.with_name(f"{hidden.name}.old")
    try:
        with readable_write_errors(target):
            yield written
            try:
                place.rename(aside)
                written.rename(place)
            except BaseException:
                if aside.exists() and not place.exists():
                    aside.rename(place)
                raise
    except UserError as error:
        # whoever wrote knows the hidden folder alone
        raise _renamed(error, written, target) from error.__cause__
    finally:
        # gone already where it was renamed
        shutil.rmtree(written, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def _renamed(error: UserError, hidden: Path, target: Path) -> UserError:
    problem, got = (
        text.replace(str(hidden), str(target)) if isinstance(text, str) else text
        for text in (error.problem, error.got)
    )
    return UserError(str(problem), got=got, allowed=error.allowed, do=error.do)


def _check_earlier_export(target: Path) -> None:
    """Raise UserError for a folder that is no checkpoint: a home, a work folder, or a root."""
    if any((target / name).is_file() for name in _OF_AN_EXPORT):
        return
    inside = sorted(entry.name for entry in target.iterdir())
    raise UserError(
        f"{target} is not replaced: it is no folder of a model or an adapter",
        got="a folder with " + ", ".join(inside[:6]) + (", ..." if len(inside) > 6 else ""),
        allowed=f"with overwrite=True, a folder with {' or '.join(_OF_AN_EXPORT)}",
        do="Choose another folder, or delete this one first",
    )


def _move_all(partial: Path, target: Path, made: list[Path]) -> None:
    """Move the files into the target; on an error, all that was moved goes back.

    Args:
        partial: holds them, in folders or not.
        target: is there.
        made: gets the folders that are made in the target, in front.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    aside = partial / ".replaced"
    moved: list[tuple[Path, Path]] = []
    try:
        for file in files:
            name = file.relative_to(partial)
            place, kept = target / name, aside / name
            made[:0] = _missing(place.parent)
            for parent in (place.parent, kept.parent):
                parent.mkdir(parents=True, exist_ok=True)
            # a folder in the place of a file is not replaced, which the next line says
            if place.is_symlink() or place.is_file():
                os.replace(place, kept)
                moved.append((place, kept))
            # on one file system, so each is moved at once
            os.replace(file, place)
            moved.append((file, place))
    except BaseException:
        for before, after in reversed(moved):
            os.replace(after, before)
        raise


def _missing(target: Path) -> list[Path]:
    """The folders that are made for the target, from the innermost out."""
    found = []
    while not target.exists():
        found.append(target)
        target = target.parent
    return found
