"""What a hyperparameter panel says below its widgets: memory, seconds a step, the whole time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from colab_qlora.activations.memory_plan import GIB, MemoryPlan
from colab_qlora.activations.report import seconds_text
from colab_qlora.errors import UserError
from colab_qlora.teaching.hyperparameters import STARTING_VALUES, StartingValue

__all__ = ["PanelPlan", "panel_hints", "plan_for_panel"]

# setting of a panel -> its row in the table of starting values
_ROWS = {
    "learning_rate": "learning_rate",
    "warmup_share": "warmup_steps",
    "num_train_epochs": "num_train_epochs",
    "batch_size": "batch size x accumulation",
    "gradient_accumulation_steps": "batch size x accumulation",
    "max_seq_length": "max_seq_length",
    "r": "r (LoRA rank)",
    "lora_alpha": "lora_alpha",
}


@dataclass(frozen=True)
class PanelPlan:
    """A memory plan and how often its micro-batch will run.

    Attributes:
        memory: the plan of one micro-batch.
        accumulation: micro-batches a step.
        steps: optimiser steps of the whole run, or None where the number of rows is not known.
    """

    memory: MemoryPlan
    accumulation: int
    steps: int | None

    @property
    def fits(self) -> bool:
        """Whether there is a plan that stays within the memory."""
        return self.memory.fits

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of an optimiser step; nan if it does not fit or is not known."""
        return self.accumulation * self.memory.step_seconds

    def sentence(self) -> str:
        """Whether it fits, the memory, the seconds a step and the whole time, in few sentences."""
        memory = self.memory
        if not self.fits:
            # as the panel calls it
            return memory.sentence().replace("per_device_train_batch_size", "batch_size")
        budget = memory.machine.budget_bytes / GIB
        where = memory.machine.profile.name
        return (
            f"It fits: {memory.peak_memory_gib:.2f} of {budget:.2f} GiB on this {where}. "
            f"A step is {self._step_words()}{self._time_words()}"
        )

    def _step_words(self) -> str:
        work = self.memory.workload
        batches = f"{self.accumulation} micro-batch{'' if self.accumulation == 1 else 'es'}"
        return f"{batches} of {work.batch_size} x {work.seq_length:,} tokens"

    def _time_words(self) -> str:
        steps = "" if self.steps is None else f"; {self.steps:,} steps"
        if self.memory.machine.profile.layer_launch_s == 0:  # a CPU, whose rates are not known
            return steps
        step = f", about {seconds_text(self.step_seconds)}"
        if self.steps is None:
            return step
        whole = _long_text(self.steps * self.step_seconds)
        # evaluations and saves come on top, and of rows that do not fill their length it is less
        return f"{step}{steps} of full rows take about {whole}, evaluations and saving aside"


def plan_for_panel(
    model_or_name: Any,
    gpu: str | None = None,
    *,
    rows: int | None = None,
    **settings: Any,
) -> Callable[[Mapping[str, Any]], PanelPlan]:
    """Makes the `plan` of `hyperparameter_panel` for a model on a GPU.

    Args:
        model_or_name: as for `colab_qlora.plan_memory`.
        gpu: "T4", "L4", "A100", "H100"; None: this machine's, or a T4 where there is none.
        rows: rows of the training set, for the whole time of a run that counts epochs.
        settings: further arguments of `plan_memory`.

    Returns:
        A function from the panel's parameters to a `PanelPlan`. Of them it reads batch_size,
        max_seq_length, r, gradient_accumulation_steps, num_train_epochs and max_steps, and takes
        2, the model's length (2048 for a name), 16, 1, 1 and -1 for those that are not there. The
        rows are taken to fill max_seq_length: shorter ones take less time. Evaluations and saving
        come on top.
    """
    if rows is not None and rows < 1:
        raise UserError("rows is no number of rows", got=rows, allowed="1 or more, or None")

    usual_length = getattr(model_or_name, "max_seq_length", 2048)

    @lru_cache(maxsize=64)
    def memory(batch_size: int, max_seq_length: int, r: int) -> MemoryPlan:
        from colab_qlora.models.memory_planning import plan_memory

        return plan_memory(model_or_name, batch_size, max_seq_length, gpu, r=r, **settings)

    def plan(parameters: Mapping[str, Any]) -> PanelPlan:
        batch_size = parameters.get("batch_size", 2)
        accumulation = parameters.get("gradient_accumulation_steps", 1)
        length = parameters.get("max_seq_length", usual_length)
        found = memory(batch_size, length, parameters.get("r", 16))
        steps: int | None = parameters.get("max_steps", -1)
        if steps is None or steps <= 0:
            steps = None
            if rows is not None:
                per_epoch = math.ceil(math.ceil(rows / batch_size) / accumulation)
                steps = math.ceil(parameters.get("num_train_epochs", 1) * per_epoch)
        return PanelPlan(found, accumulation, steps)

    return plan


def panel_hints() -> dict[str, str]:
    """The starting value of each setting and which way to move it, for `hyperparameter_panel`."""
    table = {value.name: value for value in STARTING_VALUES}
    return {name: _hint(name, table[row]) for name, row in _ROWS.items()}


def _hint(name: str, value: StartingValue) -> str:
    # two settings that share a row are meant together
    what = f"{value.name}: " if "accumulation" in value.name else ""
    return (
        f"{what}start with {value.start}; raise it when {value.raise_when}; "
        f"lower it when {value.lower_when}"
    )


def _long_text(seconds: float) -> str:
    """ "40 s", "12 min" or "3.4 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
