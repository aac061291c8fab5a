"""Which file of a folder holds the loss log, and which reader a file needs."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from colab_qlora.curves.logs.read_csv import looks_like_csv, parse_csv
from colab_qlora.curves.logs.read_tensorboard import event_files, is_event_file, parse_events
from colab_qlora.curves.logs.records import (
    Section,
    parse_lines,
    parse_trainer_state,
    trainer_state,
)
from colab_qlora.errors import UserError

__all__ = ["cannot_open", "find_source", "read_sections"]

_LOG_NAME = "loss_log.jsonl"
_STATE_NAME = "trainer_state.json"
_FORMATS = (
    "a loss log of JSON lines, trainer_state.json, a CSV, or TensorBoard's events.out.tfevents.*"
)
# UTF-32 comes first, because its mark begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")
_LOOKED_AT = 4096


def find_source(folder: Path) -> tuple[Path, str | None]:
    """Finds the log in a folder.

    The order of preference, by how much each holds of a run: loss_log.jsonl; trainer_state.json;
    event files; trainer_state.json of the newest checkpoint; event files of the one folder in runs.

    Args:
        folder: an output folder, a checkpoint, or a folder of event files.

    Returns:
        The file (the folder itself for its event files), and a sentence that says which others
        there were, if any.

    Raises:
        UserError: there is none, or there are several folders of event files to choose from.
    """
    try:
        found = [folder / name for name in (_LOG_NAME, _STATE_NAME) if (folder / name).is_file()]
        events = event_files(folder)
        found += (events if len(events) == 1 else [folder]) if events else []
        found += _newest_checkpoint(folder)
        runs = _folders_of_events(folder / "runs") if not found else []
    except OSError as error:
        raise cannot_open(folder, error) from error
    if len(runs) > 1:
        raise UserError(
            "that is a folder with TensorBoard's events of several runs",
            got=", ".join(str(run.relative_to(folder)) for run in runs[:4]),
            allowed="one of them",
            do=f"Pass read_log({str(runs[-1])!r}) for the last one",
        )
    found += runs
    if not found:
        raise UserError(
            "that is a folder without a loss log",
            got=folder,
            allowed=f"a folder with {_LOG_NAME}, {_STATE_NAME} or event files, or such a file",
            do="Check the path, or train first",
        )
    if len(found) == 1:
        return found[0], None
    others = ", ".join(_in_folder(each, folder) for each in found[1:])
    return found[0], f"Of the folder, {_in_folder(found[0], folder)} was read and not {others}."


def _in_folder(path: Path, folder: Path) -> str:
    return "the event files" if path == folder else str(path.relative_to(folder))


def _newest_checkpoint(folder: Path) -> list[Path]:
    steps = [
        (int(match[1]), each / _STATE_NAME)
        for each in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", each.name))
    ]
    return [path for _, path in sorted(steps) if path.is_file()][-1:]


def _folders_of_events(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(each for each in folder.iterdir() if each.is_dir() and event_files(each))


def read_sections(path: Path) -> list[Section]:
    """Reads a file by what it holds.

    Args:
        path: a file that exists, or a folder with event files.

    Returns:
        Its sections, of which there is at least one; they may be without a loss.

    Raises:
        UserError: the file is empty, cannot be opened, is of no format that is read here, or has a
            broken line.
    """
    if path.is_dir() or is_event_file(path):
        if path.is_file() and not path.stat().st_size:
            raise _empty(path)
        return [parse_events(path)]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise cannot_open(path, error) from error
    data = _as_utf_8(data, path)
    if not data.strip(b"\0 \t\r\n"):
        raise _empty(path)
    state = trainer_state(data)
    if state is not None:
        return [parse_trainer_state(state, path)]
    if data.lstrip()[:1] != b"{":
        # names and numbers are plain ASCII, so any code page of a spreadsheet will do
        text = data.decode("utf-8", "replace")
        if looks_like_csv(text, path):
            return parse_csv(text, path)
    return parse_lines(data, path)[0]


def _as_utf_8(data: bytes, path: Path) -> bytes:
    """Decodes by the byte order mark, and refuses what is no text."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding).encode("utf-8", "replace")
            except UnicodeDecodeError as error:
                raise UserError(
                    "the file is not a loss log",
                    got=f"{path}, which begins like {encoding} text and is none",
                    allowed=_FORMATS,
                    do="Give another file",
                ) from error
    # a log may hold the NUL bytes that a machine leaves when it goes down
    text = data.strip(b"\0 \t\r\n")
    if not text.startswith(b"{") and _CONTROL.search(text[:_LOOKED_AT]):
        raise UserError(
            "the file is not a loss log",
            got=f"{path}, which holds binary data",
            allowed=_FORMATS,
            do="Give another file",
        )
    return data


def _empty(path: Path) -> UserError:
    return UserError("the loss log is empty", got=path, do="Wait for the first logged step")


def cannot_open(path: Path, error: OSError) -> UserError:
    """Gives the error of a file that the system does not let us read or write."""
    return UserError(
        "the loss log cannot be opened",
        got=f"{path} ({error.strerror or error})",
        do="Choose a file in a folder that you can write to",
    )
