"""Bring chat data into one layout, and make chats of tables.

    to_sharegpt            columns             ->  conversations of from and value
    standardize_sharegpt   either chat layout  ->  conversations of role and content

Both take and return a list, `Records` or a `datasets.Dataset`, and change none in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from colab_qlora.data.formats import DataFormat, detect_format
from colab_qlora.data.messages import (
    ASSISTANT_NAMES,
    CONVERSATION_FIELDS,
    REMEDIES,
    SYSTEM_NAMES,
    USER_NAMES,
    Fault,
    read_conversation,
    role_table,
)
from colab_qlora.data.records import Records, where
from colab_qlora.data.row_sources import column_names, is_dataset, require_rows
from colab_qlora.data.wording import counted, first_few, kind_of
from colab_qlora.errors import UserError

# carries the faults out of the processes that read a data set
_FAULTS = "faults_of_the_conversation"


def standardize_sharegpt(
    dataset: Any,
    tokenizer: Any = None,
    aliases_for_system: Iterable[str] = SYSTEM_NAMES,
    aliases_for_user: Iterable[str] = USER_NAMES,
    aliases_for_assistant: Iterable[str] = ASSISTANT_NAMES,
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """Turn ShareGPT or OpenAI messages into "conversations" of role and content.

    Roles become "system", "user" and "assistant", whatever the case of their names. A message of
    several text parts becomes one text. Only role and content are kept of a message.

    Args:
        dataset: rows with "conversations" or "messages", whose messages have "from" and "value" or
            "role" and "content".
        tokenizer: not needed for text; taken because public tutorials pass one.
        aliases_for_system: role names that mean the system.
        aliases_for_user: role names that mean the user.
        aliases_for_assistant: role names that mean the assistant.
        batch_size: rows read at a time, for a `datasets.Dataset`.
        num_proc: processes that read a `datasets.Dataset`; None reads in this one, as lists are.

    Returns:
        The same kind of rows with "conversations"; other fields stay, but "messages" goes.

    Raises:
        UserError: no row, neither or both fields, or a message that is empty, out of turn, of an
            unknown role, of a tool, or not text. The first three faults are named.

    Example:
        >>> turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
        >>> standardize_sharegpt([{"conversations": turns}])[0]["conversations"][1]
        {'role': 'assistant', 'content': 'Hello'}
    """
    require_rows(dataset)
    roles = role_table(aliases_for_system, aliases_for_user, aliases_for_assistant)
    field = _conversation_field(dataset)
    if is_dataset(dataset):
        return _standardize_dataset(dataset, field, roles, batch_size, num_proc)
    rows, faults = [], []
    for index, row in enumerate(dataset):
        turns, found = _read_row(row, field, roles)
        faults += [(index, fault) for fault in found]
        if not found:
            others = {name: value for name, value in row.items() if name != field}
            rows.append({**others, "conversations": turns})
    refuse(dataset, faults)
    return replace(dataset, rows=tuple(rows)) if isinstance(dataset, Records) else rows


# the newer name of the same function in public tutorials
standardize_data_formats = standardize_sharegpt


def _read_row(
    row: object, field: str, roles: Mapping[str, str]
) -> tuple[list[dict[str, str]], list[Fault]]:
    if not isinstance(row, Mapping):
        return [], [Fault("layout", f"{kind_of(row)}, not an object")]
    return read_conversation(row.get(field), field, roles)


def _conversation_field(dataset: Any) -> str:
    """The one field that holds the conversations."""
    found = [name for name in CONVERSATION_FIELDS if name in column_names(dataset)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            "it is not clear where the conversations are",
            got="both 'conversations' and 'messages'",
            allowed="one of the two",
            do="Delete the field that is not to be trained on",
        )
    # refuses an unknown layout by itself, with the first rows named
    data_format = detect_format(dataset)
    raise UserError(
        "there are no conversations to bring into one layout",
        got=str(data_format).rstrip("."),
        allowed="rows with 'conversations' or 'messages'",
        do=_other_way(data_format),
    )


def _other_way(data_format: DataFormat) -> str:
    if data_format.name != "alpaca":
        return "Train on these rows as they are"
    # an input that is left out of the prompt would be lost without a word
    template = "{instruction}[[\n\n{input}]]" if "input" in data_format.fields else ""
    return f"Call to_sharegpt(dataset, merged_prompt={template!r}) first"


def _standardize_dataset(
    dataset: Any, field: str, roles: dict[str, str], batch_size: int, num_proc: int | None
) -> Any:
    from datasets import Features, Value

    text = Value("string")
    kept = {name: kind for name, kind in dataset.features.items() if name != field}
    # named, because a first batch without a conversation would fix the type as nothing
    features = Features(
        {
            **kept,
            "conversations": [{"role": text, "content": text}],
            _FAULTS: [{"kind": text, "text": text}],
        }
    )
    mapped = dataset.with_format(None).map(
        _read_batch,
        batched=True,
        batch_size=batch_size,
        num_proc=num_proc,
        input_columns=[field],
        remove_columns=[field],
        features=features,
        fn_kwargs={"field": field, "roles": roles},
        desc="Reading conversations",
    )
    faults = [(index, Fault(**fault)) for index, row in enumerate(mapped[_FAULTS]) for fault in row]
    refuse(dataset, faults)
    return mapped.remove_columns(_FAULTS)


def _read_batch(
    conversations: list[Any], field: str, roles: dict[str, str]
) -> dict[str, list[Any]]:
    read = [read_conversation(messages, field, roles) for messages in conversations]
    return {
        "conversations": [turns for turns, _ in read],
        _FAULTS: [[{"kind": f.kind, "text": f.text} for f in faults] for _, faults in read],
    }


def refuse(rows: Any, faults: list[tuple[int, Fault]], noun: str = "conversation") -> None:
    """Raise one error for all faults, with the remedy of the kind that is met most.

    Args:
        rows: of which `Records` know their lines.
        faults: with the index of their row; if there is none, nothing happens.
        noun: what a row is called.

    Raises:
        UserError: there is a fault.
    """
    if not faults:
        return
    kinds = Counter(fault.kind for _, fault in faults)
    allowed, do = REMEDIES[kinds.most_common(1)[0][0]]
    faulty_rows = len({index for index, _ in faults})
    raise UserError(
        f"{faulty_rows:,} of {counted(len(rows), noun)} cannot be used",
        got=first_few([f"{where(rows, index)}: {fault.text}" for index, fault in faults]),
        allowed=allowed,
        do=do if len(kinds) == 1 else f"{do}; then mend what is left",
    )
