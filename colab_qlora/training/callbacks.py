"""Trainer callbacks: the loss log on disk, and one readable line of progress."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from colab_qlora.curves.log import LossLog
from colab_qlora.training.resume import LOG_NAME

_GIB = 2**30
_LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch")


def peak_memory_gib() -> float:
    """Highest memory in use so far, in GiB: of the GPU, or of the process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _GIB
    try:
        import resource
        import sys
    except ImportError:  # Windows has no resource module
        return 0.0
    # Linux counts in KiB, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


class LossLogCallback(TrainerCallback):
    """Append every log of the trainer to `<output_dir>/loss_log.jsonl`, line by line, as it
    happens.

    A resumed run first drops the records after the step that it resumes from, so that the file
    reads like one unbroken run.
    """

    def __init__(self, run: dict[str, Any] | None = None) -> None:
        self.run = run or {}
        self.log: LossLog | None = None
        self._began = 0.0
        self._seconds_before = 0.0
        self._tokens_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir) / LOG_NAME
        self.log = LossLog.open(path, run=self.run)
        self.log.truncate_after(state.global_step)
        kept = self.log.records
        self._seconds_before = float(kept[-1].get("seconds", 0.0)) if kept else 0.0
        self._tokens_before = max((int(r.get("tokens") or 0) for r in kept), default=0)
        self._began = time.monotonic()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self.log is None or not logs or not ({"loss", "eval_loss"} & logs.keys()):
            return
        record: dict[str, Any] = {"step": state.global_step}
        record |= {name: _number(logs[name]) for name in _LOGGED if name in logs}
        tokens = logs.get("num_tokens", logs.get("eval_num_tokens"))
        if tokens is not None:
            record["tokens"] = int(tokens) + self._tokens_before
        record["seconds"] = round(self._seconds_before + time.monotonic() - self._began, 3)
        record["peak_memory_gib"] = round(peak_memory_gib(), 3)
        self.log.append(record)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self.log is not None:
            self.log.close()
            self.log = None


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, torch.Tensor) else value)


class ProgressLines(TrainerCallback):
    """Print "step 12/96 | loss 1.83 | ..." at most every `every_seconds`, and each eval."""

    def __init__(self, every_seconds: float = 2.0) -> None:
        self.every_seconds = every_seconds
        self._last = 0.0
        self._began = 0.0
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._last, self._first_step = time.monotonic(), 0.0, state.global_step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        now = time.monotonic()
        is_last = state.global_step >= state.max_steps
        if "eval_loss" in logs:
            # evaluation outside of training (trainer.evaluate()) has no step count to show
            at = f"step {state.global_step}/{state.max_steps} | " if state.max_steps else ""
            print(f"{at}eval loss {_number(logs['eval_loss']):.4f}", flush=True)
        elif "loss" in logs and (is_last or now - self._last >= self.every_seconds):
            self._last = now
            print(self._line(state, logs, now), flush=True)

    def _line(self, state: Any, logs: dict[str, Any], now: float) -> str:
        parts = [f"step {state.global_step}/{state.max_steps}", f"loss {_number(logs['loss']):.4f}"]
        done = state.global_step - self._first_step
        if done > 0:
            per_step = (now - self._began) / done
            left = per_step * (state.max_steps - state.global_step)
            parts += [f"{per_step:.1f} s/step", f"{_duration(left)} left"]
        parts.append(f"peak {peak_memory_gib():.1f} GiB")
        return " | ".join(parts)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
