"""What to change where train and eval loss part, or stay too close: candidates in order."""

from __future__ import annotations

from colab_qlora.curves.picture.marks import amount_words
from colab_qlora.curves.picture.series import loss_text
from colab_qlora.curves.remedies.adapter_changes import lower_r, raise_dropout
from colab_qlora.curves.remedies.changes import Candidates, change_rate, keep
from colab_qlora.curves.remedies.length_changes import shorten_to_best
from colab_qlora.curves.remedies.row_changes import FEW_ROWS, eval_for, look_at_data, more_rows
from colab_qlora.curves.remedies.run_facts import RunFacts
from colab_qlora.curves.verdicts import Diagnosis, Verdict

__all__ = ["eval_below_train", "eval_rising", "leakage", "memorising", "overfitting"]


def overfitting(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """Fewer passes over the rows first; within one epoch a lower rate."""
    best, loss = diagnosis.best_step, diagnosis.best_eval_loss
    if best is None or loss is None:
        return memorising(facts, verdict, diagnosis)
    turn = diagnosis.divergence_step or best
    ends = f"the eval loss no longer rises after step {turn:,}, and ends near {loss_text(loss)}"
    later = f"the eval loss turns later than step {turn:,}, at {loss_text(loss)} or lower"
    shorter = shorten_to_best(facts, best, _later(facts, best), ends)
    rate = change_rate(
        facts,
        0.5,
        "smaller steps learn single rows by heart more slowly",
        f"{later}, or not at all",
    )
    # of one epoch there is none to leave out, and no row was seen twice
    is_repeated = facts.passes is None or facts.passes > 1
    others = [raise_dropout(facts, later), more_rows(facts, later)]
    if facts.train_rows is not None and facts.train_rows < FEW_ROWS:
        others.reverse()
    others.insert(0, lower_r(facts, later))
    return [shorter, *others, rate] if is_repeated else [rate, shorter, *others]


def eval_rising(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """A lower rate first: the train loss shows no learning by heart."""
    best, loss = diagnosis.best_step, diagnosis.best_eval_loss
    turn = diagnosis.divergence_step or best
    expect = "the eval loss no longer rises"
    if turn is not None and loss is not None:
        expect += f" after step {turn:,}, and ends at {loss_text(loss)} or lower"
    # the train loss does not fall meanwhile, so nothing is learnt by heart: the steps are too large
    why = "the train loss does not fall while the eval loss rises, which is no learning by heart"
    same = look_at_data(
        "compare the template and the kind of the eval rows with those of the train rows",
        "an eval set of another kind gets worse while the model learns the train rows",
        expect,
    )
    shorter = None
    if best is not None and loss is not None:
        shorter = shorten_to_best(facts, best, _later(facts, best), expect)
    return [change_rate(facts, 0.5, why, expect), shorter, same]


def leakage(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """Nothing can be read from an eval loss of rows that were trained on."""
    loss = diagnosis.best_eval_loss
    higher = "" if loss is None else f" and ends above {loss_text(loss)}"
    dedupe = look_at_data(
        "find the eval rows that are also trained on (find_overlap), and split with split_rows",
        "repeated rows pull the train loss below the eval loss, unless both are the same",
        f"the eval loss leaves the train loss once epochs repeat{higher}: the honest number",
    )
    fine = keep(
        "keep the settings if no row is on both sides",
        "short answers of a fixed form can be as easy to predict in new rows",
        "the same curve again",
    )
    return [dedupe, fine]


def memorising(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """An eval loss first; with one, an end where it is lowest."""
    best, loss = diagnosis.best_step, diagnosis.best_eval_loss
    seen = "" if facts.passes is None else f" in {amount_words(facts.passes, 'epoch')}"
    expect = "the train loss has one step down fewer at the borders of epochs"
    if best is not None and loss is not None:
        expect = f"the eval loss ends at its lowest, near {loss_text(loss)}"
    why = f"the train loss falls where rows are seen again{seen}"
    shorter = shorten_to_best(facts, best, why, expect)
    if best is not None and best >= facts.last_step:
        shorter = keep(
            "keep the number of epochs, and add none",
            f"the eval loss was still falling at the last step ({best:,})",
            expect,
        )
    first = None if facts.has_eval else eval_for(facts, "rows learnt by heart from a rule learnt")
    rate = change_rate(facts, 0.5, "a lower rate learns single rows more slowly", expect)
    return [first, shorter, more_rows(facts, expect), lower_r(facts, expect), rate]


def eval_below_train(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """The harmless reasons first, dropout above all."""
    overlap = look_at_data(
        "look for eval rows that are also trained on (find_overlap), and for shorter eval answers",
        "new rows are seldom easier than those trained on",
        "without shared rows the eval loss ends at or above the train loss",
    )
    if facts.dropout:
        why = f"lora_dropout={facts.dropout:g} is on while training and off in an evaluation"
        return [keep("change nothing", why, "the gap stays about the same size"), overlap]
    return [overlap]


def _later(facts: RunFacts, step: int) -> str:
    per_epoch, epochs = facts.steps_per_epoch, facts.passes
    if per_epoch is None or epochs is None:
        return f"what came after step {step:,} helped with these rows alone"
    of = amount_words(epochs, "epoch")
    return f"the eval loss was lowest after {step / per_epoch:.2g} of {of}"
