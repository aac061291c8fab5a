"""What to change in a run that learns too little, slowly or well: candidates in order."""

from __future__ import annotations

from colab_qlora.curves.picture.series import loss_text
from colab_qlora.curves.remedies.adapter_changes import raise_r
from colab_qlora.curves.remedies.changes import (
    Candidates,
    Change,
    change_rate,
    keep,
    rate_text,
    set_rate,
    sweep_rates,
)
from colab_qlora.curves.remedies.length_changes import go_on, lengthen, run_steps
from colab_qlora.curves.remedies.row_changes import eval_for, look_at_data, more_rows
from colab_qlora.curves.remedies.run_facts import RunFacts
from colab_qlora.curves.verdicts import Diagnosis, Verdict

__all__ = ["not_enough", "not_learning", "plateau", "slow", "still_improving"]

# a run needs about this many logged steps before its curve says anything
_READABLE_STEPS = 40


def not_learning(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """Frozen adapters before all; a far higher rate where it is far below the usual."""
    expect = "the smoothed loss falls by 5 % or more within 40 steps"
    if diagnosis.base_eval_loss is not None:
        target = loss_text(0.95 * diagnosis.base_eval_loss)
        expect = f"the eval loss falls from {loss_text(diagnosis.base_eval_loss)} below {target}"
    norm = verdict.numbers.get("grad_norm")
    is_frozen = norm == 0 or "every gradient norm is 0" in verdict.because
    adapters = Change(
        "adapters",
        None,
        None,
        "see that adapters are trained (model.print_trainable_parameters()), and attach them again",
        "without a gradient no weight can move"
        if is_frozen
        else "a model without trainable adapters stays as it is at any rate",
        f"the gradient norm is above 0, and {expect}" if is_frozen else expect,
    )
    if is_frozen:
        return [adapters]
    known = look_at_data(
        "ask the untrained model three of the questions, and look at their labels (show_tokens)",
        "a model that knows the rows already has little to learn from them",
        expect,
    )
    ratio, usual = facts.rate_ratio, facts.usual_rate
    if ratio is None:
        rate = change_rate(facts, 10, "a rate far too low leaves the model where it was", expect)
    else:
        times = "" if f"{ratio:.2g}" == "1" else f"{ratio:.2g} times "
        why = f"{rate_text(facts.learning_rate or 0)} is {times}the usual {rate_text(usual)}"
        # up to the usual rate at once, and beyond it in small steps
        higher = max(usual, 3 * usual * ratio)
        rate = set_rate(facts, higher, why, expect)
    if ratio is not None and ratio <= 0.1:
        return [rate, adapters, known]
    first = None if facts.has_eval else eval_for(facts, "a model that knows the rows from no move")
    return [first, adapters, rate, known]


def slow(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """Three times the rate, unless it is high already: then a longer run."""
    expect = "more than half of the fall comes in the first third of the run"
    if diagnosis.best_eval_loss is not None:
        expect += f", and the eval loss ends below {loss_text(diagnosis.best_eval_loss)}"
    rate = change_rate(
        facts, 3, "the loss falls evenly to the end, as a rate too low makes", expect
    )
    expect_more = _goes_on(diagnosis)
    longer = go_on(facts, "the loss is still falling", expect_more)
    longer = longer or lengthen(facts, "the loss is still falling at the end", expect_more)
    # a rate that is high already was meant to be: the length is the safer change
    return [longer, rate] if (facts.rate_ratio or 0) >= 3 else [rate, longer]


def still_improving(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """The rest of a run that was stopped; of a whole one, a longer one."""
    first = None
    if not facts.has_eval:
        first = eval_for(facts, "learning from learning by heart, and longer training needs that")
    expect, why = _goes_on(diagnosis), "the loss is still falling at the last step"
    longer = go_on(facts, "the loss is still falling, which is no fault", expect)
    longer = longer or lengthen(facts, f"{why}, which is no fault", expect)
    return [first, longer, sweep_rates(facts)]


def plateau(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """Nothing, for this rate; only a comparison finds a better one."""
    if not facts.has_eval:
        return [eval_for(facts, "done from stuck"), sweep_rates(facts)]
    loss = diagnosis.best_eval_loss or 0.0
    lower = f"the eval loss ends below {loss_text(loss)}"
    why = "nothing in this curve asks for a change"
    if verdict.name == "plateau":
        why = f"the eval loss has come to {loss_text(loss)}{_from_base(diagnosis)}, and stays there"
    again = f"the same settings end near {loss_text(loss)} again"
    stay = keep("keep these settings and this adapter", why, again)
    if facts.is_finished is False:
        stay = keep("let the run go on", why, f"the eval loss ends near {loss_text(loss)} or below")
    return [stay, sweep_rates(facts), more_rows(facts, lower), raise_r(facts, lower)]


def not_enough(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """A longer run, or a log of every step."""
    expect = (
        "the log has 20 or more losses, or 3 or more evaluations, which is enough for a verdict"
    )
    few = "1 step is" if facts.last_step == 1 else f"{facts.last_step:,} steps are"
    short = run_steps(facts, _READABLE_STEPS, f"{few} too few to read", expect)
    often = Change(
        "logging_steps",
        None,
        1,
        "set logging_steps=1",
        f"{facts.last_step:,} steps were trained and few of them logged",
        expect,
        {"logging_steps": 1},
    )
    first = None if facts.has_eval else eval_for(facts, "learning from learning by heart")
    # while training goes on there is nothing to change
    planned = facts.planned_steps
    if facts.is_running and (planned is None or planned >= _READABLE_STEPS):
        at = f"step {facts.last_step:,}" + ("" if planned is None else f" of {planned:,}")
        return [keep("let the run go on", f"it is at {at}", expect), first]
    if facts.was_stopped and planned is not None and planned >= _READABLE_STEPS:
        return [go_on(facts, "so few steps say little", expect), first]
    return [short if facts.last_step < _READABLE_STEPS else often, first]


def _goes_on(diagnosis: Diagnosis) -> str:
    if diagnosis.best_eval_loss is None:
        return f"the smoothed train loss falls further after step {diagnosis.last_step:,}"
    loss = loss_text(diagnosis.best_eval_loss)
    return f"the eval loss goes below {loss} after step {diagnosis.last_step:,}, and levels off"


def _from_base(diagnosis: Diagnosis) -> str:
    base = diagnosis.base_eval_loss
    return "" if base is None else f" from {loss_text(base)} before training"
