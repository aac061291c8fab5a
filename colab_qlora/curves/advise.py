"""From a diagnosis to advice: one change, why, and what the next curve shows if it was right.

    >>> log = read_log("work/loss_log.jsonl")
    >>> advice = advise(diagnose(log), log.run)
    >>> print(advice.text())
    >>> SFTConfig("outputs", **{**settings, **advice.as_arguments()})

Pure: it reads the diagnosis and the run's settings and touches nothing. The candidates of each
verdict and the changes themselves are in `remedies/`.
"""

from __future__ import annotations

from dataclasses import dataclass

from colab_qlora.curves.remedies.by_verdict import remedies_for
from colab_qlora.curves.remedies.changes import SETTINGS, Change
from colab_qlora.curves.remedies.run_facts import RunFacts, facts_of
from colab_qlora.curves.verdicts import Diagnosis, Verdict

__all__ = ["SETTINGS", "Advice", "Change", "advise"]

# what a finished run confirms by itself: its best step is known, watch or not
_CHEAP_TO_ACT_ON = ("overfitting", "eval rising", "memorising")
_RATE_LIMIT = (
    "whether the learning rate is the best one: 3 times too high, or 10 to 100 times too low, can "
    "look healthy; a sweep tells (learning_rate_sweep)"
)


@dataclass(frozen=True)
class Advice(Change):
    """The one change to make next; `why` begins with the evidence of the verdict.

    Attributes:
        headline: all verdicts in one line.
        verdict: the verdict that the advice answers.
        cannot_tell: what this curve leaves open, as a clause.
        alternatives: what to try if that does not help, in order.
        subject: what was read.
    """

    headline: str = ""
    verdict: Verdict | None = None
    cannot_tell: str = ""
    alternatives: tuple[Change, ...] = ()
    subject: str = "This run"

    def text(self) -> str:
        """The advice in three to five lines: what, what next, what to expect, and the limits."""
        because, reason = self.why, ""
        if self.verdict is not None:
            because = self.verdict.because
            reason = f": {self.why.removeprefix(because + '; ')}"
        lines = [
            f"{self.subject}: {self.headline}, because {because}.",
            f"So next: {self.do}{reason}.",
            f"If that is right, {self.expect}.",
        ]
        if self.alternatives:
            # two are enough to read; all are in `alternatives`
            others = "; then ".join(change.do for change in self.alternatives[:2])
            when = "To go further" if self.setting == "none" else "If it does not help"
            lines.append(f"{when}: {others}.")
        if self.cannot_tell:
            lines.append(f"What that cannot tell: {self.cannot_tell}.")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def advise(
    diagnosis: Diagnosis,
    run: object = None,
    machine: object = None,
    *,
    is_finished: bool | None = None,
) -> Advice:
    """Says what to change next, one thing at a time.

    Args:
        diagnosis: the reading of the run's log, from `diagnose`.
        run: the run's hyperparameters, as in `LossLog.run`, or the LossLog itself. What is missing
            is left out of the advice, not guessed.
        machine: what `inspect_environment()` gives, or a mapping with `gpu_total_gib` (GiB) and
            `has_native_bf16`; without it the advice spares memory.
        is_finished: whether the run is over, stopped or not; None: what the diagnosis or the log
            says of that, and where neither does, a run counts as over once it has its planned
            steps.

    Returns:
        One change with its reason and its visible effect, and the next candidates.

    Raises:
        UserError: `diagnosis` is not one, or `run` is no mapping.
    """
    facts = facts_of(diagnosis, run, machine, is_finished)
    verdict = _verdict_to_act_on(diagnosis, facts)
    changes = remedies_for(facts, verdict, diagnosis)
    if _has_to_wait(verdict, facts):
        changes = [_wait(verdict, facts), *changes]
    first, rest = changes[0], tuple(changes[1:])
    return Advice(
        setting=first.setting,
        now=first.now,
        then=first.then,
        do=first.do,
        why=f"{verdict.because}; {first.why}",
        expect=first.expect,
        arguments=first.arguments,
        headline=diagnosis.headline,
        verdict=verdict,
        cannot_tell=_cannot_tell(facts),
        alternatives=rest,
    )


def _verdict_to_act_on(diagnosis: Diagnosis, facts: RunFacts) -> Verdict:
    """The main verdict, unless it is a "watch" or a note and another one is a firm statement."""
    main = diagnosis.main
    is_firm = main.confidence != "watch" or (main.name in _CHEAP_TO_ACT_ON and not facts.is_running)
    if is_firm and main.kind != "info":
        return main
    firm = [v for v in diagnosis.verdicts if v.confidence != "watch" and v.kind != "info"]
    return firm[0] if firm else main


def _has_to_wait(verdict: Verdict, facts: RunFacts) -> bool:
    return verdict.confidence == "watch" and facts.is_running and verdict.kind != "info"


def _wait(verdict: Verdict, facts: RunFacts) -> Change:
    planned = "" if facts.planned_steps is None else f" of {facts.planned_steps:,}"
    return Change(
        "none",
        None,
        None,
        "change nothing yet; let the run go on, and read its curve again",
        f"at step {facts.last_step:,}{planned} this may still be chance",
        f'the next two evaluations confirm the verdict "{verdict.title}", or it goes away',
    )


def _cannot_tell(facts: RunFacts) -> str:
    no_eval = "" if facts.has_eval else "whether new rows gain too, for want of an eval loss; "
    return no_eval + _RATE_LIMIT
