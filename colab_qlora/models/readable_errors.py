"""What goes wrong while a model is loaded, in one line that says what to do."""

from __future__ import annotations

import os
import re
from typing import Any, Literal

from colab_qlora.disk import is_disk_full
from colab_qlora.errors import UserError


class readable_errors:  # a context manager, named like a function
    """Turn what transformers and the hub raise while loading into one line that says what to do."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Literal[False]:
        from safetensors import SafetensorError

        if not isinstance(error, Exception) or isinstance(error, UserError):
            return False
        text = str(error)
        reason = next((line.strip() for line in text.splitlines() if line.strip()), kind.__name__)
        # whatever fetches: a library in Rust raises no OSError
        if is_disk_full(error):
            raise UserError(
                "the disk is full while the model is fetched",
                got=reason,
                do=f"Free some space below {os.environ.get('HF_HOME', '~/.cache/huggingface')}, "
                "or set HF_HOME to a larger disk",
            ) from error
        if isinstance(error, SafetensorError):
            raise UserError(
                f"the weights of {self.name} are cut off or damaged",
                got=str(error),
                do="Fetch or save them again",
            ) from error
        if not isinstance(error, (OSError, ValueError)):
            return False
        if re.search(r"gated repo|\b(401|403) (Client Error|Unauthorized|Forbidden)", text):
            raise UserError(
                f"{self.name} cannot be read without permission",
                got=reason,
                do="Accept its terms on the model's page and pass token=..., or take an open model",
            ) from error
        if isinstance(error, OSError):
            raise UserError(
                f"{self.name} could not be loaded",
                got=reason,
                allowed="a hub id, a model folder, or 'embedded'",
                do="Check the spelling and the network, or use model_name='embedded'",
            ) from error
        if "trust_remote_code" in text:
            raise UserError(
                f"{self.name} brings its own Python code, which is not run unless you ask for it",
                got="trust_remote_code=False",
                do="Read that code, then pass trust_remote_code=True",
            ) from error
        return False
