"""The work folder: what one notebook leaves for the next, so that each stage starts alone.

Stages hand over through small files (JSON, JSON lines, a PEFT adapter folder), never through a
running kernel. The folder may be on Google Drive, where it outlives the machine.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from colab_qlora.errors import UserError

DRIVE_FOLDER = "/content/drive/MyDrive"
# file -> the notebook that writes it
WRITTEN_BY = {
    "environment.json": "01_install",
    "model.json": "02_load_4bit_model",
    "lora.json": "03_attach_lora",
    "data/train.jsonl": "04_format_data",
    "data/eval.jsonl": "04_format_data",
    "data/format.json": "04_format_data",
    "adapter": "05_train",
    "loss_log.jsonl": "05_train",
}


class WorkFolder:
    """A folder with the files of one fine-tuning, and the defaults for what is not there yet.

    Args:
        path: the folder; it is created. Relative paths are below the current folder.
        use_drive: on Colab, mount Google Drive and put the folder there.

    Raises:
        UserError: it cannot be written to, or Drive was asked for outside Colab.
    """

    def __init__(self, path: str | Path = "work", use_drive: bool = False) -> None:
        if use_drive and Path(path).expanduser().is_absolute():
            raise UserError(
                "an absolute work folder is not on Google Drive",
                got=str(path),
                allowed="a relative path with use_drive=True",
                do="Pass a name such as work, which becomes a folder of your Drive",
            )
        base = Path(_mount_drive()) if use_drive else Path()
        self.path = (base / Path(path).expanduser()).absolute()
        check_writable(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    def has(self, name: str) -> bool:
        """Whether an earlier stage left this file or folder."""
        return (self.path / name).exists()

    def require(self, name: str) -> Path:
        """The path of what an earlier stage left.

        Raises:
            UserError: it is not there; the message names the notebook that writes it.
        """
        if not self.has(name):
            raise UserError(
                f"{name} is not in the work folder",
                got=f"{self.path} with {', '.join(sorted(os.listdir(self.path))) or 'nothing'}",
                do=f"Run {WRITTEN_BY.get(name, 'the stage before')} first, or set work_dir",
            )
        return self.path / name

    def write_json(self, name: str, content: dict[str, Any]) -> Path:
        """Write a JSON file whole or not at all."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".part")
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, path)
        return path

    def read_json(self, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
        """Read a JSON file of an earlier stage; `default` (said in one line) where there is none.

        Raises:
            UserError: there is neither file nor default, or the file is damaged.
        """
        if not self.has(name) and default is not None:
            stage = WRITTEN_BY.get(name, "an earlier stage")
            print(f"{stage} has not run in {self.path}: using {default}")
            return dict(default)
        path = self.require(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{path} is damaged",
                got=str(error),
                do=f"Delete it and run {WRITTEN_BY.get(name, 'the stage before')} again",
            ) from error

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """Write rows as JSON lines, whole or not at all."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".part")
        with scratch.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(scratch, path)
        return path


def check_writable(folder: str | Path) -> None:
    """Create `folder` if needed and prove that a file can be written there.

    Raises:
        UserError: it cannot; with the system's reason.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to",
            got=error.strerror or str(error),
            allowed="a folder that can be created and written to",
            do="Choose another folder",
        ) from error


def _mount_drive() -> str:
    try:
        from google.colab import drive
    except ImportError as error:
        raise UserError(
            "use_drive=True works on Colab only",
            do="Set use_drive=False and work_dir to a folder of this machine",
        ) from error
    drive.mount("/content/drive")
    return DRIVE_FOLDER
