"""Rows and readings shared by the tests of the trainer."""

from __future__ import annotations

from typing import Any

ROWS = [
    {"prompt": f"Question {i}: what comes after {i}?\n", "completion": f"{i + 1} comes after {i}."}
    for i in range(24)
]


def losses_of(trainer: Any) -> list[float]:
    """The training losses of a finished run, step by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
