"""The learning-rate sweep: the same few steps at a third of a rate, at it, and at three times it.

One curve can reject a learning rate, it cannot certify one. A sweep can, if nothing but the rate
differs: every run starts from the same weights with the same seed, sees the same rows in the same
order and is evaluated on the same rows, before the first step, half-way and at the end.

The rate warms up over a tenth of the steps and is constant from there. That is what the first steps
of a long run are like, in which a cosine or linear schedule is still near its top; squeezing the
whole schedule into 40 steps would end every run at a rate of 0 and favour rates that are too high.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from colab_qlora.curves.log import read_log
from colab_qlora.curves.paired import RowLosses
from colab_qlora.curves.remedies.changes import rate_text
from colab_qlora.curves.sweep import SweepResult, SweepRun, first_broken_step, in_order
from colab_qlora.errors import UserError
from colab_qlora.models.settings import settings_of
from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.training.dataset_checks import data_hash
from colab_qlora.training.early_stopping import EarlyStopping
from colab_qlora.training.quantization_schedule import QuantizationSchedule
from colab_qlora.training.resume import LOG_NAME
from colab_qlora.training.row_losses import row_losses
from colab_qlora.training.run_settings import run_settings

__all__ = ["learning_rate_sweep"]

MakeTrainer = Callable[[float, int, str], Any]
_FEWEST_STEPS = 5
_FACTORS = (2, 6)  # a comparison needs two, and a picture tells six runs apart
_WARMUP_SHARE = 0.1


def learning_rate_sweep(
    make_trainer: MakeTrainer,
    learning_rate: float,
    *,
    factors: Sequence[float] = (1 / 3, 1, 3),
    steps: int = 40,
    output_dir: str | Path = "work/learning_rate_sweep",
    least_gain: float = 0.05,
    say: Callable[[str], None] = print,
) -> SweepResult:
    """Trains a few steps at several rates and compares the eval losses row by row.

    Args:
        make_trainer: `make_trainer(learning_rate, max_steps, output_dir)` gives a fresh
            `SFTTrainer` with an eval set. It may load the model anew or use one model for all: the
            adapters' start weights are put back after each run.
        learning_rate: the rate in question, above 0.
        factors: 2 to 6 multiples of it.
        steps: steps of each run, 5 or more; 30 to 60 are usual.
        output_dir: the folder; each run has one below it, with its loss log.
        least_gain: differences below this share of what the best run learnt do not count.
        say: called with one line as each run begins.

    Returns:
        The comparison. A rate whose loss turns nan or inf is a result like any other.

    Raises:
        UserError: a value out of range, a trainer that does not follow what it was asked for or has
            no eval set, or trainers that differ in more than the rate.
    """
    rates = _rates(learning_rate, factors, steps)
    first: dict[str, Any] = {}
    base: RowLosses | None = None
    runs = []
    for index, rate in enumerate(rates):
        say(f"rate {index + 1} of {len(rates)}: {rate_text(rate)}, {steps} steps")
        folder = Path(output_dir) / f"{index + 1}_{rate_text(rate)}"
        trainer = make_trainer(rate, steps, str(folder))
        _check_follows(trainer, rate, steps, folder)
        this = _what_must_agree(trainer)
        first = first or this
        _check_same(first, this)
        if base is None:
            base = row_losses(trainer)
        _turn_off_early_stopping(trainer, say)
        _turn_off_precision_changes(trainer, say)
        runs.append(_run(trainer, rate, steps))
        # an 8B model fits once, not twice
        del trainer
        _free_memory()
    assert base is not None
    return SweepResult(in_order(runs), learning_rate, steps, base, least_gain)


def _run(trainer: Any, rate: float, steps: int) -> SweepRun:
    start = {name: value.detach().cpu().clone() for name, value in _trainable(trainer.model)}
    settings = settings_of(trainer.model)
    trained_steps = settings.trained_steps if settings else 0
    _set_schedule(trainer, steps)
    try:
        # loading and the evaluation before drew random numbers, more in one run than in another
        set_seed(trainer.args.seed)
        began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began
        log = read_log(Path(trainer.args.output_dir) / LOG_NAME)
        return SweepRun(rate, log, row_losses(trainer), first_broken_step(log), seconds)
    finally:
        with torch.no_grad():
            for name, value in _trainable(trainer.model):
                value.copy_(start[name])
        trainer.model.zero_grad(set_to_none=True)
        if settings:
            settings.trained_steps = trained_steps


def _set_schedule(trainer: Any, steps: int) -> None:
    args = trainer.args
    args.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP
    args.lr_scheduler_kwargs = None
    args.warmup_steps = max(1, round(_WARMUP_SHARE * steps))
    args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, 1
    args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, max(1, steps // 2)
    args.eval_on_start = True
    args.save_strategy = SaveStrategy.NO
    trainer.add_callback(_SweepCallback())
    log = getattr(trainer, "_loss_log", None)
    if log is not None:
        log.run = run_settings(trainer)


class _SweepCallback(TrainerCallback):
    """Evaluates after the last step, and stops once the loss is nan or inf."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            control.should_training_stop = True


