"""The `notebook` fixture: a test that takes it runs once for each notebook."""

from __future__ import annotations

import pytest
from notebook_files import NOTEBOOKS, Notebook


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Notebook:
    return Notebook(request.param)
