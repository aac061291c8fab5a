"""One change of a setting: from which value to which, why, and what the next curve should show.

A function a setting; each computes the new value from the run and returns None where that setting
has nothing left to give. What is not known of the run is left out of the words, never guessed.

Here are the change itself and the settings of a step: rate, warm-up, rows. The length of a run, its
adapters and its data are in `length_changes.py`, `adapter_changes.py` and `row_changes.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from colab_qlora.curves.picture.marks import count_words
from colab_qlora.curves.remedies.run_facts import (
    LEAST_ROWS_PER_STEP,
    LEAST_WARMUP_SHARE,
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


def raise_rows_per_step(facts: RunFacts, expect: str) -> Change | None:
    """Averages over at least 8 rows a step; None where a step has as many, or it is unknown."""
    rows, batch, accumulation = facts.rows_per_step, facts.batch_size, facts.accumulation
    if rows is None or batch is None or accumulation is None or rows >= LEAST_ROWS_PER_STEP:
        return None
    why = f"a step averages over {count_words(rows, 'row')}"
    why += f", and below {LEAST_ROWS_PER_STEP} it is mostly noise"
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
    steps = count_words(facts.steps, "step")
    why = f"the rate reaches its full height after {now} of {steps} ({share:.1%})"
    do = f"raise warmup_steps from {now} to {then}"
    return Change("warmup_steps", now, then, do, why, expect, {"warmup_steps": then})


def keep(do: str, why: str, expect: str) -> Change:
    """Changes nothing."""
    return Change("none", None, None, do, why, expect)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
