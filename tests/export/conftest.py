"""What the tests of GGUF files share: a small Llama on disk with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from model_files import byte_level

    return byte_level("smollm")


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's folder."""
    from model_files import write_model

    return write_model(tmp_path_factory.mktemp("gguf") / "tiny-llama", "llama", tokenizer)
