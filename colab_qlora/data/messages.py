"""Read one conversation into role and content messages, or say what is wrong with it.

Two layouts of a message are in use, and both become the second:

    {"from": "human", "value": "Hello"}    {"role": "user", "content": "Hello"}

A conversation has at most one system message, in front; then user and assistant take turns, the
user first. Chat templates either refuse another order or lay it out as no model has seen it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from colab_qlora.data.wording import first_few, kind_of, shown
from colab_qlora.errors import UserError

CONVERSATION_FIELDS = ("conversations", "messages")
# (role, text) of each layout
MESSAGE_LAYOUTS = (("role", "content"), ("from", "value"))

SYSTEM_NAMES = ("system", "developer")
USER_NAMES = ("user", "human", "input", "prompter")
ASSISTANT_NAMES = ("gpt", "assistant", "output", "model", "chatgpt", "bot")
_TOOL_NAMES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a conversation.

    Args:
        kind: a key of `REMEDIES`.
        text: the fault as a clause that begins with its place, such as "'messages[2].role' is 3".
    """

    kind: str
    text: str


# (what is allowed, what to do) for each kind of fault
REMEDIES = {
    "layout": (
        "a list of messages with 'role' and 'content', or with 'from' and 'value'",
        "Write these rows again in one of the two layouts",
    ),
    "role": (
        "a role that is one of the aliases",
        "Name it in aliases_for_system, aliases_for_user or aliases_for_assistant",
    ),
    "tool": (
        "messages of system, user and assistant",
        "Delete these rows, or write the tool's call and answer as text of the two speakers",
    ),
    "tools": (
        "rows without tools",
        "Delete the field 'tools', or write what it says as text of a system message",
    ),
    "part": (
        "text, or a list of parts of type 'text'",
        "Delete these rows, or keep the text parts only",
    ),
    "empty": (
        "text in every message",
        "Fill or delete the messages named here; a system message may simply be left out",
    ),
    "order": (
        "at most one system message, in front, then user and assistant in turn, the user first",
        "Join messages of one speaker, and delete what stands before the first user message",
    ),
    "weight": (
        "assistant messages that are all to be learned",
        "Delete these messages or rows, or delete their 'weight' to train on them",
    ),
}


def role_table(
    system: Iterable[str] = SYSTEM_NAMES,
    user: Iterable[str] = USER_NAMES,
    assistant: Iterable[str] = ASSISTANT_NAMES,
) -> dict[str, str]:
    """Return {alias in lower case: "system", "user" or "assistant"}.

    Raises:
        UserError: a list of aliases is no list of texts, or an alias stands for two roles.
    """
    table: dict[str, str] = {}
    for role, aliases in (("system", system), ("user", user), ("assistant", assistant)):
        names = [aliases] if isinstance(aliases, str) else list(aliases)
        for name in names:
            if isinstance(aliases, str) or not isinstance(name, str):
                raise UserError(
                    f"aliases_for_{role} is not a list of names",
                    got=shown(aliases),
                    allowed="a list of texts",
                    do=f"Pass aliases_for_{role}=[{role!r}]",
                )
            if table.setdefault(name.casefold(), role) != role:
                raise UserError(
                    "an alias stands for two roles",
                    got=f"{name!r} for {table[name.casefold()]} and for {role}",
                    allowed="each alias for one role",
                    do=f"Take it out of aliases_for_{table[name.casefold()]} "
                    f"or of aliases_for_{role}",
                )
    return table


def read_conversation(
    messages: object, field: str, roles: Mapping[str, str]
) -> tuple[list[dict[str, str]], list[Fault]]:
    """Read the messages of one row.

    Args:
        messages: what the row has in `field`.
        field: the field's name, as faults show it.
        roles: what `role_table` returned.

    Returns:
        The messages as {"role": text, "content": text}, and the faults. Where there is a fault, the
        messages are not to be used.
    """
    if messages is None:
        return [], [Fault("layout", f"{field!r} is missing")]
    if not isinstance(messages, list):
        return [], [Fault("layout", f"{field!r} is {kind_of(messages)}, not a list of messages")]
    if not messages:
        return [], [Fault("empty", f"{field!r} has no message")]
    turns, faults = [], []
    for index, message in enumerate(messages):
        turn = _read_message(message, f"{field}[{index}]", roles)
        if isinstance(turn, Fault):
            faults.append(turn)
        else:
            turns.append(turn)
    # an order cannot be judged with messages missing from it
    return turns, faults or _order_faults(turns, field)


def content_faults(messages: object, field: str) -> list[Fault]:
    """What training would drop, misread or stumble over in messages of either layout.

    Which roles there are, and in which order, is left to the chat template.

    Args:
        messages: what a row has in `field`; what is no message is left to the template, too.
        field: the field's name, as faults show it.
    """
    faults: list[Fault] = []
    for index, message in enumerate(messages if isinstance(messages, list) else []):
        layout = _trained_layout(message)
        if layout is not None and isinstance(message, Mapping):
            fault = _content_fault(message, f"{field}[{index}]", *layout)
            faults += [] if fault is None else [fault]
    return faults


