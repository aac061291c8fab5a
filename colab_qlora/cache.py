"""The folder for what is made once and used again: converted models, measured rates."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`COLAB_QLORA_CACHE`, else `XDG_CACHE_HOME`/colab_qlora, else ~/.cache/colab_qlora."""
    own = os.environ.get("COLAB_QLORA_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "colab_qlora"
