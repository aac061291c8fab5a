"""`QuantizationSchedule`: precision changes during a training, as a callback.

When, how and why is in `quantization/schedule.py`. Here it meets the trainer: which micro-batches
are kept, which points are past in a resumed run, what is said and logged, and that nothing that
goes wrong in measuring costs the run.
"""

from __future__ import annotations

import functools
import gc
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.quantization.live_prices import BrokenPrices, measure_live
from colab_qlora.quantization.remaking import readable
from colab_qlora.quantization.schedule import LastBatches, ScheduleSettings, move_map
from colab_qlora.training.failures import is_out_of_memory
from colab_qlora.training.log_reader import LogReader

__all__ = ["QuantizationSchedule", "schedules_for"]


class QuantizationSchedule(LogReader):
    """Measures at each point of the schedule, after that optimiser step, and moves the map.

    A run whose map does not change is the same bit by bit as one without a schedule. A resumed run
    leaves out the points up to its first step.

    Args:
        settings: when and how readily; None: the usual ones.
        loss_scale: gives what the loss is multiplied by in float16; None: 1.

    Attributes:
        due: optimiser steps of the points to come in this run.
        seconds: time that measuring and changing took in the last run, in s.
    """

    def __init__(
        self,
        settings: ScheduleSettings | None = None,
        *,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings or ScheduleSettings()
        self.due: list[int] = []
        self.seconds = 0.0
        self._loss_scale = loss_scale
        self._last = LastBatches(self.settings)

    def keep(self, inputs: dict[str, Any]) -> None:
        """Take note of a micro-batch that is about to be trained on."""
        if self.due:
            self._last.add(inputs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._last.clear()
        self.seconds = 0.0
        steps = self.settings.due_steps(
            state.max_steps, args.per_device_train_batch_size, args.gradient_accumulation_steps
        )
        is_on = self.settings.enabled and dynamic_state(kwargs.get("model")) is not None
        self.due = [step for step in steps if step > state.global_step] if is_on else []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        is_due = self.is_running and self.due and step >= self.due[0]
        # a run that was just resumed has to see enough micro-batches first
        if not is_due or control.should_training_stop or not self._last.are_enough:
            return
        self.due = [other for other in self.due if other > step]
        began = time.monotonic()
        self._point(kwargs["model"], step)
        self.seconds += time.monotonic() - began
        if not self.due:
            self._last.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._last.clear()

    def run_ended(self) -> None:
        """Let the micro-batches go."""
        super().run_ended()
        self._last.clear()

    def _point(self, model: Any, step: int) -> None:
        """Measure and move the map; whatever fails, the training goes on with the map that is."""
        state = dynamic_state(model)
        assert state is not None
        made = len(state.history)
        try:
            scale = self._loss_scale() if self._loss_scale else 1.0
            source = readable(state.source)
            measured = measure_live(model, source, self._last.batches(), loss_scale=scale)
            _empty_cache()
            result = move_map(model, state, measured, self.settings, step)
        except BrokenPrices as error:
            reason = str(error).rstrip(".")
            self._say(f"step {step:,}: precision stays as it is at this point, because {reason}")
        except Exception as error:  # a fault of the measuring must not cost the run
            self._switch_off(step, error)
            # tensors of the pass that failed are in its frames
            traceback.clear_frames(error.__traceback__)
        else:
            self._say(f"step {step:,}: {result.words()}")
            if result.changes:
                self._note(step, result.words())
            if result.stopped_by is not None:
                self._switch_off(step, result.stopped_by)
            return
        finally:
            _empty_cache()
        if changes := state.history[made:]:
            names = ", ".join(f"{c.name} {c.before} -> {c.after}" for c in changes)
            self._note(step, f"precision changed: {names}")

    def _note(self, step: int, text: str) -> None:
        if self._source is not None:
            self._source.note_event(step, text)

    def _switch_off(self, step: int, error: BaseException) -> None:
        self.due = []
        what = " ".join(str(error).split(". ")[0].split())
        if is_out_of_memory(error):
            what = f"there is not enough memory to measure in ({what})"
        elif not isinstance(error, UserError):
            what = f"{type(error).__name__}: {what}"
        self._say(
            f"step {step:,}: training goes on with the precisions that weights have now, and they "
            f"do not change any more: {what}"
        )


def schedules_for(
    trainer: Any, wanted: bool | ScheduleSettings | None
) -> list[QuantizationSchedule]:
    """The schedule of a trainer, or none; says so if one was asked for and cannot be had.

    Args:
        trainer: set up, with its model.
        wanted: as `SFTTrainer`'s `quantization_schedule`.

    Raises:
        UserError: a value of another type.
    """
    if not isinstance(wanted, (bool, ScheduleSettings, type(None))):
        raise UserError(
            "quantization_schedule is not understood",
            got=repr(wanted),
            allowed="True, False or a ScheduleSettings",
        )
    settings = wanted if isinstance(wanted, ScheduleSettings) else ScheduleSettings()
    given = any(isinstance(c, QuantizationSchedule) for c in trainer.callback_handler.callbacks)
    if wanted is False or not settings.enabled or given:
        return []
    reason = None
    if dynamic_state(trainer.model) is None:
        reason = 'the model was not loaded with quantization="dynamic"' if wanted else ""
    elif trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
        # each process would measure on rows of its own, and choose another map
        reason = "the training is spread over several GPUs"
    if reason is None:
        return [QuantizationSchedule(settings, loss_scale=functools.partial(_loss_scale, trainer))]
    if reason:
        trainer._say(f"quantization_schedule is not followed: {reason}")
    return []


def _loss_scale(trainer: Any) -> float:
    """What float16 gradients are known to bear; of a loss that counts for a whole step."""
    scaler = trainer.accelerator.scaler if trainer.args.fp16 else None
    if scaler is None:
        return 1.0
    return float(scaler.get_scale()) / max(1, trainer.args.gradient_accumulation_steps)


def _empty_cache() -> None:
    """Hand back what measuring took: the planner counts on what is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
