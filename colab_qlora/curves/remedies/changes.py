"""One change of a setting: from which value to which, why, and what the next curve should show.

A function a setting; each computes the new value from the run and returns None where that setting
has nothing left to give. What is not known of the run is left out of the words, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from colab_qlora.curves.remedies.run_facts import (
    EVAL_SHARE,
    LEAST_EVAL_ROWS,
    LEAST_ROWS_PER_STEP,
    LEAST_WARMUP_SHARE,
    MOST_EVAL_ROWS,
    USUAL_R,
    WARMUP_SHARE,
    RunFacts,
)

__all__ = ["SETTINGS", "Candidates", "Change", "rate_text"]

SETTINGS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "r",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "warmup_steps",
    "lora_dropout",
    "eval_strategy",
    "logging_steps",
    "compute_dtype",
    "adapters",
    "data",
    "none",
)
_FACTOR_WORDS = {
    0.1: "divide the learning rate by ten",
    0.5: "halve the learning rate",
    3.0: "triple the learning rate",
    10.0: "multiply the learning rate by ten",
}
_MOST_DROPOUT, _USUAL_DROPOUT = 0.1, 0.05
# below, more rows help more than any setting
FEW_ROWS = 500


@dataclass(frozen=True)
class Change:
    """One setting, changed.

    Attributes:
        setting: one of `SETTINGS`; "data" and "adapters" are not a number, "none" is no change.
        now: the value in this run, or None if unknown.
        then: the value to try, or None where there is none to compute.
        do: the change as an imperative clause without a full stop.
        why: the reason as a clause, with numbers.
        expect: what the next curve shows if that is right, as a clause.
        arguments: keyword arguments of SFTConfig or get_peft_model with the new value.
    """

    setting: str
    now: Any
    then: Any
    do: str
    why: str
    expect: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.setting in SETTINGS, self.setting

    def as_arguments(self) -> dict[str, Any]:
        """The new value as keyword arguments: of `get_peft_model` for `r` and `lora_dropout`, of
        `SFTConfig` for the rest; empty where no argument makes the change."""
        return dict(self.arguments)

    def text(self) -> str:
        """The change in two sentences."""
        return f"{_capital(self.do)}, because {self.why}. If that is right, {self.expect}."

    def __str__(self) -> str:
        return self.text()


# in the order to try them; None where a setting has nothing left to give
Candidates = list[Change | None]


def rate_text(rate: float) -> str:
    """Writes a learning rate with two digits: 2e-4, 6.7e-5."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def change_rate(facts: RunFacts, factor: float, why: str, expect: str) -> Change:
    """Multiplies the learning rate; in words only where the run does not say what it was."""
    words = _FACTOR_WORDS[factor]
    now = facts.learning_rate
    if now is None:
        do = f"{words} (the log does not say what it was)"
        return Change("learning_rate", None, None, do, why, expect)
    return set_rate(facts, now * factor, why, expect)


def set_rate(facts: RunFacts, rate: float, why: str, expect: str) -> Change:
    """Sets the learning rate, rounded to two digits."""
    now, then = facts.learning_rate, float(f"{rate:.2g}")
    verb = "set" if now is None else "lower" if then < now else "raise"
    since = "" if now is None else f"from {rate_text(now)} "
    do = f"{verb} learning_rate {since}to {rate_text(then)}"
    return Change("learning_rate", now, then, do, why, expect, {"learning_rate": then})


def sweep_rates(facts: RunFacts) -> Change:
    """Compares three rates, which is the one way to know that a rate is the best."""
    now = facts.learning_rate
    rates = None if now is None else tuple(float(f"{now * f:.2g}") for f in (1 / 3, 1, 3))
    words = "a third of, at and at three times the rate"
    if rates is not None:
        words = ", ".join(rate_text(rate) for rate in rates)
    return Change(
        "learning_rate",
        now,
        rates,
        f"compare three learning rates over 40 steps each with learning_rate_sweep ({words})",
        "one curve cannot tell whether its rate is the best one",
        "the eval loss is lowest at this run's rate, or clearly lower at another",
    )


