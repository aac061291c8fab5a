"""The live plot in a real browser: one picture that changes in place while the cell runs."""

from __future__ import annotations

import json
from collections.abc import Callable

from browser_notebooks import LIVE
from browser_pages import NotebookPage

Open = Callable[..., NotebookPage]


def test_the_live_plot_changes_in_place_while_the_cell_runs(open_notebook: Open) -> None:
    page = open_notebook("live_plot", [LIVE])
    page.watch_pictures(0)
    page.start(0)
    page.wait_for(lambda: len(page.picture_states()) >= 12, 60_000)
    # several pictures have been there, and the cell is not at its end
    assert page.is_running(0)
    page.screenshot("live-running")
    assert page.overlaps(0) == []
    page.wait_until_run(0)
    states = page.picture_states()
    assert len({state["source"] for state in states}) >= 20
    # of all frames that were shown, none had two pictures, or none, or moved what is below
    places = {(state["count"], state["top"], state["height"]) for state in states}
    assert [count for count, _, _ in places] == [1], places
    page.screenshot("live-finished")
    assert page.overlaps(0) == []
    assert page.cut_off(0) == []
    words = page.words(0)
    assert "step 56 of 56" in words
    assert "overfitting" in words


def test_the_saved_notebook_has_the_last_picture_and_the_words(open_notebook: Open) -> None:
    page = open_notebook("live_saved", [LIVE])
    page.run(0)
    outputs = page.saved_outputs(0)
    kinds = [sorted(output.get("data", {})) for output in outputs]
    assert kinds == [["image/png", "text/plain"], ["text/html", "text/plain"]], kinds
    assert "overfitting" in json.dumps(outputs[1])
