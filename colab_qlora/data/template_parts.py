"""How a chat format's Jinja text is put together.

Three parts: the first reads the messages, whatever their keys and roles are called, into
`chat.turns`, a list of {"role", "content"}; the second refuses what the format cannot hold; the
third writes the turns (`template_texts.py`). So the whole rule travels with the tokenizer, and a
saved model needs nothing from this package.

What is left out: tools and images. A conversation with either is refused, not laid out wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
NAMED_ROLES = (SYSTEM, USER, ASSISTANT)


@dataclass(frozen=True)
class ChatFormat:
    """One published chat format.

    Args:
        name: what `get_chat_template` is asked for.
        turns: the Jinja text that writes `chat.turns`; `turn_end` in it is the end token in use.
        turn_end: token that ends a turn; None where the authors write the tokenizer's own eos.
        eos_token: eos of the authors' chat tokenizer, before any mapping.
        source: address of the authors' definition.
        aliases: further names.
        markers: other special tokens that the text writes; without them in the vocabulary they
            are plain text.
        writes_bos: the format begins with bos. Where it does not, bos is written only for a
            tokenizer that begins every text with it, as such a model has seen no text without.
        alternates: user and assistant have to speak in turn, beginning with the user.
        has_system: there is a system turn; else its text stands before the first user's.
        roles: what a turn's role may be; empty for any.
        default_system: system text of a conversation that brings none.
    """

    name: str
    turns: str
    turn_end: str | None
    eos_token: str
    source: str
    aliases: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    writes_bos: bool = False
    alternates: bool = False
    has_system: bool = True
    roles: tuple[str, ...] = NAMED_ROLES
    default_system: str | None = None


_READ = r"""{%- if tools -%}
{{- raise_exception('this chat template has no place for tools') -}}
{%- endif -%}
{%- set chat = namespace(turns=[], system='', last_question=0) -%}
{%- set roles = ROLES -%}
{%- for message in messages -%}
{%- set role = message[ROLE] if ROLE in message else message['role'] -%}
{%- set said = message[CONTENT] if CONTENT in message else message['content'] -%}
{%- if said is defined and said is not string and said is iterable -%}
{%- set texts = said | selectattr('type', 'equalto', 'text') | map(attribute='text') | list -%}
{%- set said = texts | join if texts | length == said | length else none -%}
{%- endif -%}
{%- if said is not string -%}
{{- raise_exception('message ' ~ loop.index ~ ' has no text, or something beside its text') -}}
{%- endif -%}
{%- set chat.turns = chat.turns + [{'role': roles[role] if role in roles else role,
 'content': said, 'reasoning_content': message['reasoning_content']}] -%}
{%- endfor -%}
"""

_DEFAULT_SYSTEM = r"""{%- if not chat.turns or chat.turns[0]['role'] != 'system' -%}
{%- set chat.turns = [{'role': 'system', 'content': TEXT}] + chat.turns -%}
{%- endif -%}
"""

_TAKE_SYSTEM = r"""{%- if chat.turns and chat.turns[0]['role'] == 'system' -%}
{%- set chat.system = chat.turns[0]['content'] -%}
{%- set chat.turns = chat.turns[1:] -%}
{%- endif -%}
"""

_CHECK_ROLES = r"""{%- for turn in chat.turns -%}
{%- if turn['role'] not in ALLOWED -%}
{{- raise_exception('turn ' ~ loop.index ~ ' has the role ' ~ turn['role'] ~ ', not one of '
 ~ ALLOWED | join(', ')) -}}
{%- endif -%}
{%- endfor -%}
"""

_CHECK_ALTERNATION = r"""{%- for turn in chat.turns -%}
{%- if turn['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
{{- raise_exception('user and assistant have to speak in turn, beginning with user, but turn '
 ~ loop.index ~ ' has the role ' ~ turn['role']) -}}
{%- endif -%}
{%- endfor -%}
"""


def message_reader(mapping: Mapping[str, str]) -> str:
    """Return the Jinja text that turns `messages` into `chat.turns`.

    Args:
        mapping: as `get_chat_template` takes it. Messages with the usual keys and roles are read
            as well, so that one tokenizer serves both training data and a question asked later.
    """
    keys = {"ROLE": mapping.get("role", "role"), "CONTENT": mapping.get("content", "content")}
    renamed = {theirs: ours for ours, theirs in mapping.items() if ours not in ("role", "content")}
    text = _READ.replace("ROLES", _literal(renamed))
    for placeholder, key in keys.items():
        text = text.replace(placeholder, _literal(key))
    return text


def format_text(
    entry: ChatFormat,
    mapping: Mapping[str, str],
    turn_end: str | None,
    begins_with_bos: bool,
    system_message: str | None,
) -> str:
    """Return the whole Jinja text of a format.

    Args:
        entry: the format.
        mapping: as `get_chat_template` takes it.
        turn_end: the token that ends a turn; None for the eos that the tokenizer has by then.
        begins_with_bos: write the tokenizer's bos in front.
        system_message: system text of a conversation that brings none; None for the format's own.
    """
    parts = [message_reader(mapping)]
    system = entry.default_system if system_message is None else system_message
    if system:
        parts.append(_DEFAULT_SYSTEM.replace("TEXT", _literal(system)))
    if not entry.has_system:
        parts.append(_TAKE_SYSTEM)
    if entry.alternates:
        parts.append(_CHECK_ALTERNATION)
    elif entry.roles:
        parts.append(_CHECK_ROLES.replace("ALLOWED", _literal(entry.roles)))
    end = "eos_token" if turn_end is None else _literal(turn_end)
    parts.append("{%- set turn_end = " + end + " -%}\n")
    if begins_with_bos:
        parts.append("{{- bos_token -}}\n")
    return "".join([*parts, entry.turns])


def _literal(value: object) -> str:
    # a JSON text, list or object is a Jinja one too
    return json.dumps(value, ensure_ascii=False)