def shorten_to_best(facts: RunFacts, best_step: int | None, why: str, expect: str) -> Change | None:
    """Ends the run where its eval loss was lowest; one epoch earlier where there was no eval."""
    per_epoch, epochs = facts.steps_per_epoch, facts.epochs
    if best_step is None:
        if facts.max_steps is not None or epochs is None or epochs < 2:
            return None
        return _set_epochs(epochs, math.ceil(epochs) - 1, why, expect)
    if best_step >= facts.last_step:
        return None
    if facts.max_steps is None and per_epoch is not None and epochs is not None:
        # an eval is a sample of the curve, so the nearest whole epoch is as good as its step
        nearest = max(1, math.floor(best_step / per_epoch + 0.5))
        if nearest < epochs:
            return _set_epochs(epochs, nearest, why, expect)
    return _set_steps(facts.max_steps, best_step, facts, why, expect)


def lengthen(facts: RunFacts, why: str, expect: str) -> Change:
    """Adds a third to the length, and at least an epoch where epochs decide it."""
    if facts.max_steps is None and facts.epochs is not None:
        then = math.floor(facts.epochs) + max(1, math.ceil(facts.epochs / 3))
        return _set_epochs(facts.epochs, then, why, expect)
    steps = math.ceil(facts.steps * 4 / 3)
    return _set_steps(facts.max_steps, steps, facts, why, expect)


def run_steps(facts: RunFacts, steps: int, why: str, expect: str) -> Change:
    """Sets the number of steps."""
    return _set_steps(facts.max_steps, steps, facts, why, expect)


def _set_epochs(now: float, then: int, why: str, expect: str) -> Change:
    verb = "lower" if then < now else "raise"
    do = f"{verb} num_train_epochs from {now:g} to {then}"
    shown = int(now) if float(now).is_integer() else now
    return Change("num_train_epochs", shown, then, do, why, expect, {"num_train_epochs": then})


def _set_steps(now: int | None, then: int, facts: RunFacts, why: str, expect: str) -> Change:
    ran = f"this run had {facts.last_step:,} steps" if now is None else f"now {now:,}"
    do = f"set max_steps={then} ({ran})"
    return Change("max_steps", now, then, do, why, expect, {"max_steps": then})


def lower_r(facts: RunFacts, expect: str) -> Change | None:
    """Lowers the rank towards the usual one, and its scale stays; None at 16 or below."""
    if facts.r is None or facts.r <= USUAL_R:
        return None
    why = (
        f"rank {facts.r} has {facts.r / USUAL_R:g} times the room of rank {USUAL_R} for single rows"
    )
    return _set_r(facts, USUAL_R, why, expect)


def raise_r(facts: RunFacts, expect: str) -> Change | None:
    """Doubles the rank, and its scale stays; None from 64 up, where it no longer matters."""
    if facts.r is None or facts.r >= 4 * USUAL_R:
        return None
    why = f"rank {facts.r} may be too small to hold what the rows have to teach"
    return _set_r(facts, 2 * facts.r, why, expect)


def _set_r(facts: RunFacts, then: int, why: str, expect: str) -> Change:
    now = facts.r
    assert now is not None
    arguments: dict[str, Any] = {"r": then}
    kept = ""
    if facts.alpha is not None:
        # the adapter is scaled by alpha / r, or alpha / sqrt(r) with rslora: one change, not two
        ratio = math.sqrt(then / now) if facts.use_rslora else then / now
        alpha = float(f"{facts.alpha * ratio:.4g}")
        arguments["lora_alpha"] = int(alpha) if alpha.is_integer() else alpha
        kept = f", with lora_alpha={arguments['lora_alpha']} so that the scale stays"
    verb = "lower" if then < now else "raise"
    return Change("r", now, then, f"{verb} r from {now} to {then}{kept}", why, expect, arguments)


def raise_dropout(facts: RunFacts, expect: str) -> Change | None:
    """Turns dropout on, or up to 0.1; None beyond that, or where it is unknown."""
    now = facts.dropout
    if now is None or now >= _MOST_DROPOUT:
        return None
    then = _USUAL_DROPOUT if now < _USUAL_DROPOUT else _MOST_DROPOUT
    do = f"raise lora_dropout from {now:g} to {then:g}"
    why = "dropout makes it harder to learn single rows by heart"
    return Change("lora_dropout", now, then, do, why, expect, {"lora_dropout": then})


