"""A chat template taken apart: the texts that it writes around what system, user and model say.

The template itself is asked: conversations of known words are written by it, and what stands
between the words are the pieces. They are right if they, put together again, give the template's
own text for conversations of other lengths; if not, the template is one that cannot be taken apart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from colab_qlora.data.chat_templates import adds_bos

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_WORDS = {"S": "Sqxsystemzv", "U": "Uqxfirstzv", "A": "Aqxsecondzv", "V": "Vqxthirdzv"}
_ROLES = {"S": SYSTEM, "U": USER, "A": ASSISTANT, "V": USER}
# what the pieces are checked on: the last one speaks is the user, as when an answer is wanted
_CHECKS = ("U", "SU", "UAV", "SUAV", "UAVAU", "SUAVAU")

Message = dict[str, str]


@dataclass(frozen=True)
class ChatPieces:
    """Texts of one chat template, without the token that begins a text.

    Attributes:
        before_system, after_system: around a system text; the second leads to the first user turn.
        start: in front of the first user turn, if there is no system text.
        before_user: in front of a later one.
        after_user: behind each, before an answer or where the answer is to be written.
        before_answer: behind that, only in front of an answer that is there.
        before_new_answer: behind that, only where an answer is to be written.
        after_answer: behind an answer that another turn follows.
        default_system: what the template says where no system text is given, or None.
    """

    before_system: str
    after_system: str
    start: str
    before_user: str
    after_user: str
    before_answer: str
    before_new_answer: str
    after_answer: str
    default_system: str | None = None

    def text(self, messages: Sequence[Message]) -> str:
        """What the template writes for messages whose last one is the user's."""
        system = next((m["content"] for m in messages if m["role"] == SYSTEM), None)
        if system is None:
            system = self.default_system
        parts = [self.start]
        if system is not None:
            parts = [self.before_system, system, self.after_system]
        turns = [message for message in messages if message["role"] != SYSTEM]
        for number, turn in enumerate(turns):
            if turn["role"] == USER:
                parts += [self.before_user if number else "", turn["content"], self.after_user]
            else:
                parts += [self.before_answer, turn["content"], self.after_answer]
        return "".join([*parts, self.before_new_answer])


def read_pieces(tokenizer: Any) -> ChatPieces | None:
    """Take a tokenizer's chat template apart; None if it has none, or one that cannot be."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    # a template says what it refuses by raising, in whatever way it was written
    try:
        pieces = _pieces(tokenizer)
        if pieces is None or not _is_right(pieces, tokenizer):
            return None
    except Exception:
        return None
    return pieces


def _pieces(tokenizer: Any) -> ChatPieces | None:
    alone, long = (_between(_written(tokenizer, names), names) for names in ("U", "UAV"))
    headed = _between_or_none(tokenizer, "SU")
    start, after_last = alone
    _, to_answer, to_user, _ = long
    after_user = os.path.commonprefix([to_answer, after_last])
    # where an answer ends cannot be told from a turn's beginning, and needs not be
    finished = _between_or_none(tokenizer, "UA", is_asking=False)
    after_answer = "" if finished is None else os.path.commonprefix([finished[-1], to_user])
    before_user = to_user[len(after_answer) :]
    before_system, after_system = (headed[0], headed[1]) if headed else ("", "")
    default = _default_system(start, before_system, after_system) if headed else None
    return ChatPieces(
        before_system,
        after_system,
        start,
        before_user,
        after_user,
        to_answer[len(after_user) :],
        after_last[len(after_user) :],
        after_answer,
        default,
    )


def _default_system(start: str, before: str, after: str) -> str | None:
    """The system text inside what stands in front of a first user turn, if there is one."""
    is_inside = len(start) > len(before) + len(after)
    if (before or after) and is_inside and start.startswith(before) and start.endswith(after):
        return start[len(before) : len(start) - len(after)]
    return None


def _is_right(pieces: ChatPieces, tokenizer: Any) -> bool:
    for names in _CHECKS:
        # a template may have no place for a system text
        if names[0] == "S" and _between_or_none(tokenizer, "SU") is None:
            continue
        # other words, so that a template which looks at them is found out
        messages = [{**m, "content": f"{m['content']}, {m['role']}\n2"} for m in _messages(names)]
        if pieces.text(messages) != _rendered(tokenizer, messages):
            return False
    return True


def _between_or_none(tokenizer: Any, names: str, is_asking: bool = True) -> list[str] | None:
    try:
        return _between(_written(tokenizer, names, is_asking), names)
    except Exception:
        return None


def _messages(names: str) -> list[Message]:
    return [{"role": _ROLES[name], "content": _WORDS[name]} for name in names]


def _written(tokenizer: Any, names: str, is_asking: bool = True) -> str:
    return _rendered(tokenizer, _messages(names), is_asking)


def _rendered(tokenizer: Any, messages: Sequence[Message], is_asking: bool = True) -> str:
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=is_asking
    )
    # llama.cpp writes it where the tokenizer does
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def _between(text: str, names: str) -> list[str]:
    """What stands before, between and after the words.

    Raises:
        ValueError: a word is not there.
    """
    found, rest = [], text
    for name in names:
        before, word, rest = rest.partition(_WORDS[name])
        if not word:
            raise ValueError(f"{_ROLES[name]} is left out")
        found.append(before)
    return [*found, rest]
