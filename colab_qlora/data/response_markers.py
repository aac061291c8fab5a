"""What stands before a user's and before an assistant's text, read from a chat template.

A conversation of contents that no template contains is rendered, and the text between them is
looked at:

    ... user1 <|im_end|> <|im_start|>assistant answer1 <|im_end|> <|im_start|>user user2 ...

What follows every answer, the last one too, ends a turn; what stands between that end and the next
content is the marker of its role. Only what is the same in all turns counts: some templates put
more into the first or the last one.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from colab_qlora.data.wording import shown
from colab_qlora.errors import UserError

_TURNS = 3
# text that is compared as a whole: "<|user|>" and "<|assistant|>" have no "<|" in common
_UNIT = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]|.", re.DOTALL)
_EXAMPLE = (
    "Pass both parts, as in instruction_part='<|im_start|>user\\n', "
    "response_part='<|im_start|>assistant\\n'"
)


@dataclass(frozen=True)
class TurnMarkers:
    """The texts by which the turns of a conversation are told apart.

    Args:
        instruction: stands before a user's text.
        response: stands before an assistant's text.
        end: stands behind an assistant's text, such as "<|im_end|>"; "" if that is not known.
        ends_every_turn: whether `end` stands behind a user's text as well.
    """

    instruction: str
    response: str
    end: str = ""
    ends_every_turn: bool = False


def find_markers(tokenizer: Any) -> TurnMarkers:
    """Read the markers from the tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.

    Returns:
        The markers, without spaces at their right: "[/INST] " is "[/INST]", because the space is
        a part of the answer's first token, which would otherwise never be learnt.

    Raises:
        UserError: there is no template, or its texts between the turns cannot be told apart.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the markers of the turns are not known",
            got="no tokenizer" if tokenizer is None else "a tokenizer whose chat_template is None",
            allowed="a tokenizer with a chat template, or both markers",
            do=_EXAMPLE,
        )
    between = _texts_between(tokenizer)
    # from the end, because what stands before the first user's text may hold a system prompt
    tail, to_response, to_instruction = between[-1], between[-2::-2], between[-3::-2]
    to_response, to_instruction = to_response[:_TURNS], to_instruction[: _TURNS - 1]
    end = _common_start([tail, *to_instruction]).strip()
    markers = TurnMarkers(
        instruction=_header(to_instruction, end),
        response=_header(to_response, end),
        end=end,
        ends_every_turn=bool(end) and all(t.lstrip().startswith(end) for t in to_response),
    )
    _check_parts(markers.instruction, markers.response, "the chat template's markers")
    return markers


def choose_markers(
    tokenizer: Any, instruction_part: str | None = None, response_part: str | None = None
) -> TurnMarkers:
    """The given markers, or those of the chat template where none is given.

    Where the given ones are the template's, what the template puts behind a turn is known too.

    Args:
        tokenizer: a Hugging Face tokenizer.
        instruction_part: stands before a user's text; an end of turn at its start is left out,
            because that belongs to the answer before it.
        response_part: stands before an assistant's text; the same, and without spaces at its right
            (see `find_markers`).

    Raises:
        UserError: one is given and the other is not, one has no letter, both are the same, or
            none is given and the template does not tell them.
    """
    if instruction_part is None and response_part is None:
        return find_markers(tokenizer)
    if not isinstance(instruction_part, str) or not isinstance(response_part, str):
        raise UserError(
            "the two markers belong together",
            got=f"instruction_part={shown(instruction_part)}, response_part={shown(response_part)}",
            allowed="both as text, or neither",
            do=_EXAMPLE,
        )
    _check_parts(instruction_part, response_part, "instruction_part and response_part")
    try:
        known = find_markers(tokenizer)
    except UserError:  # then nothing is known beyond what was given
        known = TurnMarkers("", "")
    ends = [end for end in (known.end, getattr(tokenizer, "eos_token", None)) if end]
    instruction = _without_ends(instruction_part, ends) or instruction_part
    response = (_without_ends(response_part, ends) or response_part).rstrip(" ")
    if (instruction.strip(), response.strip()) != (
        known.instruction.strip(),
        known.response.strip(),
    ):
        return TurnMarkers(instruction, response)
    return TurnMarkers(instruction, response, known.end, known.ends_every_turn)


def _texts_between(tokenizer: Any) -> list[str]:
    """The rendered text before, between and behind the contents, with a system prompt if it may."""
    reason = ""
    for roles in (["system"], []):
        roles = roles + ["user", "assistant"] * _TURNS
        contents = [f"Qz{role}{index}zQ" for index, role in enumerate(roles)]
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates refuse roles with exceptions of their own
            reason = f"{type(error).__name__}: {error}"
            continue
        parts = re.split("|".join(map(re.escape, contents)), text)
        if re.findall(r"Qz\w+?zQ", text) == contents:
            return parts
        reason = "a text that does not hold each content once and in order"
    raise UserError(
        "the chat template does not tell its markers",
        got=shown(reason, 120),
        allowed="a template that renders user and assistant turns",
        do=_EXAMPLE,
    )


def _header(texts: Sequence[str], end: str) -> str:
    return _common_start([_without_ends(text, [end]) for text in texts]).rstrip(" ")


def _without_ends(text: str, ends: Sequence[str]) -> str:
    """`text` behind the ends of a turn that it begins with."""
    rest = text.lstrip()
    while rest and (found := next((e for e in ends if e and rest.startswith(e)), None)):
        rest = rest[len(found) :].lstrip()
    return rest


def _common_start(texts: Sequence[str]) -> str:
    units = [_UNIT.findall(text) for text in texts]
    return "".join(os.path.commonprefix(units))


def _check_parts(instruction: str, response: str, what: str) -> None:
    if not instruction.strip() or not response.strip() or instruction == response:
        raise UserError(
            f"{what} do not tell a user's turn from an assistant's",
            got=f"{instruction!r} and {response!r}",
            allowed="two different texts that are not blank",
            do=_EXAMPLE,
        )
