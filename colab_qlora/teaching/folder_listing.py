"""What is in a folder, largest first, for the notebooks that save a model."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from colab_qlora.errors import UserError

_MEGA = 1e6


def list_files(folder: str | PathLike[str]) -> str:
    """The files of a folder and below it with their sizes in MB (10^6 bytes), and the sum.

    Raises:
        UserError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError("there is no such folder", got=str(root), do="Save something there first")
    found = {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*")}
    sizes = {name: size for name, size in found.items() if (root / name).is_file()}
    lines = [
        f"{size / _MEGA:12,.3f} MB  {name}"
        for name, size in sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0]))
    ]
    return "\n".join([*lines, f"{sum(sizes.values()) / _MEGA:12,.3f} MB  in {root}"])
