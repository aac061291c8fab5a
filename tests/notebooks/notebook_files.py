"""The notebooks as the static tests read them: JSON, cell sources, syntax trees."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

inputtransformer2 = pytest.importorskip("IPython.core.inputtransformer2")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = re.findall(r'^Repository = "([^"]+)"', PYPROJECT, re.MULTILINE)[0]


class Notebook:
    """One notebook: the JSON as it is on disk, and its cells with sources as one string."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.stem
        self.text = path.read_text(encoding="utf-8")
        self.content: dict[str, Any] = json.loads(self.text)
        self.cells: list[dict[str, Any]] = [
            {**cell, "source": "".join(cell["source"])} for cell in self.content["cells"]
        ]

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [cell for cell in self.cells if cell["cell_type"] == kind]

    @property
    def parameters(self) -> dict[str, Any]:
        """The one cell with the tag `parameters`."""
        (cell,) = [c for c in self.cells if "parameters" in c["metadata"].get("tags", [])]
        return cell

    def trees(self) -> Iterator[tuple[dict[str, Any], ast.Module]]:
        """Each code cell and its syntax tree, magics turned into Python first."""
        for cell in self.of_type("code"):
            yield cell, ast.parse(transform(cell["source"]), filename=f"{self.name} {cell['id']}")


def transform(source: str) -> str:
    """A cell as Python: magics become calls of get_ipython()."""
    return inputtransformer2.TransformerManager().transform_cell(source)
