"""Reads a loss log: which verdicts hold, in the order of importance.

Numbers that are no losses are said first and end the reading, for no other rule can trust them.
Then come the eval loss against its value before training and the train loss against its own best:
a run that fails there is not read further either. What is left may combine. Every rule abstains
where the evidence is thin; a run without a fault is healthy, and then its ending is said too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from colab_qlora.curves.logs.runs import has_ended, run_starts
from colab_qlora.curves.picture.marks import count_words
from colab_qlora.curves.picture.series import loss_text
from colab_qlora.curves.rules.broken import collapsed, non_finite, scale_mismatch, skipped_steps
from colab_qlora.curves.rules.evals import below_train, leakage, turned, worse_than_base
from colab_qlora.curves.rules.readings import Readings, read_numbers
from colab_qlora.curves.rules.stability import spikes, unstable
from colab_qlora.curves.rules.stairs import stairs
from colab_qlora.curves.rules.train import ending, not_learning, slow
from colab_qlora.curves.thresholds import Thresholds
from colab_qlora.curves.verdicts import NAMES, Diagnosis, Verdict
from colab_qlora.errors import UserError

__all__ = ["diagnose"]

# the first that holds ends the reading
_FIRST = (non_finite, collapsed, scale_mismatch, worse_than_base)
# a suspicion of one of these is enough not to call a run healthy
_DOUBTS = ("overfitting", "eval rising", "worse than base")
_COMBINED = (unstable, turned, leakage, below_train, not_learning)


def diagnose(
    log: Iterable[Mapping[str, Any]],
    *,
    run: Mapping[str, Any] | None = None,
    thresholds: Thresholds | None = None,
    is_finished: bool | None = None,
) -> Diagnosis:
    """Reads a loss log.

    Args:
        log: a LossLog, or records (dicts with `step` and `loss` or `eval_loss`), in any order.
        run: the hyperparameters; those of the LossLog if it is one.
        thresholds: where the rules draw their lines.
        is_finished: False while training goes on; what needs the whole run is not said then. None:
            the run is read as a whole one, and the diagnosis says that it is over only where the
            log does.

    Returns:
        At least one verdict, the most important first.

    Raises:
        UserError: `log` is no log, has no loss at all, or holds more than one run.

    Example:
        >>> print(diagnose(read_log("work/loss_log.jsonl")))
    """
    if isinstance(log, (str, bytes, Mapping)) or not isinstance(log, Iterable):
        raise UserError(
            "that is not a loss log",
            got=type(log).__name__,
            allowed="a LossLog or a list of records",
            do="Pass read_log(path)",
        )
    run = getattr(log, "run", None) if run is None else run
    records = list(log)
    _check_one_run(records)
    if is_finished is None and has_ended(records):
        is_finished = True
    r = read_numbers(records, run, thresholds or Thresholds(), is_finished is not False)
    found = _verdicts(r)
    best = None if r.best is None else (int(r.eval_steps[r.best]), float(r.evals[r.best]))
    rising = next((v for v in found if v.name in ("overfitting", "eval rising")), None)
    return Diagnosis(
        tuple(found),
        r.last_step,
        best[0] if best else None,
        best[1] if best else None,
        r.base,
        rising.step if rising and rising.confidence != "watch" else None,
        r.noise if not r.is_short else None,
        _notes(r, found),
        is_finished,
    )


def _check_one_run(records: list[Mapping[str, Any]]) -> None:
    starts = run_starts(records)
    if len(starts) > 1:
        raise UserError(
            "the log holds several runs",
            got=f"{len(starts)} runs; the second begins at record {starts[1] + 1}",
            allowed="one run",
            do="Pass one of split_runs(log)",
        )


def _verdicts(r: Readings) -> list[Verdict]:
    broken = non_finite(r)
    if broken:
        return [broken]
    if not r.points and not r.evals.size and r.base is None:
        raise UserError(
            "the log has no loss values",
            got=f"{len(r.records)} records",
            allowed="records with loss or eval_loss",
            do="Wait for the first logged step",
        )
    aside = [v for v in (spikes(r), skipped_steps(r)) if v]
    for rule in _FIRST[1:]:
        verdict = rule(r)
        if verdict and verdict.kind == "fault" and verdict.confidence != "watch":
            return [verdict, *aside]
    if not _has_evidence(r):
        return [_abstain(r), *aside]
    found = [v for rule in (*_FIRST[1:], *_COMBINED) if (v := rule(r))]
    if (steps := stairs(r)) is not None:
        found.append(steps)
    names = {verdict.name for verdict in found}
    if not names & {"not learning", "overfitting", "unstable", "worse than base"}:
        found += [v for v in (slow(r),) if v]
    found.sort(key=_rank)
    is_doubted = any(v.name in _DOUBTS or v.confidence != "watch" for v in found if _is_bad(v))
    if not is_doubted:
        found = [*_sound(r, names), *found]
    return [*found, *aside]


def _is_bad(verdict: Verdict) -> bool:
    return verdict.kind in ("fault", "warning")


def _rank(verdict: Verdict) -> tuple[int, int]:
    # a suspicion comes after what is certain
    return (verdict.confidence == "watch", list(NAMES).index(verdict.name))


def _has_evidence(r: Readings) -> bool:
    if not r.is_short or r.evals.size >= r.limits.least_evals:
        return True
    # a table of a few points, such as one an epoch, that swings is evidence of that alone
    return unstable(r) is not None


def _abstain(r: Readings) -> Verdict:
    points, evals = count_words(r.points, "train point"), count_words(r.evals.size, "eval")
    return Verdict(
        "not enough evidence",
        "info",
        "sure",
        None,
        f"the log has {points} and {evals} after step 0; "
        f"{r.limits.least_points} or {r.limits.least_evals} are needed",
        "train on, or log every step (logging_steps=1) and evaluate more often",
        {"points": float(r.points), "evals": float(r.evals.size)},
    )


def _sound(r: Readings, names: set[str]) -> list[Verdict]:
    """Healthy, and how the run ends; nothing where a suspicion or the eval loss speaks against."""
    first = r.base if r.base is not None else (float(r.evals[0]) if r.evals.size else None)
    if r.evals.size:
        last = float(r.evals[-1])
        if first is not None and r.evals.size + (r.base is not None) > 1 and last >= first:
            return [_undecided(r, first, last)]
        because = f"the eval loss is {loss_text(last)}"
        if first is not None and last < first:
            because = f"the eval loss fell from {loss_text(first)} to {loss_text(last)}"
        lowest = float(r.evals.min())
        if last <= lowest:
            because += ", its lowest"
        elif lowest > 0:
            because += f", {last / lowest - 1:.1%} above its lowest"
        confidence = "sure" if r.evals.size >= 3 else "likely"
    else:
        fell = f"fell {r.fall:.0%}" if r.has_levels else "shows no number that broke,"
        because = f"the train loss {fell} without a fault; there is no eval loss"
        confidence = "likely"
    if not r.is_finished:
        action = "train on"
    elif not r.evals.size:
        action = "add an eval set: without one nobody can see overfitting"
    else:
        assert r.best is not None
        action = f"keep the checkpoint of step {int(r.eval_steps[r.best]):,}"
    end = None if names & {"memorising"} else ending(r)
    healthy = Verdict("healthy", "good", confidence, None, because, action, {"fall": r.fall})
    return [healthy, *([end] if end else [])]


def _undecided(r: Readings, first: float, last: float) -> Verdict:
    return Verdict(
        "not enough evidence",
        "info",
        "watch",
        None,
        f"the eval loss went from {loss_text(first)} to {loss_text(last)}, which neither helps nor "
        "harms by more than chance",
        "train on, or try three learning rates (learning_rate_sweep)",
        {"first": first, "last": last},
    )


def _notes(r: Readings, found: list[Verdict]) -> tuple[str, ...]:
    notes = []
    if any(v.name == "healthy" for v in found):
        notes.append(
            "One curve cannot tell whether the learning rate is the best one: three times too high "
            "or ten to a hundred times too low can look like this."
        )
    if r.points and not r.has_levels:
        notes.append("Train losses below 0 are no cross-entropies; only the eval loss was judged.")
    if not r.evals.size and r.points and not any(v.name == "healthy" for v in found):
        notes.append("There is no eval loss after step 0, so overfitting cannot be seen.")
    return tuple(notes)
