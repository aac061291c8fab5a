"""`StopOnNonFinite`: end a run whose numbers broke, and give the newest good adapter back.

A loss that is nan has usually made nan of the weights by the time that it is logged, since the
optimiser's step comes first. So a copy of the adapter waits in host memory, renewed after logs in
which all was finite, as often as 0.5 % of the time allows; with it the map of a base whose weights
change their precision. An isolated non-finite gradient in fp16 is the loss scaler's skip, and no
reason to stop; the diagnosis tells them apart.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from colab_qlora.curves.logs.points import train_points
from colab_qlora.curves.logs.records import number_or_none
from colab_qlora.curves.verdicts import Verdict
from colab_qlora.quantization.remaking import MapCopy, follow_or_say
from colab_qlora.training.adapter_state import adapter_name, adapter_tensors, is_finite, write_
from colab_qlora.training.early_stopping import EarlyStopping
from colab_qlora.training.log_reader import Diagnose, LogReader

__all__ = ["StopOnNonFinite"]

_WATCHED = ("loss", "eval_loss", "grad_norm")
_SECONDS_BETWEEN = 200


class StopOnNonFinite(LogReader):
    """Stops at the first verdict "non-finite" that is sure.

    The model then has the best adapter that early stopping kept, else the last finite one. A
    checkpoint of weights that are not finite is not saved.

    Args:
        early_stopping: the callback that keeps the best adapter, if there is one.
        diagnose: what reads the log; None: `colab_qlora.curves.diagnose.diagnose`.

    Attributes:
        stopped_by: the verdict that stopped the run, or None.
    """

    def __init__(
        self, early_stopping: EarlyStopping | None = None, *, diagnose: Diagnose | None = None
    ) -> None:
        super().__init__(diagnose=diagnose)
        self.early_stopping = early_stopping
        self.stopped_by: Verdict | None = None
        self._has_warned = False
        self._copy: dict[str, torch.Tensor] = {}
        self._copy_base: MapCopy | None = None
        self._copy_step = 0
        self._next_copy = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.stopped_by, self._copy, self._next_copy = None, {}, 0.0
        self._copy_base, self._has_warned = None, False
        self._keep(kwargs.get("model"), state.global_step)
        # the first copy takes longer than those to come
        self._next_copy = 0.0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_running or self.stopped_by is not None or not self.log.records:
            return
        last = self.log.records[-1]
        values = (number_or_none(last.get(name)) for name in _WATCHED)
        if all(value is None or math.isfinite(value) for value in values):
            if last["step"] == state.global_step and "loss" in last:
                self._keep(kwargs.get("model"), state.global_step)
            return
        # the diagnosis reads the whole log, so it is asked only when there is something to ask
        diagnosis = self.diagnosis()
        verdict = None if diagnosis is None else diagnosis.get("non-finite")
        if verdict is None or verdict.confidence != "sure":
            return
        if "loss" not in last and self._is_sound(kwargs.get("model")):
            # eval rows without labels give nan too, and training is none the worse for them
            if not self._has_warned:
                self._has_warned = True
                self._say(f"training goes on, but {verdict.because}. Next: {verdict.action}")
            return
        if self.stopped_by is None:
            self._stop(verdict, state.global_step, control, kwargs.get("model"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save_only_what_is_finite(control, kwargs.get("model"))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save_only_what_is_finite(control, kwargs.get("model"))

    def run_ended(self) -> None:
        """Let the copy go."""
        super().run_ended()
        self._copy, self._copy_base = {}, None

    def _is_sound(self, model: Any) -> bool:
        """Whether the trained weights and every train loss so far are finite."""
        losses = train_points(self.log.records)[1]
        is_known = adapter_name(model) is not None
        return bool(is_known and np.isfinite(losses).all() and is_finite(adapter_tensors(model)))

    def _save_only_what_is_finite(self, control: Any, model: Any) -> None:
        if self.stopped_by is not None:
            # the weights are those of an earlier step, and the optimiser's state may be broken
            control.should_save = control.should_evaluate = False
        elif control.should_save and adapter_name(model) is not None:
            control.should_save = is_finite(adapter_tensors(model))

    def _keep(self, model: Any, step: int) -> None:
        """Renew the copy if it is time and the weights are finite."""
        began = time.monotonic()
        if began < self._next_copy or adapter_name(model) is None:
            return
        tensors = adapter_tensors(model)
        if is_finite(tensors):
            if self._copy.keys() == tensors.keys():
                write_(self._copy, tensors, "the model")
            else:
                self._copy = {n: t.to("cpu", copy=True) for n, t in tensors.items()}
            self._copy_step, self._copy_base = step, MapCopy.of(model)
        ended = time.monotonic()
        self._next_copy = ended + _SECONDS_BETWEEN * (ended - began)

    def _stop(self, verdict: Verdict, step: int, control: Any, model: Any) -> None:
        self.stopped_by = verdict
        control.should_training_stop = True
        control.should_save = control.should_evaluate = False
        self.note_stop(f"stopped: {verdict.title}")
        given_back = self._give_back(model)
        self._say(
            f"stopped at step {step:,}, because {verdict.because}; {given_back}. "
            f"Next: {verdict.action}"
        )

    def _give_back(self, model: Any) -> str:
        """Put the newest good adapter into the model; a clause that says which it is."""
        best = self.early_stopping.best if self.early_stopping is not None else None
        if best is not None and best.step is not None:
            try:
                best.put_back_(model, self._say)
            except (OSError, SafetensorError) as error:
                self._say(f"the best adapter cannot be read: {error}")
            else:
                return f"the adapter is the best so far, of {best}"
        if adapter_name(model) is None:
            return "the weights are not finite: load the model, or its last checkpoint, again"
        tensors = adapter_tensors(model)
        if is_finite(tensors):
            return "the adapter is finite and stays as it is"
        if not self._copy:
            return "there is no finite adapter to give back"
        follow_or_say(model, self._copy_base, self._say)
        write_(tensors, self._copy, "the copy")
        if self._copy_step == 0:
            return "the adapter is as it was before training, the last finite one kept"
        return f"the adapter is that of step {self._copy_step:,}, the last finite one kept"
