"""A small chat in the notebook: a field, three buttons, and the answer as it is written.

The conversation is an ordinary output that is replaced in place, so that it stays in the saved
notebook. Answers are computed in a thread of their own: a click on Stop could not reach a kernel
that is busy. Without a notebook, `say` gives the same answers.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from colab_qlora.curves.controls.widget_parts import DisplaySlot, row, tooltip
from colab_qlora.curves.live_display import has_kernel
from colab_qlora.errors import UserError
from colab_qlora.generation import stream

__all__ = ["ChatBox", "chat_box"]

# a browser shows no more, and every update travels through the kernel's channel
_SECONDS_BETWEEN_UPDATES = 0.1
_NAMES = {"system": "System", "user": "You", "assistant": "Model"}
_COLOURS = {"system": "#6b7280", "user": "#1f5fa8", "assistant": "#8f3a1d"}


def chat_box(
    model: Any,
    tokenizer: Any,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    **sampling: Any,
) -> ChatBox:
    """Talk to the model; as the last line of a cell it shows its controls.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer, with a chat template.
        system: what the model is told before the conversation.
        max_new_tokens: longest answer, in tokens.
        **sampling: temperature, top_p, ... of transformers' generate; greedy without a temperature.

    Returns:
        The chat. `.say("...")` answers without a notebook, `.messages` is the conversation.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template",
            got=type(tokenizer).__name__,
            do="Give it one: get_chat_template(tokenizer, ...)",
        )
    return ChatBox(model, tokenizer, system, {"max_new_tokens": max_new_tokens, **sampling})


class ChatBox:
    """A conversation with a model; made by `chat_box`.

    Attributes:
        messages: [{"role": ..., "content": ...}, ...], as a chat template takes them.
    """

    def __init__(
        self, model: Any, tokenizer: Any, system: str | None, options: Mapping[str, Any]
    ) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages = [dict(message) for message in self._system]
        self._shown = DisplaySlot()
        self._widgets: dict[str, Any] | None = None
        self._stop, self._worker = threading.Event(), threading.Thread()

    def say(self, words: str) -> str:
        """Add the user's words, and return the model's answer, which is added too.

        Raises:
            UserError: no words, or an answer that a click asked for is still being written.
        """
        self._check_idle()
        self._stop.clear()
        return self._answer(words, lambda: None)

    def clear(self) -> None:
        """Begin anew, with the system's words alone.

        Raises:
            UserError: as `say`.
        """
        self._check_idle()
        self.messages = [dict(message) for message in self._system]
        self._show("")

    @property
    def controls(self) -> Mapping[str, Any]:
        """The widgets by name: "words", "send", "stop", "clear". Needs ipywidgets."""
        if self._widgets is None:
            self._widgets = _make_widgets(self._send, self._stop.set, self._clear)
        return self._widgets

    def wait(self) -> None:
        """Return once the answer that was asked for by a click is complete."""
        if self._worker.is_alive():
            self._worker.join()

    def __repr__(self) -> str:
        return f"ChatBox of {len(self.messages)} messages; see .say(words), .messages"

    def _ipython_display_(self) -> None:
        if not has_kernel():
            print(repr(self))
            return
        from IPython.display import display

        self._shown.show(conversation_bundle(self.messages))
        controls = self.controls
        display(controls["words"], row([controls[n] for n in ("send", "stop", "clear")]))

    def _answer(self, words: str, show: Callable[[], None]) -> str:
        """Nothing is left in the conversation of a question that could not be answered."""
        if not words.strip():
            raise UserError("there is nothing to answer", got=repr(words), allowed="some words")
        messages, before = self.messages, list(self.messages)
        asked = [*before, {"role": "user", "content": words.strip()}]
        answer = {"role": "assistant", "content": ""}
        messages[:] = [*asked, answer]
        try:
            pieces = stream(self._model, self._tokenizer, asked, stop=self._stop, **self._options)
            for piece in pieces:
                answer["content"] += piece
                show()
        except BaseException:
            messages[:] = before
            raise
        answer["content"] = answer["content"].strip()
        return answer["content"]

    def _check_idle(self) -> None:
        if self._worker.is_alive():
            raise UserError("the model is still writing", do="Wait for it, or press Stop first")

    def _send(self) -> None:
        words = self.controls["words"].value
        if self._worker.is_alive() or not words.strip():
            return
        self.controls["words"].value = ""
        self._stop.clear()
        self._set_busy(True)
        self._worker = threading.Thread(target=self._answer_click, args=(words,), daemon=True)
        self._worker.start()

    def _answer_click(self, words: str) -> None:
        last = 0.0

        def show() -> None:
            nonlocal last
            if time.monotonic() - last >= _SECONDS_BETWEEN_UPDATES:
                self._show("")
                last = time.monotonic()

        problem = ""
        try:
            self._answer(words, show)
        except Exception as error:  # a traceback of a thread would be seen by nobody
            problem = str(error) or type(error).__name__
            self.controls["words"].value = words
        finally:
            self._show(problem)
            self._set_busy(False)

    def _clear(self) -> None:
        if not self._worker.is_alive():
            self.clear()

    def _set_busy(self, busy: bool) -> None:
        for name in ("send", "clear"):
            self.controls[name].disabled = busy
        self.controls["stop"].disabled = not busy

    def _show(self, problem: str) -> None:
        self._shown.update(conversation_bundle(self.messages, problem))


def conversation_bundle(messages: Sequence[Mapping[str, str]], problem: str = "") -> dict[str, str]:
    """The conversation as a MIME bundle of HTML and plain text.

    Args:
        messages: of any roles.
        problem: what went wrong, below them.
    """
    blocks, plain = [], []
    for message in messages:
        role, content = message["role"], message["content"]
        name, colour = _NAMES.get(role, role), _COLOURS.get(role, "#374151")
        plain.append(f"{name}: {content}")
        blocks.append(
            '<div style="margin: 0.5em 0; padding-left: 0.6em; white-space: pre-wrap; '
            f'overflow-wrap: anywhere; line-height: 1.45; border-left: 3px solid {colour}">'
            f'<b style="color: {colour}">{html.escape(name)}</b>\n{html.escape(content)}</div>'
        )
    if problem:
        plain.append(f"No answer: {problem}")
        blocks.append(f"<p><b>No answer:</b> {html.escape(problem)}</p>")
    if not blocks:
        plain, blocks = ["No words yet."], ["<p>No words yet.</p>"]
    # of the page's own colour below the text, so that it can be read on dark pages too
    text = f'<div style="max-width: 50em">{"".join(blocks)}</div>'
    return {"text/html": text, "text/plain": "\n".join(plain)}


def _make_widgets(
    send: Callable[[], None], stop: Callable[[], None], clear: Callable[[], None]
) -> dict[str, Any]:
    from ipywidgets import Button, Layout, Textarea

    words = Textarea(
        placeholder="Your words",
        layout=Layout(width="auto", max_width="50em", height="5em"),
        **tooltip("what you say to the model"),
    )
    found: dict[str, Any] = {"words": words}
    for name, label, does in (
        ("send", "Send", send),
        ("stop", "Stop", stop),
        ("clear", "Begin anew", clear),
    ):
        found[name] = Button(description=label, disabled=name == "stop")
        found[name].on_click(lambda _, does=does: does())
    return found
