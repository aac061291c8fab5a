"""Find a training file and read its text, or say what is wrong with its path or its encoding."""

from __future__ import annotations

import difflib
from pathlib import Path

from colab_qlora.data.wording import FAULTS_SHOWN, first_few
from colab_qlora.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ANY_SUFFIX = ".jsonl, .json, .csv or .parquet"
_BOM = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def check_file(file: Path) -> None:
    """Refuse what cannot be opened as a training file, and name what could be.

    Args:
        file: a path without "~".

    Raises:
        UserError: the file is a directory, is missing, or has a suffix that is not in `SUFFIXES`.
    """
    if file.is_dir():
        inside = first_few(_data_files(file), separator=", ")
        raise UserError(
            f"{file} is a directory",
            got=f"a directory with {inside or f'no {ANY_SUFFIX} file'}",
            allowed=f"one {ANY_SUFFIX} file",
            do="Add the file's name to the path",
        )
    if not file.exists():
        absolute = file.absolute()
        folder = absolute.parent
        if not folder.is_dir():
            near = f"the folder {folder} does not exist"
        else:
            names = first_few(_like_named(file.name, folder), separator=", ")
            near = f"{folder} has {names or f'no {ANY_SUFFIX} file'}"
        raise UserError(
            "the file does not exist",
            got=f"{absolute} (working directory {Path.cwd()}; {near})",
            allowed=f"the path of a {ANY_SUFFIX} file",
            do="Correct the path, or upload the file first",
        )
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{file.name} is of a type that is not read",
            got=f"suffix {file.suffix!r}",
            allowed=ANY_SUFFIX,
            do="Save it as JSON lines, for instance with "
            "pandas' to_json('train.jsonl', orient='records', lines=True)",
        )


def read_text(file: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark; every line end becomes a line feed.

    Args:
        file: an existing file.

    Returns:
        The text, with at least one character that is no white space.

    Raises:
        UserError: the file has no such character, is not UTF-8, or has a zero byte.
    """
    raw = file.read_bytes()
    # the mark is cut by hand: the codec utf-8-sig counts error offsets from behind it
    skip = len(_BOM) if raw.startswith(_BOM) else 0
    try:
        text = raw[skip:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file.name, raw, error.start + skip) from None
    # UTF-16 without its mark passes as UTF-8, with a zero byte beside each letter
    if "\0" in text:
        raise _not_utf8(file.name, raw, raw.index(b"\0"))
    if not text.strip():
        raise empty_file(file)
    # not str.splitlines(): it also cuts at U+2028 and others, which JSON allows inside a text
    return text.replace("\r\n", "\n").replace("\r", "\n")


def empty_file(file: Path) -> UserError:
    """The error for a file that has no row because it has no content."""
    return UserError(
        f"{file.name} is empty",
        got=f"{file.stat().st_size} bytes without a row",
        allowed="at least one row",
        do="Write the file again, or check that its upload has finished",
    )


def _not_utf8(name: str, raw: bytes, offset: int) -> UserError:
    mark = ", the mark of UTF-16" if raw.startswith(_UTF16_MARKS) else ""
    if raw[offset] == 0:
        mark = ", as in UTF-16 or in a file that was cut off"
    line = raw.count(b"\n", 0, offset) + 1
    return UserError(
        f"{name}:{line}: not UTF-8",
        got=f"byte 0x{raw[offset]:02x} at offset {offset:,}{mark}",
        allowed="UTF-8 text",
        do="Save the file as UTF-8 (most editors: Save with encoding; Excel: CSV UTF-8)",
    )


def _data_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _like_named(name: str, folder: Path) -> list[str]:
    """Names in `folder` close to `name`, or its data files where none is close."""
    lowered = {p.name.lower(): p.name for p in folder.iterdir() if p.is_file()}
    close = difflib.get_close_matches(name.lower(), lowered, n=FAULTS_SHOWN, cutoff=0.6)
    return [lowered[c] for c in close] or _data_files(folder)
