"""Where files are written before they appear: in the folder itself, whatever kind of folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from colab_qlora import whole_files as whole_files_module
from colab_qlora.errors import UserError
from colab_qlora.whole_files import check_new, folder_to_write, whole_files

LONG = "n" * 300
TOO_LONG = "nnn cannot be written: got .*File name too long.*Choose another folder"


def names(folder: Path) -> list[str]:
    """All that is in a folder and below it."""
    return sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*"))


def write(folder: str | Path, text: str = "new") -> None:
    with whole_files(folder) as partial:
        (partial / "file").write_text(text)
        (partial / "below").mkdir()
        (partial / "below" / "file").write_text(text)


def fail(folder: str | Path) -> None:
    with pytest.raises(UserError, match="cannot be written"), whole_files(folder) as partial:
        (partial / "file").write_text("half")
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("kind", ["link", "mount point"])
def test_a_folder_on_another_disk(
    small_disk: Callable[[int], Path], tmp_path: Path, kind: str
) -> None:
    disk = small_disk(256)
    out = tmp_path / "out" if kind == "link" else disk
    if kind == "link":
        out.symlink_to(disk)
    (disk / "file").write_text("old")
    before = set(tmp_path.iterdir())
    fail(out)
    assert names(disk) == ["file"] and (disk / "file").read_text() == "old"
    write(out)
    assert names(disk) == ["below", "below/file", "file"]
    assert (disk / "file").read_text() == "new"
    assert set(tmp_path.iterdir()) == before and out.is_symlink() == (kind == "link")


@pytest.mark.parametrize("is_there", [True, False])
def test_nothing_is_made_beside_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """A parent that cannot be written is no hindrance, where the folder is there."""
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
        mkdir = Path.mkdir

        def refuse(path: Path, *args: object, **options: object) -> None:
            if path.parent == tmp_path and path != out:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            mkdir(path, *args, **options)

        # permissions do not bind root, as whom tests may run
        monkeypatch.setattr(Path, "mkdir", refuse)
    with whole_files(out) as partial:
        assert partial.parent == out and list(tmp_path.iterdir()) == [out]
        (partial / "file").write_text("1")
    assert names(tmp_path) == ["out", "out/file"]


@pytest.mark.parametrize("folder", [".", "..", "./a", "../a", "a/../b", "a/b/../../c"])
def test_relative_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    work = tmp_path / "one" / "two"
    work.mkdir(parents=True)
    (work / "mine").write_text("1")
    monkeypatch.chdir(work)
    before = names(tmp_path)
    fail(folder)
    assert names(tmp_path) == before
    write(folder)
    assert Path(folder, "file").read_text() == Path(folder, "below", "file").read_text() == "new"
    assert not [name for name in names(tmp_path) if "partial" in name]
    # the folder that the next write finds is the one of the last
    fail(folder)
    assert Path(folder, "file").read_text() == "new"


@pytest.mark.parametrize("length", [240, 255])
def test_names_as_long_as_they_may_be(tmp_path: Path, length: int) -> None:
    out = tmp_path / ("n" * length)
    fail(out)
    assert names(tmp_path) == []
    write(out)
    assert names(out) == ["below", "below/file", "file"]
    (out / "config.json").write_text("{}")
    with folder_to_write(out, overwrite=True) as folder:
        write(folder, "whole")
    assert names(out) == ["below", "below/file", "file"]
    assert (out / "file").read_text() == "whole" and list(tmp_path.iterdir()) == [out]


def test_a_name_that_is_too_long_is_said(tmp_path: Path) -> None:
    for parent in (tmp_path, tmp_path / "new"):
        with pytest.raises(UserError, match=TOO_LONG), whole_files(parent / LONG):
            pass
    with pytest.raises(UserError, match=TOO_LONG):
        check_new(tmp_path / LONG)
    for overwrite in (True, False):
        with (
            pytest.raises(UserError, match=TOO_LONG),
            folder_to_write(tmp_path / LONG, overwrite),
        ):
            pass
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from colab_qlora.whole_files import whole_files
with whole_files(sys.argv[1]) as partial:
    (partial / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_kill_leaves_is_no_content(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [left] = out.iterdir()
    assert left.name.endswith(".partial") and (left / "config.json").is_file()
    # an upload leaves it out
    assert Path(left.name, "config.json").match(whole_files_module.PARTIAL_FILES)
    assert check_new(out) == out
    for overwrite in (True, False):
        # nothing is there to be replaced
        with folder_to_write(out, overwrite) as folder:
            assert folder == out
    write(out)
    assert (out / "file").read_text() == "new" and not (out / "config.json").exists()
    with pytest.raises(UserError, match="is there already.*got a folder with below, file;"):
        check_new(out)
    with (
        pytest.raises(UserError, match="no folder of a model.*got a folder with below, file;"),
        folder_to_write(out, overwrite=True),
    ):
        pass


@pytest.mark.parametrize("name", [".0123abcd.partial", ".ssh", ".0123abcd.partial.txt"])
def test_only_hidden_folders_of_ours_are_ignored(tmp_path: Path, name: str) -> None:
    # a file of that name is nobody's remains
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"is there already.*got a folder with {name};"):
        check_new(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name / "below").mkdir(parents=True)
    if name.endswith(".partial"):
        check_new(tmp_path)
        return
    with pytest.raises(UserError, match=f"is there already.*got a folder with {name};"):
        check_new(tmp_path)


def test_a_mount_point_is_not_replaced_but_written_to(
    small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    disk = small_disk(256)
    (disk / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(disk)
    for out in (disk, tmp_path / "link"):
        with (
            pytest.raises(
                UserError, match="on another file system: got a mount point.*Choose a folder inside"
            ),
            folder_to_write(out, overwrite=True),
        ):
            raise AssertionError("something is written")
    (disk / "config.json").unlink()
    with folder_to_write(disk, overwrite=True) as folder:
        write(folder)
    assert names(disk) == ["below", "below/file", "file"]


def test_a_mount_point_is_told_where_none_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path.resolve())
    with (
        pytest.raises(UserError, match="got a mount point, which cannot be renamed; allowed"),
        folder_to_write(tmp_path, overwrite=True),
    ):
        pass
