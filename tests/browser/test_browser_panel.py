"""The hyperparameter panel in a real browser: what is set is in the dictionary at once."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from browser_notebooks import PANEL, SETTINGS
from browser_pages import NotebookPage

Open = Callable[..., NotebookPage]


def _settings(page: NotebookPage) -> dict[str, Any]:
    page.run(1)
    return dict(ast.literal_eval(page.output(1).inner_text().split("settings", 1)[1].strip()))


def test_the_panel_writes_the_dictionary_and_shows_the_plan(open_notebook: Open) -> None:
    page = open_notebook("panel", [PANEL, SETTINGS])
    page.run(0)
    page.control(0, "batch_size").wait_for()
    page.wait_for(lambda: "8 rows a step of 1024 tokens" in page.words(0))
    page.screenshot("panel")
    before = _settings(page)
    page.handle(0, "batch_size").fill("16")
    page.handle(0, "batch_size").press("Enter")
    page.wait_for(lambda: "32 rows a step of 1024 tokens" in page.words(0))
    page.handle(0, "max_seq_length").focus()
    page.page.keyboard.press("ArrowRight")
    page.wait_for(lambda: "32 rows a step of 2048 tokens" in page.words(0))
    page.handle(0, "learning_rate").focus()
    page.page.keyboard.press("ArrowRight")
    page.wait_for(lambda: "learning_rate=0.0002," not in page.words(0))
    after = _settings(page)
    assert before["batch_size"] == 4
    assert {**after, "learning_rate": None} == {
        **before,
        "batch_size": 16,
        "max_seq_length": 2048,
        "learning_rate": None,
    }
    # the next tenth of a decade
    assert 2e-4 < after["learning_rate"] < 4e-4


def test_nothing_of_the_panel_overlaps_or_is_cut(open_notebook: Open) -> None:
    page = open_notebook("panel_layout", [PANEL, SETTINGS])
    page.run(0)
    page.control(0, "show which way to move them").locator("input").check()
    page.output(0).get_by_text("start with 16").wait_for()
    page.screenshot("panel-hints")
    assert page.boxes_to_compare(0) >= 18
    assert page.overlaps(0) == []
    assert page.cut_off(0) == []
