"""The best adapter of a run in a folder that PEFT loads, never half written.

    best_adapter/adapter_config.json            written once
    best_adapter/adapter_model.safetensors      replaced whole; step and eval loss in its header
    best_adapter/quantization_map.safetensors   of a dynamically quantised base, as of that step

The folder appears by being renamed, and later only the file of weights is replaced, by a rename
too. Where the base has changed, weights and map belong together: the whole folder is replaced, and
the one before waits beside it under another name, which a resumed run undoes. So a kill at any
moment leaves the old adapter or the new one, with the step and the map that belong to it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.quantization.map_file import FILE as _MAP
from colab_qlora.quantization.map_file import save_map
from colab_qlora.quantization.remaking import follow_or_say
from colab_qlora.training.adapter_state import adapter_name, adapter_tensors, write_

__all__ = ["FOLDER_NAME", "BestAdapter", "move_aside"]

FOLDER_NAME = "best_adapter"
_WEIGHTS = "adapter_model.safetensors"


class BestAdapter:
    """The adapter of the lowest eval loss so far.

    Args:
        folder: where it is kept.
        is_resumed: whether to take over what an earlier session of the run left there.

    Attributes:
        step: its step; None while there is none.
        eval_loss: its eval loss in nat; inf while there is none.
        is_in_model: whether `put_back_` has written it into the model.
    """

    def __init__(self, folder: str | Path, *, is_resumed: bool = False) -> None:
        self.folder = Path(folder)
        self.step: int | None = None
        self.eval_loss = math.inf
        self.is_in_model = False
        if is_resumed:
            self._read()

    def __str__(self) -> str:
        return f"step {self.step:,} (eval loss {self.eval_loss:.4f})"

    def save(self, model: Any, step: int, eval_loss: float) -> None:
        """Keep the model's adapter as the best.

        Raises:
            OSError, SafetensorError: it could not be written; the one before is still there.
        """
        from safetensors.torch import save_file

        about = {"format": "pt", "step": str(step), "eval_loss": repr(float(eval_loss))}
        weights = {name: t.contiguous() for name, t in adapter_tensors(model).items()}
        part = self.folder.with_name(f".{self.folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            save_file(weights, part / _WEIGHTS, metadata=about)
            _flush(part / _WEIGHTS)
            if (state := dynamic_state(model)) is not None:
                _flush(save_map(state, part))
            # whatever else lies in the folder is another run's, unless this run has written there
            is_ours = self.step is not None and (self.folder / "adapter_config.json").is_file()
            if is_ours and _content(part / _MAP) == _content(self.folder / _MAP):
                os.replace(part / _WEIGHTS, self.folder / _WEIGHTS)
            else:
                _write_config(model, part)
                self._replace_folder(part, is_ours)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.step, self.eval_loss, self.is_in_model = step, float(eval_loss), False

    def put_back_(self, model: Any, say: Callable[[str], None] = print) -> None:
        """Write the weights into the model's own parameters, over the base of their step.

        Args:
            model: of the run.
            say: takes a line if the base cannot be brought back.

        Raises:
            UserError: the folder's adapter is not of this model's shape.
        """
        from safetensors.torch import load_file

        weights = load_file(self.folder / _WEIGHTS)
        follow_or_say(model, self.folder, say)
        write_(adapter_tensors(model), weights, str(self.folder))
        self.is_in_model = True

    def _replace_folder(self, part: Path, is_ours: bool) -> None:
        before = _before(self.folder)
        shutil.rmtree(before, ignore_errors=True)
        if is_ours:
            os.replace(self.folder, before)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            os.replace(part, self.folder)
        except OSError:
            _undo(self.folder)
            raise
        shutil.rmtree(before, ignore_errors=True)

    def _read(self) -> None:
        from safetensors import SafetensorError, safe_open

        _undo(self.folder)
        try:
            with safe_open(self.folder / _WEIGHTS, framework="pt") as file:
                about = file.metadata() or {}
            self.step, self.eval_loss = int(about["step"]), float(about["eval_loss"])
        except (OSError, SafetensorError, KeyError, ValueError):
            # none yet, or an adapter that somebody else put there
            self.step, self.eval_loss = None, math.inf


def move_aside(output_dir: str | Path, aside: str | Path) -> None:
    """Move the best adapter of an earlier run to where its checkpoints are now."""
    old = Path(output_dir) / FOLDER_NAME
    _undo(old)
    if old.is_dir():
        old.rename(Path(aside) / FOLDER_NAME)


def _before(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.before")


def _undo(folder: Path) -> None:
    """Take the folder before back where a kill came between two renames."""
    if not folder.exists() and _before(folder).is_dir():
        os.replace(_before(folder), folder)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _write_config(model: Any, folder: Path) -> None:
    config = model.peft_config[adapter_name(model)]
    # as PEFT's save_pretrained: whoever loads it wants to use it first of all
    was, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = was


def _flush(path: Path) -> None:
    # a rename that reaches the disk before the data would leave an empty file after a power cut;
    # some network file systems refuse, and there it is left to them
    with contextlib.suppress(OSError), path.open("rb+") as file:
        os.fsync(file.fileno())
