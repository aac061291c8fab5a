"""What an advice needs to know of a run and of its machine; anything may be unknown.

The defaults that the advice leans on stand here too. They are starting points from published LoRA
work (a rate of 2e-4, rank 16, 8 to 16 rows a step), not optima.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from colab_qlora.curves.logs.records import number_or_none
from colab_qlora.curves.logs.runs import has_ended
from colab_qlora.curves.verdicts import Diagnosis
from colab_qlora.errors import UserError

__all__ = ["RunFacts", "facts_of"]

USUAL_RATE = 2e-4
# models below a billion parameters train at rates that a larger one does not survive
USUAL_RATE_SMALL = 1e-3
SMALL_MODEL_BILLIONS = 1.0
USUAL_R = 16
LEAST_ROWS_PER_STEP = 8
LEAST_WARMUP_SHARE, WARMUP_SHARE = 0.03, 0.05
EVAL_SHARE, LEAST_EVAL_ROWS, MOST_EVAL_ROWS = 0.05, 64, 500
# below, one holds memory back for longer rows instead of raising the batch
LARGE_GPU_GIB = 40.0
# a log that ends in the last tenth of the plan may lack only its last records
_WHOLE_SHARE = 0.9
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([mb])(?![a-z0-9])", re.IGNORECASE)
# the kit's own model, whose name says no size
_EMBEDDED = {"embedded": 0.135}


@dataclass(frozen=True)
class RunFacts:
    """The settings of a run as numbers; None means unknown.

    Attributes:
        last_step: the last step of the log.
        has_eval: whether there was an evaluation after step 0.
        learning_rate: the highest rate of the schedule.
        epochs: `num_train_epochs`, whether or not `max_steps` overrules it.
        max_steps: None unless above 0, that is, unless it decides the length.
        batch_size: `per_device_train_batch_size`, in rows.
        accumulation: `gradient_accumulation_steps`.
        train_rows: rows after packing.
        logged_epoch_steps: steps of an epoch as the log counted them.
        warmup_steps: in steps.
        r, alpha, dropout, use_rslora: those of the adapters.
        compute_dtype: "float16", "bfloat16" or "float32".
        model_billions: parameters in billions, read from the model's name.
        gpu_gib: memory of the GPU.
        has_native_bf16: whether the machine computes in bfloat16.
        is_finished: whether the run is over, stopped or not.
    """

    last_step: int
    has_eval: bool
    learning_rate: float | None = None
    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    train_rows: int | None = None
    logged_epoch_steps: float | None = None
    warmup_steps: int | None = None
    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    use_rslora: bool = False
    compute_dtype: str | None = None
    model_billions: float | None = None
    gpu_gib: float | None = None
    has_native_bf16: bool = False
    is_finished: bool | None = None

    @property
    def rows_per_step(self) -> int | None:
        """Rows of one update: batch x accumulation."""
        if self.batch_size is None or self.accumulation is None:
            return None
        return self.batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps of one pass over the rows."""
        if self.train_rows is None or self.rows_per_step is None:
            return self.logged_epoch_steps
        return math.ceil(self.train_rows / self.rows_per_step)

    @property
    def planned_steps(self) -> int | None:
        """Steps that the run was to have."""
        if self.max_steps is not None:
            return self.max_steps
        if self.epochs is None or self.steps_per_epoch is None:
            return None
        return math.ceil(self.epochs * self.steps_per_epoch)

    @property
    def steps(self) -> int:
        """Steps planned, or where that is unknown, those in the log."""
        return self.planned_steps or self.last_step

    @property
    def passes(self) -> float | None:
        """Epochs that the run was to have, whichever setting decides its length."""
        if self.max_steps is None:
            return self.epochs
        return None if self.steps_per_epoch is None else self.max_steps / self.steps_per_epoch

    @property
    def is_running(self) -> bool:
        """Whether the run goes on; where nobody says, whether its log ends before its plan does.

        A run without a known plan counts as over then.
        """
        if self.is_finished is not None:
            return not self.is_finished
        return self.planned_steps is not None and self.last_step < self.planned_steps

    @property
    def was_stopped(self) -> bool:
        """Whether the run is known to be over, and ended well before its plan did."""
        planned = self.planned_steps
        return (
            self.is_finished is True
            and planned is not None
            and (self.last_step < _WHOLE_SHARE * planned)
        )

    @property
    def usual_rate(self) -> float:
        """The rate to begin with for a model of this size."""
        is_small = self.model_billions is not None and self.model_billions < SMALL_MODEL_BILLIONS
        return USUAL_RATE_SMALL if is_small else USUAL_RATE

    @property
    def rate_ratio(self) -> float | None:
        """How many times the usual rate this run's was."""
        return None if self.learning_rate is None else self.learning_rate / self.usual_rate

    @property
    def warmup_share(self) -> float | None:
        """Warm-up as a share of all steps."""
        if self.warmup_steps is None or self.steps == 0:
            return None
        return self.warmup_steps / self.steps

    @property
    def is_small_gpu(self) -> bool:
        """Whether a larger batch could run out of memory; an unknown machine counts as small."""
        return self.gpu_gib is None or self.gpu_gib < LARGE_GPU_GIB


