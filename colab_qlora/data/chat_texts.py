"""Check conversations against a chat format, and lay a data set's out as texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from colab_qlora.data.chat_templates import (
    adds_bos,
    checked_mapping,
    find_format,
    get_chat_template,
    require_tokenizer,
)
from colab_qlora.data.example_template import format_of_example, is_example
from colab_qlora.data.template_parts import ASSISTANT, SYSTEM, USER
from colab_qlora.data.wording import first_few, kind_of, shown
from colab_qlora.errors import UserError

COLUMNS = ("conversations", "messages")


def check_conversation(
    messages: Sequence[Mapping[str, Any]],
    template: str | Sequence[str] = "chatml",
    mapping: Mapping[str, str] | None = None,
) -> None:
    """Refuse a conversation that a format cannot hold.

    Args:
        messages: one conversation.
        template: as `get_chat_template` takes it.
        mapping: as `get_chat_template` takes it.

    Raises:
        UserError: there is no message, one has no role or no text, a role is unknown to the format,
            or user and assistant do not speak in turn where the format wants it.
    """
    mapping, entry = checked_mapping(mapping), find_format(template)
    roles = [_role_of(message, i, mapping) for i, message in enumerate(messages, start=1)]
    if not roles:
        raise UserError(
            "the conversation is empty", got="no message", allowed="at least one", do="Drop the row"
        )
    numbered = list(enumerate(roles, start=1))
    if roles[0] == SYSTEM:
        numbered = numbered[1:]
    for place, (number, role) in enumerate(numbered):
        wanted = (USER, ASSISTANT)[place % 2]
        if entry.alternates and role != wanted:
            raise UserError(
                f"{entry.name} wants user and assistant in turn, beginning with user",
                got=f"{role!r} as message {number} ({' '.join(roles[:number])})",
                allowed=f"{wanted!r} there",
                do="Join neighbouring messages of one role, or drop the row",
            )
        if entry.roles and role not in entry.roles:
            raise UserError(
                f"message {number} has a role that {entry.name} does not know",
                got=repr(role),
                allowed=", ".join(entry.roles),
                do="Pass mapping={'user': 'human', ...} with the names in your data",
            )


def apply_chat_template(
    dataset: Any,
    tokenizer: Any,
    column: str | None = None,
    text_column: str = "text",
    add_generation_prompt: bool = False,
    *,
    chat_template: str | None = None,
    default_system_message: str | None = None,
) -> Any:
    """Lay out every conversation of a dataset as one text.

    A bos that `tokenizer(text)` adds by itself is left out of the text, so that a trainer that
    tokenises the text gives the model one bos and not two.

    Args:
        dataset: a Hugging Face dataset (or dict of them), or a list of rows.
        tokenizer: what `get_chat_template` returned, or any with a chat template.
        column: where the messages are; None looks for "conversations", then "messages".
        text_column: where the text goes.
        add_generation_prompt: end with the heading of an answer.
        chat_template: set the tokenizer's first: a format's name, or an example of a conversation
            with {INPUT}, {OUTPUT} and {SYSTEM}; see `example_template.py`.
        default_system_message: with it, the system text of a conversation that brings none.

    Returns:
        The dataset with `text_column`; a list for a list.

    Raises:
        UserError: the tokenizer has no chat template, `chat_template` cannot be read, a row has no
            messages, or the template refuses them.
    """
    require_tokenizer(tokenizer)
    _set_template(tokenizer, chat_template, default_system_message)
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            got="chat_template None",
            allowed="a tokenizer with one",
            do="Call get_chat_template(tokenizer, 'chatml') first",
        )
    surplus = tokenizer.bos_token if adds_bos(tokenizer) else ""

    def lay_out(row: Mapping[str, Any], index: int) -> dict[str, str]:
        messages = _messages_of(row, index, column)
        text = _render(messages, tokenizer, index, add_generation_prompt)
        return {text_column: text.removeprefix(surplus)}

    if hasattr(dataset, "map"):
        return dataset.map(lay_out, with_indices=True)
    return [{**row, **lay_out(row, index)} for index, row in enumerate(dataset)]


def _set_template(tokenizer: Any, template: str | None, system: str | None) -> None:
    if template is None:
        if system is not None:
            raise UserError(
                "default_system_message needs a chat_template to stand in",
                got=shown(system),
                allowed="both or neither",
                do="Pass chat_template too, or get_chat_template(..., system_message=...)",
            )
    elif is_example(template):
        get_chat_template(tokenizer, format_of_example(template, tokenizer, system))
        if system is None and "{SYSTEM}" in template:
            print("chat template of your own: {SYSTEM} is empty where a conversation brings none.")
    else:
        get_chat_template(tokenizer, template, system_message=system)


def _render(messages: Any, tokenizer: Any, index: int, add_generation_prompt: bool) -> str:
    with readable_template_errors(f"row {index}"):
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    return str(text)


@contextmanager
def readable_template_errors(place: str) -> Iterator[None]:
    """Say which row a chat template refuses.

    Args:
        place: of the row, for the message.

    Raises:
        UserError: it is refused.
    """
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise UserError(
            f"{place} does not fit the chat template",
            got=" ".join(str(error).split()),
            allowed="a conversation that the template can hold",
            do="Mend or drop the row; check_conversation(messages, name) tells more",
        ) from error


def _messages_of(row: Mapping[str, Any], index: int, column: str | None) -> list[Any]:
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if isinstance(row.get(name), list) and row[name]:
            return row[name]
    fields = [f"{shown(key)} as {kind_of(value)}" for key, value in row.items()]
    raise UserError(
        f"row {index} has no messages",
        got=first_few(fields, 6, ", ") or "no field",
        allowed="a list of messages, not empty, in " + " or ".join(repr(name) for name in wanted),
        do="Pass column= with the name in your data, or drop the row",
    )


def _role_of(message: object, number: int, mapping: Mapping[str, str]) -> str:
    role_key, content_key = mapping.get("role", "role"), mapping.get("content", "content")
    role: object = None
    content: object = None
    if isinstance(message, Mapping):
        role = message.get(role_key, message.get("role"))
        content = message.get(content_key, message.get("content"))
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(
            f"message {number} has no role or no text",
            got=shown(message, 80),
            allowed=f"an object with texts as {role_key!r} and {content_key!r}",
            do="Pass mapping={'role': ..., 'content': ...} with the names in your data",
        )
    ours = {theirs: ours for ours, theirs in mapping.items() if ours not in ("role", "content")}
    return ours.get(role, role)


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text"