def _content_fault(
    message: Mapping[str, Any], place: str, role_field: str, text_field: str
) -> Fault | None:
    if fault := _tool_field_fault(message, place):
        return fault
    role, content = str(message[role_field]).casefold(), message.get(text_field)
    if role in _TOOL_NAMES:
        return Fault("tool", f"'{place}.{role_field}' is {shown(message[role_field])}")
    if role == "assistant" and (fault := _weight_fault(message, place)):
        return fault
    # an empty text is what the template makes of it
    text = "" if isinstance(content, str) else _read_text(content, f"{place}.{text_field}")
    return text if isinstance(text, Fault) else None


def joined_parts(messages: object) -> Any:
    """The messages with one text each, where `content_faults` finds none in them."""
    return [_joined(message) for message in messages] if isinstance(messages, list) else messages


def _joined(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    layout = _trained_layout(message)
    # of the other layout's text nothing is known
    if layout is None or not isinstance(message.get(layout[1]), list):
        return message
    return {**message, layout[1]: "".join(part["text"] for part in message[layout[1]])}


def _trained_layout(message: object) -> tuple[str, str] | None:
    """The pair that TRL reads: role and content wherever there is a role."""
    if isinstance(message, Mapping) and message.get("role") is not None:
        return MESSAGE_LAYOUTS[0]
    return message_layout(message)


def message_layout(message: object) -> tuple[str, str] | None:
    """The pair of `MESSAGE_LAYOUTS` that a message has, None for neither or both."""
    if not isinstance(message, Mapping):
        return None
    # Arrow gives every message the fields of all, with None where there was none
    found = [pair for pair in MESSAGE_LAYOUTS if message.get(pair[0]) is not None]
    return found[0] if len(found) == 1 else None


def _read_message(message: object, place: str, roles: Mapping[str, str]) -> dict[str, str] | Fault:
    layout = message_layout(message)
    if layout is None or not isinstance(message, Mapping):
        return Fault("layout", f"'{place}' {_fields_of(message)}")
    if fault := _tool_field_fault(message, place):
        return fault
    role_field, text_field = layout
    said = message[role_field]
    role = roles.get(said.casefold()) if isinstance(said, str) else None
    if role is None:
        is_tool = isinstance(said, str) and said.casefold() in _TOOL_NAMES
        known = "" if is_tool else f", none of {', '.join(roles)}"
        return Fault(
            "tool" if is_tool else "role", f"'{place}.{role_field}' is {shown(said)}{known}"
        )
    if role == "assistant" and (fault := _weight_fault(message, place)):
        return fault
    text = _read_text(message.get(text_field), f"{place}.{text_field}")
    return text if isinstance(text, Fault) else {"role": role, "content": text}


def _tool_field_fault(message: Mapping[str, Any], place: str) -> Fault | None:
    found = next((name for name in _TOOL_FIELDS if message.get(name)), None)
    return None if found is None else Fault("tool", f"'{place}.{found}' is a tool's")


def _weight_fault(message: Mapping[str, Any], place: str) -> Fault | None:
    """Of a message of the assistant."""
    weight = message.get("weight")
    if weight is None or weight:
        return None
    return Fault("weight", f"'{place}.weight' is {shown(weight)}, which would be ignored")


def _fields_of(message: object) -> str:
    if not isinstance(message, Mapping):
        return f"is {kind_of(message)}, not an object"
    filled = [shown(key) for key, value in message.items() if value is not None]
    return f"has {first_few(filled, limit=4, separator=', ') or 'no field'}"


def _read_text(content: object, place: str) -> str | Fault:
    """The text of one message, whose parts are joined where it has several."""
    if isinstance(content, list):
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else None
            has_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
            # Arrow, and some writers, give an image a text too
            if not has_text or kind not in (None, "text"):
                named = f"of type {shown(kind)}" if kind is not None else kind_of(part)
                return Fault("part", f"'{place}[{index}]' is {named}")
        content = "".join(part["text"] for part in content)
    if content is None:
        return Fault("empty", f"'{place}' is missing")
    if not isinstance(content, str):
        return Fault("part", f"'{place}' is {kind_of(content)} ({shown(content)})")
    if not content.strip():
        return Fault("empty", f"'{place}' is {'only white space' if content else 'empty'}")
    return content


def _order_faults(turns: list[dict[str, str]], field: str) -> list[Fault]:
    """The first place where the speakers are out of turn."""
    roles = [turn["role"] for turn in turns]
    start = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[start:], start):
        expected = ("user", "assistant")[(index - start) % 2]
        if role != expected:
            place = f"'{field}[{index}]'"
            return [Fault("order", f"{place} is the {role}'s where the {expected}'s is due")]
    if "assistant" not in roles:
        return [Fault("order", f"{field!r} has no message of the assistant to learn from")]
    return []