def facts_of(
    diagnosis: Diagnosis,
    run: object = None,
    machine: object = None,
    is_finished: bool | None = None,
) -> RunFacts:
    """Gathers what is known.

    Args:
        diagnosis: the reading of the run's log.
        run: the hyperparameters, as in `LossLog.run`, or the LossLog; None if unknown. A value that
            is no number where one belongs counts as unknown.
        machine: anything with `gpu_total_gib` and `has_native_bf16` as attributes or keys, for
            instance what `inspect_environment()` returns; None if unknown.
        is_finished: whether the run is over; None: what the diagnosis or the log says.

    Raises:
        UserError: `diagnosis` or `run` is something else.
    """
    if not isinstance(diagnosis, Diagnosis):
        raise UserError(
            "that is not a diagnosis",
            got=type(diagnosis).__name__,
            do="Pass diagnose(log), for instance advise(diagnose(log), log.run)",
        )
    records = getattr(run, "records", ())
    if is_finished is None:
        is_finished = diagnosis.is_finished
    if is_finished is None and has_ended(records):
        is_finished = True
    settings = _settings(getattr(run, "run", run))
    return RunFacts(
        last_step=diagnosis.last_step,
        has_eval=diagnosis.best_eval_loss is not None,
        learning_rate=_positive(settings.get("learning_rate")),
        epochs=_positive(settings.get("num_train_epochs")),
        max_steps=_count(settings.get("max_steps")),
        batch_size=_count(settings.get("per_device_train_batch_size")),
        accumulation=_count(settings.get("gradient_accumulation_steps")),
        train_rows=_count(settings.get("train_rows")),
        logged_epoch_steps=_epoch_steps(records),
        warmup_steps=_count(settings.get("warmup_steps"), least=0),
        r=_count(settings.get("r")),
        alpha=_positive(settings.get("lora_alpha")),
        dropout=number_or_none(settings.get("lora_dropout")),
        use_rslora=settings.get("use_rslora") is True,
        compute_dtype=str(settings.get("compute_dtype") or "").removeprefix("torch.") or None,
        model_billions=_billions(settings.get("model_name")),
        gpu_gib=_positive(_of_machine(machine, "gpu_total_gib")),
        has_native_bf16=_of_machine(machine, "has_native_bf16") is True,
        is_finished=is_finished,
    )


def _settings(run: object) -> Mapping[str, Any]:
    if run is None:
        return {}
    if not isinstance(run, Mapping):
        raise UserError(
            "the run's settings are not a mapping",
            got=type(run).__name__,
            allowed="a dict of hyperparameters, a LossLog, or None",
        )
    return run


def _positive(value: object) -> float | None:
    number = number_or_none(value)
    return number if number is not None and math.isfinite(number) and number > 0 else None


def _count(value: object, least: int = 1) -> int | None:
    number = number_or_none(value)
    # transformers also takes a share of all steps for warmup_steps, which is no count
    if number is None or not number.is_integer() or number < least:
        return None
    return int(number)


def _epoch_steps(records: Iterable[Mapping[str, Any]]) -> float | None:
    pairs = [(_positive(row.get("step")), _positive(row.get("epoch"))) for row in records]
    known = [step / epoch for step, epoch in pairs if step is not None and epoch is not None]
    return known[-1] if known else None


def _of_machine(machine: object, name: str) -> object:
    if isinstance(machine, Mapping):
        return machine.get(name)
    return getattr(machine, name, None)


def _billions(name: object) -> float | None:
    """Parameters in billions from a name such as "SmolLM2-135M-Instruct" or "Llama-3.1-8B"."""
    text = str(name or "")
    if text in _EMBEDDED:
        return _EMBEDDED[text]
    found = _SIZE.search(text.rsplit("/", 1)[-1])
    if found is None:
        return None
    return float(found[1]) / (1000 if found[2].lower() == "m" else 1)
