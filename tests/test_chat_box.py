"""The chat: what is said, what is kept, what a click does, and what is shown."""

from __future__ import annotations

import threading
from typing import Any

import pytest

pytest.importorskip("ipywidgets")

from colab_qlora import UserError  # noqa: E402
from colab_qlora import chat_box as module
from colab_qlora.chat_box import chat_box, conversation_bundle  # noqa: E402


class Tokenizer:
    chat_template = "{{ messages }}"


@pytest.fixture
def heard(monkeypatch) -> list[list[dict[str, str]]]:
    """What the model is asked; it answers with the number of messages, in three pieces."""
    calls: list[list[dict[str, str]]] = []

    def stream(model: Any, tokenizer: Any, messages: Any, *, stop: threading.Event, **options: Any):
        calls.append([dict(message) for message in messages])
        if messages[-1]["content"] == "fail":
            raise RuntimeError("no memory left")
        for piece in (" I read", f" {len(messages)}", " messages. "):
            if stop.is_set():
                return
            yield piece
            if messages[-1]["content"] == "long":
                stop.wait(10)

    monkeypatch.setattr(module, "stream", stream)
    return calls


def test_a_conversation_grows(heard):
    chat = chat_box(None, Tokenizer(), system="Be kind.")
    assert chat.say("Hello") == "I read 2 messages."
    assert chat.say(" And now? ") == "I read 4 messages."
    assert [message["role"] for message in heard[1]] == ["system", "user", "assistant", "user"]
    assert heard[1][2]["content"] == "I read 2 messages." and heard[1][3]["content"] == "And now?"
    chat.clear()
    chat.messages[0]["content"] += " Or not."
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be kind."}]


def test_a_question_without_an_answer_leaves_nothing(heard):
    chat = chat_box(None, Tokenizer())
    with pytest.raises(RuntimeError, match="no memory left"):
        chat.say("fail")
    with pytest.raises(UserError, match="nothing to answer"):
        chat.say("  ")
    assert chat.messages == []


def test_clicks_do_the_same(heard):
    chat = chat_box(None, Tokenizer())
    controls = chat.controls
    controls["words"].value = "Hello"
    controls["send"].click()
    chat.wait()
    assert [m["content"] for m in chat.messages] == ["Hello", "I read 1 messages."]
    assert controls["words"].value == ""
    assert [controls[n].disabled for n in ("send", "stop", "clear")] == [False, True, False]
    controls["clear"].click()
    assert chat.messages == []
    controls["send"].click()  # without words
    chat.wait()
    assert chat.messages == [] and len(heard) == 1


def test_stop_keeps_what_was_written(heard):
    chat = chat_box(None, Tokenizer())
    chat.controls["words"].value = "long"
    chat.controls["send"].click()
    for _ in range(200):
        if chat.messages and chat.messages[-1]["content"]:
            break
        threading.Event().wait(0.01)
    assert [chat.controls[n].disabled for n in ("send", "stop", "clear")] == [True, False, True]
    for act in (chat.clear, lambda: chat.say("me too")):
        with pytest.raises(UserError, match="still writing"):
            act()
    chat.controls["stop"].click()
    chat.wait()
    assert chat.messages[-1]["content"] == "I read"


def test_a_click_that_fails_gives_the_words_back_and_says_why(heard, monkeypatch):
    chat = chat_box(None, Tokenizer())
    shown: list[Any] = []
    monkeypatch.setattr(chat._shown, "update", shown.append)
    chat.controls["words"].value = "fail"
    chat.controls["send"].click()
    chat.wait()
    assert chat.controls["words"].value == "fail" and chat.messages == []
    assert shown[-1]["text/plain"] == "No answer: no memory left"


def test_what_is_shown_is_text_and_no_markup():
    messages = [{"role": "user", "content": "<b>&"}, {"role": "assistant", "content": "a\nb"}]
    bundle = conversation_bundle(messages)
    assert "&lt;b&gt;&amp;" in bundle["text/html"] and "<b>&" not in bundle["text/html"]
    assert bundle["text/plain"] == "You: <b>&\nModel: a\nb"
    assert conversation_bundle([])["text/plain"] == "No words yet."


def test_a_tokenizer_without_a_template_is_refused():
    class Plain:
        chat_template = None

    with pytest.raises(UserError, match="has no chat template"):
        chat_box(None, Plain())
