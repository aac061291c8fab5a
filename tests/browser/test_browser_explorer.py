"""The curve explorer in a real browser: its controls by keyboard and mouse, and its boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from browser_notebooks import EXPLORER, STATE
from browser_pages import NotebookPage

Open = Callable[..., NotebookPage]


def _explorer(open_notebook: Open, name: str) -> NotebookPage:
    page = open_notebook(name, [EXPLORER, STATE])
    page.run(0)
    page.image(0).wait_for()
    page.control(0, "smoothing").wait_for()
    return page


def test_a_slider_moves_by_keyboard_and_redraws_in_place(open_notebook: Open) -> None:
    page = _explorer(open_notebook, "explorer_keyboard")
    page.watch_pictures(0)
    page.handle(0, "smoothing").focus()
    page.changes_picture(0, lambda: page.page.keyboard.press("ArrowRight"))
    places = {(s["count"], s["top"], s["height"]) for s in page.picture_states()}
    assert [count for count, _, _ in places] == [1], places
    kinds = [sorted(output["data"]) for output in page.saved_outputs(0)]
    # beside the controls, which need a kernel, the file has the picture and the words
    assert kinds[1:] == [["image/png", "text/plain"], ["text/html", "text/plain"]]
    page.run(1)
    said = page.output(1).inner_text()
    smooth = float(said.split("smooth=")[1].split(",")[0])
    assert smooth > 0.05, said


def test_every_control_is_reached_by_tab(open_notebook: Open) -> None:
    page = _explorer(open_notebook, "explorer_tab")
    page.control(0, "change the thresholds").locator("input").check()
    page.control(0, "healthy").locator("input").focus()
    reached = []
    for _ in range(40):
        reached.append(
            page.page.evaluate(
                """() => document.activeElement.closest(
                     '.widget-inline-hbox, .widget-checkbox')?.innerText?.trim() ?? ''"""
            ).split("\n")[0]
        )
        page.page.keyboard.press("Tab")
    wanted = (
        "healthy",
        "overfitting",
        "learning rate too high",
        "smoothing",
        "loss range",
        "stopped at step",
        "show the learning rate",
        "dark background",
        "change the thresholds",
        "overfitting from",
        "unstable from",
        "spike from",
    )
    assert [name for name in wanted if name not in reached] == [], reached


def test_stopping_earlier_shows_what_one_would_have_read_then(open_notebook: Open) -> None:
    page = _explorer(open_notebook, "explorer_stop")
    assert "overfitting" in page.words(0)
    assert "If you had stopped" not in page.words(0)
    page.handle(0, "stopped at step").focus()
    page.changes_picture(0, lambda: page.page.keyboard.press("Home"))
    page.changes_picture(0, lambda: page.page.keyboard.press("PageUp"))
    page.wait_for(lambda: "If you had stopped at step" in page.words(0))
    assert "one would have read" in page.words(0)
    page.screenshot("explorer-stopped")


def test_runs_and_background_are_chosen_by_mouse(open_notebook: Open) -> None:
    page = _explorer(open_notebook, "explorer_runs")
    before = page.words(0)

    def tick(name: str) -> Callable[[], Any]:
        return lambda: page.control(0, name).locator("input").click()

    page.changes_picture(0, tick("healthy"))
    page.wait_for(lambda: page.words(0) != before)
    assert "healthy" in page.words(0)
    page.changes_picture(0, tick("dark background"))
    page.changes_picture(0, tick("show the learning rate"))
    page.screenshot("explorer-two-runs-dark")
    assert page.overlaps(0) == []
    source = page.source(0)
    for name in ("overfitting", "healthy"):
        tick(name)()
    page.wait_for(lambda: "Choose a run" in page.words(0))
    assert page.image(0).count() == 1
    assert page.changes_picture(0, tick("learning rate too high")) != source


def test_thresholds_open_and_change_the_verdict(open_notebook: Open) -> None:
    page = _explorer(open_notebook, "explorer_thresholds")
    field = page.control(0, "overfitting from").locator("input")
    assert not field.is_visible()
    page.control(0, "change the thresholds").locator("input").focus()
    page.page.keyboard.press("Space")
    field.wait_for(state="visible")
    page.screenshot("explorer-thresholds")
    assert page.overlaps(0) == []
    assert page.cut_off(0) == []
    before = page.words(0)
    field.fill("2")
    field.press("Enter")
    page.wait_for(lambda: page.words(0) != before)
    assert "overfitting since" not in page.words(0)


def test_nothing_overlaps_or_is_cut_at_800_px(open_notebook: Open) -> None:
    page = _explorer(open_notebook, "explorer_layout")
    page.screenshot("explorer")
    assert page.boxes_to_compare(0) >= 9
    assert page.overlaps(0) == []
    assert page.cut_off(0) == []
