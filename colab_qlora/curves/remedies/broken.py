"""What to change in a run whose numbers broke: candidates, the first one first."""

from __future__ import annotations

from dataclasses import replace

from colab_qlora.curves.picture.marks import amount_words, steps_words
from colab_qlora.curves.picture.series import loss_text
from colab_qlora.curves.remedies.changes import (
    Candidates,
    Change,
    change_rate,
    keep,
    raise_rows_per_step,
    raise_warmup,
    rate_text,
)
from colab_qlora.curves.remedies.length_changes import shorten_to_best
from colab_qlora.curves.remedies.row_changes import eval_for, look_at_data
from colab_qlora.curves.remedies.run_facts import RunFacts
from colab_qlora.curves.verdicts import Diagnosis, Verdict

__all__ = [
    "collapsed",
    "non_finite",
    "scale_mismatch",
    "skipped",
    "spikes",
    "unstable",
    "worse_than_base",
]

# of logged losses and of round settings: ratios this close are the same number
_SAME_RATIO = 0.15


def non_finite(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """A range that does not overflow, a lower rate, or the rows, by when it broke."""
    at = "" if verdict.step is None else f" past step {verdict.step:,}"
    expect = f"every loss and every gradient norm is finite{at}"
    rows = look_at_data(
        "look for rows without a label or with broken text (audit_lengths)",
        "a row without labels makes its loss nan at any learning rate",
        expect,
    )
    half = 0.1 if (facts.rate_ratio or 0) >= 5 else 0.5
    rate = change_rate(facts, half, "numbers that overflow mostly follow steps too large", expect)
    precision = None
    if facts.compute_dtype == "float16" and facts.has_native_bf16:
        precision = Change(
            "compute_dtype",
            "float16",
            "bfloat16",
            "load the model with dtype='bfloat16', which this machine computes in",
            "float16 ends at 65,504 and bfloat16 has the range of float32",
            expect,
            {"bf16": True, "fp16": False},
        )
    # before the rate has risen the steps cannot have been too large
    is_early = verdict.step is not None and verdict.step <= (facts.warmup_steps or 1)
    order = [rows, rate] if is_early else [rate, rows]
    return [precision, *order, raise_warmup(facts, expect)]


def collapsed(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """A loss near 0 cannot be judged without an eval loss."""
    labels = look_at_data(
        "look at the labels of three rows (show_tokens)",
        "a loss near 0 comes from labels that the prompt gives away, or from too few of them",
        "the train loss stays well above 0.02",
    )
    first = None if facts.has_eval else eval_for(facts, "rows learnt by heart from a faulty task")
    shorter = None
    if (facts.passes or 0) > 1:
        why = f"each row was seen about {amount_words(facts.passes or 0, 'time')}"
        shorter = shorten_to_best(facts, diagnosis.best_step, why, "the train loss ends above 0.02")
    return [first, labels, shorter]


def scale_mismatch(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """A check of gradient_accumulation_steps where the ratio is close to it, else the labels."""
    ratio, accumulation = verdict.numbers.get("train_over_eval"), facts.accumulation
    masks = look_at_data(
        "compare the labels of a train and an eval row (show_tokens), and packing on both sides",
        "different labels give losses that cannot be compared",
        "train and eval loss start within 10 % of each other",
    )
    is_sum = (
        ratio is not None
        and accumulation is not None
        and accumulation > 1
        and abs(ratio / accumulation - 1) <= _SAME_RATIO
    )
    if not is_sum:
        return [masks]
    check = Change(
        "gradient_accumulation_steps",
        accumulation,
        1,
        f"train 10 steps with gradient_accumulation_steps=1 (now {accumulation}) as a check",
        f"the ratio of {ratio:.1f} is close to gradient_accumulation_steps={accumulation}, so the "
        "logged loss seems to be a sum over the small batches of a step",
        f"the ratio falls from {ratio:.1f} to about 1; then read the eval loss, and divide the "
        f"train loss by {accumulation}",
        {"gradient_accumulation_steps": 1, "max_steps": 10},
    )
    return [check, masks]


def worse_than_base(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """A tenth of the rate, unless it is low already: then the template."""
    base = diagnosis.base_eval_loss
    below = "its value before training" if base is None else f"{loss_text(base)}, where it began"
    expect = f"the eval loss falls below {below}, and stays there"
    template = look_at_data(
        "compare the template and tokenizer of these rows with those of the model (show_tokens)",
        "a format that the model does not know costs what it had learnt",
        expect,
    )
    why = "training has cost the model more than the rows have taught it"
    if facts.rate_ratio is not None and facts.rate_ratio <= 1:
        now, usual = rate_text(facts.learning_rate or 0), rate_text(facts.usual_rate)
        words = f"{why}, even at {now} (usual: {usual})"
        template = replace(template, why=f"{words}: {template.why}")
        rate = change_rate(facts, 0.1 if facts.rate_ratio > 0.5 else 0.5, words, expect)
        return [template, rate, raise_warmup(facts, expect)]
    rate = change_rate(facts, 0.1, f"{why}, as a rate about ten times too high does", expect)
    return [rate, template, raise_warmup(facts, expect)]


def unstable(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """Half the rate first, then a longer warm-up, then more rows a step."""
    where = "" if verdict.step is None else f" near step {verdict.step:,}"
    expect = f"the smoothed train loss falls without the rise{where}"
    if diagnosis.best_eval_loss is not None:
        expect += f", and the eval loss ends below {loss_text(diagnosis.best_eval_loss)}"
    ratio = facts.rate_ratio or 1.0
    why = "steps that are too large throw the loss up instead of down"
    if ratio >= 10:
        usual = rate_text(facts.usual_rate)
        why += f", and the rate is {ratio:.0f} times the usual {usual}"
    rows = look_at_data(
        f"look at the rows trained on{where or ' where the loss rises'}",
        "rows of another kind, or far longer ones, raise the loss at any rate",
        expect,
    )
    rate = change_rate(facts, 0.1 if ratio >= 10 else 0.5, why, expect)
    return [rate, raise_warmup(facts, expect), raise_rows_per_step(facts, expect), rows]


def spikes(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """The rows of those steps."""
    steps = verdict.steps or (() if verdict.step is None else (verdict.step,))
    words = ", ".join(f"{step:,}" for step in steps[:5]) + (", ..." if len(steps) > 5 else "")
    expect = "without those rows the spikes are gone, and the rest of the curve stays"
    rows = look_at_data(
        f"look at the rows of step{'s' if len(steps) > 1 else ''} {words}"
        if words
        else "look at the rows of the steps with a spike",
        "a single high loss comes from its rows: another language, cut off, or broken text",
        expect,
    )
    return [rows, raise_rows_per_step(facts, "the spikes get lower")]


def skipped(facts: RunFacts, verdict: Verdict, diagnosis: Diagnosis) -> Candidates:
    """Nothing where a loss scaler has found its scale; where there is none, a look at the rows."""
    if verdict.said or facts.compute_dtype not in (None, "float16"):
        where = f"of {steps_words(verdict.steps, 5)}" if verdict.steps else "of those steps"
        why = "a gradient that is nan or inf comes from its rows, or from steps that are too large"
        return [look_at_data(f"look at the rows {where}", why, "every gradient norm is finite")]
    why = "float16 training skips a step whose gradients overflow, and scales the next ones lower"
    return [keep("change nothing", why, "a few steps at the start are skipped again, then none")]
