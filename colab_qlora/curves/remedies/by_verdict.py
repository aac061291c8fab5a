"""Which changes answer which verdict; the rules are in `broken.py`, `fit.py` and `pace.py`.

A rule takes the facts of the run, the verdict and the whole diagnosis and gives the changes that
fit, the first one first. Where a verdict cannot be judged without an eval loss and the run has
none, adding one comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from colab_qlora.curves.remedies import broken, fit, pace
from colab_qlora.curves.remedies.changes import Candidates, Change
from colab_qlora.curves.remedies.run_facts import RunFacts
from colab_qlora.curves.verdicts import Diagnosis, Verdict

__all__ = ["REMEDIES", "remedies_for"]


def remedies_for(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> list[Change]:
    """Gives the changes to try for a verdict, the first one first; there is at least one."""
    return [change for change in REMEDIES[verdict.name](facts, verdict, diagnosis) if change]


def _healthy(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    # it says little on its own; what comes with it says what to do, rows learnt by heart above all
    for name in ("memorising", "still improving", "plateau"):
        if (other := diagnosis.get(name)) is not None:
            return REMEDIES[name](facts, other, diagnosis)
    return pace.plateau(facts, verdict, diagnosis)


REMEDIES: Mapping[str, Callable[[RunFacts, Verdict, Diagnosis], Candidates]] = {
    "non-finite": broken.non_finite,
    "collapsed": broken.collapsed,
    "scale mismatch": broken.scale_mismatch,
    "worse than base": broken.worse_than_base,
    "unstable": broken.unstable,
    "overfitting": fit.overfitting,
    "eval rising": fit.eval_rising,
    "suspected leakage": fit.leakage,
    "memorising": fit.memorising,
    "eval below train": fit.eval_below_train,
    "not learning": pace.not_learning,
    "slow": pace.slow,
    "healthy": _healthy,
    "still improving": pace.still_improving,
    "plateau": pace.plateau,
    "spikes": broken.spikes,
    "skipped steps": broken.skipped,
    "not enough evidence": pace.not_enough,
}
