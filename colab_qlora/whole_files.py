"""Files that appear together when all of them are written, or not at all.

They are written into a hidden folder inside the target: on its disk also where the target is a link
or a mount point, and with no other permission than the target's. Whatever stops it before its end
(a full disk, an interrupt, a weight that cannot be read) removes that folder, and what the target
held before, an adapter for instance, is as it was. Files are moved one by one at the end, and those
moved are moved back on an error; only a kill in the midst of that leaves some new and some old. A
kill before that leaves the hidden folder, which no check here takes for content.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

from colab_qlora.disk import check_space, readable_write_errors
from colab_qlora.errors import UserError

# what an upload leaves out, as fnmatch reads it
PARTIAL_FILES = ".????????.partial/*"

_PARTIAL = re.compile(r"\.[0-9a-f]{8}\.partial")
_NO_ROOM = "Free some space, or choose a folder on another disk; nothing was written"
_OR_OVERWRITE = "Choose another folder, or pass overwrite=True to replace this one by a whole one"
# one of them is in every folder of a model or an adapter
_OF_AN_EXPORT = ("config.json", "adapter_config.json")


def hidden_folder(parent: Path) -> Path:
    """A new name in `parent`, of 17 characters whatever is written there; nothing is made."""
    return parent / f".{uuid.uuid4().hex[:8]}.partial"


def check_new(folder: str | PathLike[str], do: str = _OR_OVERWRITE) -> Path:
    """The folder as a path.

    Args:
        folder: is not there, or empty but for hidden folders that a kill left.
        do: the next step, for the message.

    Raises:
        UserError: it is a file, or holds something; or it cannot be looked at.
    """
    target = Path(folder).expanduser()
    with readable_write_errors(target):
        inside = _content(target)
        is_file = target.exists() and not target.is_dir()
    if inside or is_file:
        raise UserError(
            f"{target} is there already, and nothing is overwritten",
            got="a file" if is_file else _folder_with(inside),
            allowed="a new or an empty folder",
            do=do,
        )
    return target


def _content(target: Path) -> list[str]:
    """The names in a folder, without the hidden folders of writers that were killed, or write."""
    if not target.is_dir():
        return []
    found = sorted(target.iterdir())
    return [
        entry.name for entry in found if not (_PARTIAL.fullmatch(entry.name) and entry.is_dir())
    ]


def _folder_with(names: list[str]) -> str:
    return f"a folder with {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"


@contextmanager
def whole_files(folder: str | PathLike[str], needed_bytes: int = 0) -> Iterator[Path]:
    """A hidden folder in `folder` whose files move up into it if nothing fails, or else disappear.

    Args:
        folder: is made if it is not there; a file in it is replaced by a new one of its name.
        needed_bytes: room on the disk that is checked before anything is written; 0 where it is not
            known.

    Raises:
        UserError: too little room, a disk that becomes full, or a folder that cannot be written.
    """
    target = Path(folder).expanduser()
    partial = hidden_folder(target)
    made: list[Path] = []
    try:
        with readable_write_errors(target):
            made = _missing(target)
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
            wrote; or the folder cannot be replaced, as a mount point cannot.
    """
    target = Path(folder).expanduser()
    with readable_write_errors(target):
        is_replaced = overwrite and bool(_content(target))
    if not is_replaced:
        yield check_new(target)
        return
    _check_earlier_export(target)
    place = target.resolve()
    _check_no_mount_point(target, place)
    # beside it and not inside, as whole_files has it: a folder cannot take the place of one that it
    # lies in. Of a long name a part, so that the hidden ones are no longer than names may be
    hidden = place.parent / f".{place.name[:50]}-{uuid.uuid4().hex[:8]}"
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
    raise UserError(
        f"{target} is not replaced: it is no folder of a model or an adapter",
        got=_folder_with(_content(target)),
        allowed=f"with overwrite=True, a folder with {' or '.join(_OF_AN_EXPORT)}",
        do="Choose another folder, or delete this one first",
    )


def _check_no_mount_point(target: Path, place: Path) -> None:
    """Raise UserError, before anything is written, where the rename at the end has to fail."""
    if os.path.ismount(place):
        raise UserError(
            f"{target} is not replaced: the folder beside it is on another file system",
            got="a mount point, which cannot be renamed",
            allowed="with overwrite=True, a folder that lies on one file system with its parent",
            do="Choose a folder inside it, or delete the files in it first",
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
    for folder in (target, *target.parents):
        if folder.exists():
            break
        found.append(folder)
    return found
