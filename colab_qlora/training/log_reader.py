"""`LogReader`: what the callbacks share that read the loss log while it is written.

The log is the one source: a callback may take keys out of the `metrics` that the next one gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from colab_qlora.curves.log import LossLog
from colab_qlora.curves.thresholds import Thresholds
from colab_qlora.curves.verdicts import Diagnosis
from colab_qlora.errors import UserError
from colab_qlora.training.callbacks import LossLogCallback

__all__ = ["LogReader"]

Diagnose = Callable[..., Diagnosis]


class LogReader(TrainerCallback):
    """A callback that reads what a `LossLogCallback` writes; that one comes first in the list.

    `SFTTrainer` calls `attach` for every reader that it has. With another trainer:

        log = LossLogCallback()
        trainer = Trainer(..., callbacks=[log, LossPlot().attach(log)])

    Args:
        thresholds: where the rules of the diagnosis draw their lines; None: the usual ones.
        diagnose: what reads the log; None: `colab_qlora.curves.diagnose.diagnose`.
    """

    def __init__(
        self, thresholds: Thresholds | None = None, diagnose: Diagnose | None = None
    ) -> None:
        self.thresholds = thresholds
        self.is_running = False
        self._diagnose = diagnose
        self._source: LossLogCallback | None = None
        self._say: Callable[[str], None] = _print
        self._has_complained = False

    def attach(
        self, source: LossLogCallback, say: Callable[[str], None] | None = None
    ) -> LogReader:
        """Read this callback's log, and say lines through `say`; returns the reader itself."""
        self._source, self._say = source, say or _print
        return self

    @property
    def log(self) -> LossLog:
        """The log of the run that goes on, or of the last one.

        Raises:
            UserError: there is none.
        """
        log = self._source.log if self._source is not None else None
        if log is None:
            raise UserError(
                f"{type(self).__name__} has no loss log to read",
                do="Pass it to colab_qlora's SFTTrainer, or put a LossLogCallback before it in "
                "callbacks and call attach() with that",
            )
        return log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _ = self.log  # an error now rather than after an hour
        self.is_running = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_running = False

    def run_ended(self) -> None:
        """Called after every run; it is still `is_running` where an interrupt or an error ended it.

        The log is closed and the last checkpoint saved by then.
        """
        self.is_running = False

    def note_stop(self, reason: str) -> None:
        """Have the log say why this callback stops the run."""
        if self._source is not None:
            self._source.note_stop(reason)

    def diagnosis(self, *, is_finished: bool = False) -> Diagnosis | None:
        """What the log shows now; None, said once, where reading it failed."""
        from colab_qlora.curves.diagnose import diagnose

        read = self._diagnose or diagnose
        try:
            return read(self.log, thresholds=self.thresholds, is_finished=is_finished)
        except Exception as error:  # a fault of the reading must not cost the run
            if not self._has_complained:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self._say(f"{type(self).__name__} could not read the loss log ({reason})")
            self._has_complained = True
            return None


def _print(line: str) -> None:
    print(f"colab_qlora: {line}", flush=True)