def raise_rows_per_step(facts: RunFacts, expect: str) -> Change | None:
    """Averages over at least 8 rows a step; None where a step has as many, or it is unknown."""
    rows, batch, accumulation = facts.rows_per_step, facts.batch_size, facts.accumulation
    if rows is None or batch is None or accumulation is None or rows >= LEAST_ROWS_PER_STEP:
        return None
    why = f"a step averages over {rows} rows, and below {LEAST_ROWS_PER_STEP} it is mostly noise"
    if facts.is_small_gpu:
        setting, now, then = (
            "gradient_accumulation_steps",
            accumulation,
            math.ceil(LEAST_ROWS_PER_STEP / batch),
        )
        why += f"; the batch of {batch} stays, and so does the memory"
    else:
        setting, now, then = (
            "per_device_train_batch_size",
            batch,
            math.ceil(LEAST_ROWS_PER_STEP / accumulation),
        )
        why += f"; a GPU of {facts.gpu_gib:.0f} GiB has room for the larger batch"
    do = f"raise {setting} from {now} to {then}"
    return Change(setting, now, then, do, why, expect, {setting: then})


def raise_warmup(facts: RunFacts, expect: str) -> Change | None:
    """Warms up over 5 % of the steps; None where it is 3 % already, or unknown."""
    share, now = facts.warmup_share, facts.warmup_steps
    if share is None or now is None or share >= LEAST_WARMUP_SHARE:
        return None
    # five steps are enough for any run, and too many for one of twenty
    then = max(1, min(5, facts.steps // 4), math.ceil(WARMUP_SHARE * facts.steps))
    why = f"the rate reaches its full height after {now} of {facts.steps:,} steps ({share:.1%})"
    do = f"raise warmup_steps from {now} to {then}"
    return Change("warmup_steps", now, then, do, why, expect, {"warmup_steps": then})


def add_eval(facts: RunFacts, why: str, expect: str) -> Change:
    """Adds an evaluation on rows that are held out, before the first step and ten times after."""
    every = max(1, facts.steps // 10)
    rows = facts.train_rows
    held_out = "5 % of the rows (64 to 500)"
    if rows is not None:
        usual = min(MOST_EVAL_ROWS, max(LEAST_EVAL_ROWS, round(EVAL_SHARE * rows)))
        # of a tiny data set no more than a fifth can be spared
        held_out = f"{max(1, min(usual, rows // 5))} of the {rows:,} rows"
    do = (
        f"hold out {held_out} with split_rows, pass them as eval_dataset, and evaluate before the "
        f"first step and every {every} steps"
    )
    arguments = {"eval_strategy": "steps", "eval_steps": every, "eval_on_start": True}
    return Change("eval_strategy", "no", "steps", do, why, expect, arguments)


def eval_for(facts: RunFacts, what: str) -> Change:
    """Adds an evaluation because a curve cannot tell `what` without one."""
    why = f"without an eval loss a curve cannot tell {what}"
    expect = "the eval loss begins at the untrained model's value and falls with the train loss"
    return add_eval(facts, why, expect)


def more_rows(facts: RunFacts, expect: str) -> Change:
    """Doubles the rows."""
    rows = facts.train_rows
    if rows is None:
        return look_at_data("add rows, twice as many", "more rows leave less to repeat", expect)
    few = " (1,000 are a good start)" if rows < FEW_ROWS else ""
    do = f"add rows: {2 * rows:,} instead of {rows:,}{few}"
    return look_at_data(do, f"{rows:,} rows teach little beyond themselves", expect)


def look_at_data(do: str, why: str, expect: str) -> Change:
    """Changes the rows, not a number."""
    return Change("data", None, None, do, why, expect)


def keep(do: str, why: str, expect: str) -> Change:
    """Changes nothing."""
    return Change("none", None, None, do, why, expect)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
