"""`LossLogCallback`: the loss log on disk, which the other callbacks read."""

from __future__ import annotations

import contextlib
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
    reads like one unbroken run. The last record of a run that ended in this process says so, with
    the reason where the run was stopped; of a process that was killed there is none.

    Attributes:
        run: hyperparameters for the head of the log.
        log: the log of the run that goes on, or of the last one (closed); None before the first.
    """

    def __init__(self, run: dict[str, Any] | None = None) -> None:
        self.run = run or {}
        self.log: LossLog | None = None
        self._is_open = False
        self._stop_reason: str | None = None
        self._began = 0.0
        self._seconds_before = 0.0
        self._tokens_before = 0
        # TRL counts on when the same trainer trains again, and from 0 in a new one
        self._counter = self._counter_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir) / LOG_NAME
        self.log, self._is_open = LossLog.open(path, run=self.run), True
        self.log.truncate_after(state.global_step)
        self._stop_reason = None
        kept = self.log.records
        self._seconds_before = float(kept[-1].get("seconds", 0.0)) if kept else 0.0
        self._tokens_before = max((int(r.get("tokens") or 0) for r in kept), default=0)
        self._counter_before = self._counter
        self._began = time.monotonic()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or not ({"loss", "eval_loss"} & logs.keys()):
            return
        if self.log is None or not self._is_open:
            return  # trainer.evaluate() outside of training
        record: dict[str, Any] = {"step": state.global_step}
        record |= {name: _number(logs[name]) for name in _LOGGED if name in logs}
        tokens = logs.get("num_tokens", logs.get("eval_num_tokens"))
        if tokens is not None:
            self._counter = int(tokens)
            record["tokens"] = self._counter - self._counter_before + self._tokens_before
        record["seconds"] = self._seconds()
        record["peak_memory_gib"] = round(peak_memory_gib(), 3)
        self.log.append(record)

    def note_event(self, step: int, text: str) -> None:
        """Have the plot mark a step with a text; outside of a training nothing happens."""
        if self.log is not None and self._is_open:
            # a resumed run counts its seconds from the last record, of whatever kind
            self.log.append({"step": step, "event": text, "seconds": self._seconds()})

    def note_stop(self, reason: str) -> None:
        """Have the last record give this as the reason why the run was stopped."""
        self._stop_reason = reason

    def note_end(self, step: int, reason: str | None = None) -> None:
        """Write the last record of the run and close the file; a second call does nothing.

        Args:
            step: the last finished step.
            reason: why the run was stopped, for the plot to mark; None for a whole run.
        """
        if self.log is not None and self._is_open:
            end: dict[str, Any] = {"step": step, "is_end": True, "seconds": self._seconds()}
            # what was trained is not to be lost for want of room for this line
            with contextlib.suppress(OSError):
                self.log.append(end if reason is None else end | {"event": reason})
        self.close()

    def _seconds(self) -> float:
        return round(self._seconds_before + time.monotonic() - self._began, 3)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reason = self._stop_reason
        if reason is None and state.global_step < state.max_steps:
            reason = f"stopped at step {state.global_step:,} of {state.max_steps:,}"
        self.note_end(state.global_step, reason)

    def close(self) -> None:
        """Close the file; what was logged stays readable. A second call does nothing."""
        self._is_open = False
        if self.log is not None:
            # a full disk was reported by the write that failed; what waits in the buffer is lost
            with contextlib.suppress(OSError):
                self.log.close()


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, torch.Tensor) else value)
