"""The chat box in a real browser: words go in, the answer grows, Stop reaches a busy model."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from browser_notebooks import CHAT, MESSAGES
from browser_pages import NotebookPage

Open = Callable[..., NotebookPage]


def _messages(page: NotebookPage) -> list[str]:
    page.run(1)
    return list(ast.literal_eval(page.output(1).inner_text().split("said", 1)[1].strip()))


def _say(page: NotebookPage, words: str) -> None:
    page.output(0).locator("textarea").fill(words)
    page.output(0).locator("textarea").blur()
    _button(page, "Send").click()


def _button(page: NotebookPage, name: str) -> Any:
    return page.output(0).get_by_role("button", name=name, exact=True)


def _conversation(page: NotebookPage) -> str:
    return str(page.output(0).locator(page.selectors.words).first.inner_text())


def test_a_conversation_by_mouse_and_keyboard(open_notebook: Open) -> None:
    page = open_notebook("chat", [CHAT, MESSAGES])
    page.run(0)
    page.wait_for(lambda: "Be brief." in _conversation(page))
    assert _button(page, "Stop").is_disabled()
    _say(page, "Hello <b>there</b>")
    page.wait_for(lambda: "You said Hello <b>there</b>." in _conversation(page))
    page.wait_for(lambda: _button(page, "Send").is_enabled())
    page.screenshot("chat")
    assert page.output(0).locator("textarea").input_value() == ""
    assert _messages(page) == ["Be brief.", "Hello <b>there</b>", "You said Hello <b>there</b>."]
    _button(page, "Begin anew").click()
    page.wait_for(lambda: "Hello" not in _conversation(page))
    assert _messages(page) == ["Be brief."]


def test_stop_reaches_a_model_that_is_writing(open_notebook: Open) -> None:
    page = open_notebook("chat_stop", [CHAT, MESSAGES])
    page.run(0)
    _say(page, "long")
    page.wait_for(lambda: "on on on" in _conversation(page))
    assert _button(page, "Send").is_disabled()
    _button(page, "Stop").click()
    page.wait_for(lambda: _button(page, "Send").is_enabled())
    said = _messages(page)
    assert said[1] == "long" and 3 <= len(said[2].split()) < 600


def test_nothing_of_the_chat_is_wider_than_the_page(open_notebook: Open) -> None:
    page = open_notebook("chat_layout", [CHAT, MESSAGES])
    page.run(0)
    _say(page, "word " * 100 + "w" * 300)
    page.wait_for(lambda: "www." in _conversation(page))
    page.wait_for(lambda: _button(page, "Send").is_enabled())
    page.screenshot("chat-long")
    boxes = [_button(page, name).bounding_box() for name in ("Send", "Stop", "Begin anew")]
    for left, right in zip(boxes, boxes[1:], strict=False):
        assert left["x"] + left["width"] <= right["x"] + 1 or left["y"] != right["y"]
    assert page.cut_off(0) == []
