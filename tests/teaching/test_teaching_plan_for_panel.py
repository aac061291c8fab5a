"""What the hyperparameter panel says: memory as planned, steps and times by plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from colab_qlora.curves.hyperparameter_panel import PANEL_SETTINGS
from colab_qlora.errors import UserError
from colab_qlora.models.memory_planning import plan_memory
from colab_qlora.teaching.plan_for_panel import panel_hints, plan_for_panel

SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_seq_length": 1024,
    "num_train_epochs": 3,
    "max_steps": -1,
    "r": 8,
}


def test_memory_and_seconds_are_those_of_the_planner() -> None:
    found = plan_for_panel("llama-3-8b", "T4", rows=1001)(SETTINGS)
    planned = plan_memory("llama-3-8b", 4, 1024, "T4", r=8)
    assert found.fits
    assert found.step_seconds == 2 * planned.step_seconds
    # 251 micro-batches are 126 steps an epoch
    assert found.steps == 3 * 126
    minutes = 378 * 2 * planned.step_seconds / 60
    assert found.sentence().startswith(f"It fits: {planned.peak_memory_gib:.2f} of ")
    assert "2 micro-batches of 4 x 1,024 tokens" in found.sentence()
    assert f"378 steps of full rows take about {minutes:.0f} min" in found.sentence()


def test_max_steps_counts_where_it_is_given() -> None:
    plan = plan_for_panel("embedded", "T4")
    assert plan({**SETTINGS, "max_steps": 60}).steps == 60
    unknown = plan(SETTINGS)
    assert unknown.steps is None
    assert "full rows" not in unknown.sentence()
    assert "60 steps of full rows take about" in plan({**SETTINGS, "max_steps": 60}).sentence()


def test_a_misfit_says_what_to_change_in_the_panels_words() -> None:
    found = plan_for_panel("llama-3-8b", "T4")({**SETTINGS, "batch_size": 64})
    assert not found.fits
    assert "does not fit" in found.sentence()
    assert "set batch_size=" in found.sentence()
    assert "per_device" not in found.sentence()


def test_settings_that_are_missing_have_the_usual_values() -> None:
    found = plan_for_panel("embedded", "T4")({})
    assert (found.memory.workload.batch_size, found.memory.workload.seq_length) == (2, 2048)
    assert (found.memory.workload.rank, found.accumulation, found.steps) == (16, 1, None)


def test_mistakes_are_said_in_one_line() -> None:
    with pytest.raises(UserError, match="rows is no number of rows: got 0"):
        plan_for_panel("embedded", "T4", rows=0)
    with pytest.raises(UserError, match="batch_size is not a size"):
        plan_for_panel("embedded", "T4")({**SETTINGS, "batch_size": 0})


def test_every_setting_but_the_number_of_steps_has_a_hint() -> None:
    assert set(panel_hints()) == set(PANEL_SETTINGS) - {"max_steps"}
    for name, hint in panel_hints().items():
        assert "start with" in hint, name
        assert "; raise it when " in hint and "; lower it when " in hint, name
