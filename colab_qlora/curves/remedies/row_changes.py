"""Changes of the rows: more of them, other ones, or some held out for an evaluation."""

from __future__ import annotations

from colab_qlora.curves.picture.marks import count_words
from colab_qlora.curves.remedies.changes import Change
from colab_qlora.curves.remedies.run_facts import (
    EVAL_SHARE,
    LEAST_EVAL_ROWS,
    MOST_EVAL_ROWS,
    RunFacts,
)

__all__ = ["FEW_ROWS", "add_eval", "eval_for", "look_at_data", "more_rows"]

# below, more rows help more than any setting
FEW_ROWS = 500


def add_eval(facts: RunFacts, why: str, expect: str) -> Change:
    """Adds an evaluation on rows that are held out, before the first step and ten times after."""
    every = max(1, facts.steps // 10)
    rows = facts.train_rows
    held_out = "5 % of the rows (64 to 500)"
    if rows is not None:
        usual = min(MOST_EVAL_ROWS, max(LEAST_EVAL_ROWS, round(EVAL_SHARE * rows)))
        # of a tiny data set no more than a fifth can be spared
        held_out = f"{max(1, min(usual, rows // 5))} of the {count_words(rows, 'row')}"
    do = (
        f"hold out {held_out} with split_rows, pass them as eval_dataset, and evaluate before the "
        f"first step and every {'step' if every == 1 else f'{every} steps'}"
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
    why = f"{rows:,} rows teach little beyond themselves"
    return look_at_data(do, "1 row teaches little beyond itself" if rows == 1 else why, expect)


def look_at_data(do: str, why: str, expect: str) -> Change:
    """Changes the rows, not a number."""
    return Change("data", None, None, do, why, expect)
