"""Where the sample data is: beside the package in a clone, inside it once installed."""

from __future__ import annotations

from pathlib import Path

from colab_qlora.errors import UserError


def sample_path(name: str = "") -> Path:
    """Path of a file in data_samples/ ("train.jsonl", "curves/healthy.jsonl"), or of the folder
    itself.

    Raises:
        UserError: there is no such sample; the message lists those that exist.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "data_samples", package / "samples"):
        if (folder / "train.jsonl").is_file():
            break
    else:
        raise UserError(
            "the sample data is not installed",
            got=f"nothing in {package.parent / 'data_samples'}",
            do="Install the package again: pip install --force-reinstall --no-deps colab_qlora",
        )
    path = folder / name
    if not path.exists():
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.jsonl"))
        raise UserError("no such sample", got=name, allowed=", ".join(names))
    return path
