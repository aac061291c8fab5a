"""A chat format read from an example: one conversation with slots where its texts stand.

    ### Instruction:
    {INPUT}

    ### Response:
    {OUTPUT}

{INPUT} and {OUTPUT} once or twice, {SYSTEM} in front of them or not at all. With two of each, what
the second turn repeats tells a turn's heading from what stands at the beginning only; with one, a
heading begins behind {SYSTEM}, or else at the last blank line.
"""

from __future__ import annotations

import json
import re
from typing import Any

from colab_qlora.data.template_parts import ChatFormat
from colab_qlora.data.wording import shown
from colab_qlora.errors import UserError

_SYSTEM = "{SYSTEM}"
_PAIR = ["{INPUT}", "{OUTPUT}"]
_SLOT = r"\{(?:SYSTEM|INPUT|OUTPUT)\}"


def is_example(template: object) -> bool:
    """Whether a text has slots of this kind, and is no format's name."""
    return isinstance(template, str) and any(slot in template for slot in _PAIR)


def format_of_example(text: str, tokenizer: Any, default_system: str | None = None) -> ChatFormat:
    """The format of an example.

    An answer ends with the special token that stands behind {OUTPUT}, or else with the tokenizer's
    own end token.

    Args:
        text: with the slots.
        tokenizer: whose special tokens are looked for.
        default_system: what {SYSTEM} is in a conversation that brings no system text.

    Raises:
        UserError: the slots are others, the two turns are written differently, or `default_system`
            has no place.
    """
    bos = tokenizer.bos_token or ""
    has_bos = bool(bos) and text.startswith(bos)
    texts, has_system = _around_slots(text, bos)
    if default_system is not None and not has_system:
        raise UserError(
            "default_system_message has no place in chat_template",
            got=shown(default_system),
            allowed="a chat_template with {SYSTEM}",
            do="Write {SYSTEM} into chat_template, or leave default_system_message out",
        )
    before_system = texts.pop(0) if has_system else ""
    beginning, heading = _heading(texts, has_system)
    middle, ending = texts[1], texts[-1]
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = sorted((ending.index(token), token) for token in special if token in ending)
    said = f"{_literal(ending)}{'' if ends else ' + turn_end'}"
    start = f"{_literal(before_system)} + chat.system + " if has_system else ""
    return ChatFormat(
        "of your own",
        _turns(f"{start}{_literal(beginning)}", _literal(heading), _literal(middle), said),
        turn_end=ends[0][1] if ends else None,
        eos_token=tokenizer.eos_token or "",
        source="",
        writes_bos=has_bos,
        alternates=True,
        has_system=not has_system,
        default_system=default_system,
    )


def _around_slots(text: str, bos: str) -> tuple[list[str], bool]:
    """What stands around the slots, without `bos`; and whether the first of them is {SYSTEM}."""
    texts = re.split(_SLOT, text.removeprefix(bos))
    slots = re.findall(_SLOT, text)
    has_system = slots[:1] == [_SYSTEM]
    if slots[has_system:] not in (_PAIR, _PAIR * 2):
        raise _unreadable(
            f"{' '.join(slots) or 'no slot'} in {shown(text)}",
            "{INPUT} {OUTPUT}, once or twice, and {SYSTEM} in front of them or not",
        )
    return texts, has_system


def _turns(start: str, heading: str, middle: str, ending: str) -> str:
    """The Jinja template of a format, of Jinja expressions.

    Args:
        start: of a conversation.
        heading, middle, ending: before a user's text, before an answer and after one.
    """
    return (
        f"{{{{- {start} -}}}}\n"
        "{%- for turn in chat.turns -%}\n"
        f"{{%- if turn['role'] == 'user' -%}}{{{{- {heading} + turn['content'] -}}}}\n"
        f"{{%- else -%}}{{{{- {middle} + turn['content'] + {ending} -}}}}{{%- endif -%}}\n"
        "{%- endfor -%}\n"
        f"{{%- if add_generation_prompt -%}}{{{{- {middle} -}}}}{{%- endif -%}}"
    )


def _heading(texts: list[str], has_system: bool) -> tuple[str, str]:
    """What stands at the beginning only, and what stands in front of each user text."""
    head, middle, ending = texts[0], texts[1], texts[-1]
    if len(texts) == 5:
        between, second = texts[2:4]
        heading = between.removeprefix(ending)
        if second != middle or not between.startswith(ending) or not head.endswith(heading):
            raise _unreadable(
                f"turns with {shown(head)} and {shown(between)} in front of {{INPUT}}, "
                f"{shown(middle)} and {shown(second)} in front of {{OUTPUT}}, "
                f"{shown(ending)} at the end",
                "two turns written alike",
            )
        return head.removesuffix(heading), heading
    if has_system:
        # the system's turn ends as an answer does
        beginning = ending if head.startswith(ending) else ""
        return beginning, head.removeprefix(beginning)
    beginning, blank, _ = head.rstrip("\n").rpartition("\n\n")
    return (beginning, head.removeprefix(beginning)) if blank else ("", head)


def _unreadable(got: str, allowed: str) -> UserError:
    return UserError(
        "chat_template cannot be read as an example",
        got=got,
        allowed=allowed,
        do="Correct chat_template, or pass the name of a format",
    )


def _literal(text: str) -> str:
    # a JSON text is a Jinja one too
    return json.dumps(text, ensure_ascii=False)