def _turn_off_early_stopping(trainer: Any, say: Callable[[str], None]) -> None:
    # a run that ends early, or with an earlier adapter, cannot be compared with the others
    if _remove(trainer, EarlyStopping, EarlyStoppingCallback):
        say("early stopping is off in a sweep: all runs have the same number of steps")


def _turn_off_precision_changes(trainer: Any, say: Callable[[str], None]) -> None:
    # each run would end on a base of its own, and with one model for all the next would start there
    if _remove(trainer, QuantizationSchedule):
        say("precision does not change in a sweep: all runs have the same base")


def _remove(trainer: Any, *kinds: type) -> bool:
    """Remove the callbacks of these kinds; whether there were any."""
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, kinds)]
    for callback in found:
        trainer.remove_callback(callback)
    return bool(found)


def _trainable(model: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


def _rates(learning_rate: float, factors: Sequence[float], steps: int) -> list[float]:
    numbers = [learning_rate, *factors]
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise UserError(
            "the rates of a sweep are not all positive",
            got=f"learning_rate={learning_rate}, factors={tuple(factors)}",
            allowed="numbers above 0",
            do="Pass learning_rate=2e-4 and leave factors out",
        )
    if not _FACTORS[0] <= len(factors) <= _FACTORS[1]:
        raise UserError(
            "a sweep needs other factors",
            got=f"{len(factors)} of them",
            allowed=f"{_FACTORS[0]} to {_FACTORS[1]}",
            do="Leave factors out for a third, one and three",
        )
    if steps < _FEWEST_STEPS:
        raise UserError(
            "the runs of a sweep are too short",
            got=f"steps={steps}",
            allowed=f"{_FEWEST_STEPS} or more",
            do="Pass steps=40",
        )
    return [float(f"{learning_rate * factor:.6g}") for factor in sorted(factors)]


def _check_follows(trainer: Any, rate: float, steps: int, folder: Path) -> None:
    args = trainer.args
    asked = {"learning_rate": rate, "max_steps": steps, "output_dir": str(folder)}
    ignored = [name for name, value in asked.items() if getattr(args, name) != value]
    if ignored:
        raise UserError(
            f"make_trainer does not pass on {', '.join(ignored)}",
            got=", ".join(f"{name}={getattr(args, name)}" for name in ignored),
            allowed=", ".join(f"{name}={asked[name]}" for name in ignored),
            do="Give SFTConfig the learning_rate, max_steps and output_dir that it is called with",
        )
    sets = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    for name, rows in sets.items():
        if not isinstance(rows, Dataset):
            raise UserError(
                f"a sweep needs one {name} with rows",
                got="none" if rows is None else type(rows).__name__,
                allowed="a datasets.Dataset or a list of dicts",
                do=f"Pass {name} to the SFTTrainer in make_trainer",
            )


def _what_must_agree(trainer: Any) -> dict[str, Any]:
    """All that a paired comparison keeps equal, by name."""
    found = run_settings(trainer)
    del found["learning_rate"]
    weights = hashlib.sha256()
    for name, value in _trainable(trainer.model):
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    state = dynamic_state(trainer.model)
    if state is not None:
        rungs = json.dumps(state.map.rungs, sort_keys=True).encode()
        found["precisions of the base"] = hashlib.sha256(rungs).hexdigest()[:12]
    return found | {
        "data_seed": trainer.args.data_seed,
        "eval_rows": len(trainer.eval_dataset),
        "eval_data_hash": data_hash(trainer.eval_dataset),
        "start weights of the adapters": weights.hexdigest()[:12],
    }


def _check_same(first: dict[str, Any], this: dict[str, Any]) -> None:
    names = [*first, *(name for name in this if name not in first)]
    other = {n: (first.get(n), this.get(n)) for n in names if first.get(n) != this.get(n)}
    if other:
        words = ", ".join(f"{name} {now} instead of {then}" for name, (then, now) in other.items())
        raise UserError(
            "the trainers of the sweep differ in more than the learning rate",
            got=words,
            allowed="the same rows, seed, settings and start weights in all runs",
            do="Build them from the same rows with one seed and one random_state",
        )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
