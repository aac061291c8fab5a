from __future__ import annotations

import pytest

from colab_qlora.data.alpaca import format_alpaca, format_chat
from colab_qlora.data.formats import detect_format
from colab_qlora.data.records import read_records

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
ALPACA = {"instruction": "q", "output": "a"}

# row, name, fields, has_messages, words
KNOWN = [
    (ALPACA, "alpaca", ("instruction", "output"), False, "Alpaca instructions in 'instruction'"),
    (
        {"instruction": "q", "input": "", "output": "a"},
        "alpaca",
        ("instruction", "input", "output"),
        False,
        "Alpaca instructions in 'instruction', 'input' and 'output'.",
    ),
    (
        {"conversations": [HUMAN, GPT]},
        "sharegpt",
        ("conversations",),
        True,
        "ShareGPT conversations in 'conversations' of 'from' and 'value'.",
    ),
    ({"messages": [HUMAN, GPT]}, "sharegpt", ("messages",), True, "in 'messages' of 'from'"),
    (
        {"messages": [USER, ASSISTANT]},
        "messages",
        ("messages",),
        True,
        "OpenAI messages in 'messages' of 'role' and 'content'.",
    ),
    ({"conversations": [USER]}, "messages", ("conversations",), True, "in 'conversations' of"),
    (
        {"prompt": "q", "completion": "a"},
        "prompt_completion",
        ("prompt", "completion"),
        False,
        "prompts and completions in 'prompt' and 'completion' as text.",
    ),
    (
        {"prompt": [USER], "completion": [ASSISTANT]},
        "prompt_completion",
        ("prompt", "completion"),
        True,
        "prompts and completions in 'prompt' and 'completion' as lists of messages.",
    ),
    ({"text": "t"}, "text", ("text",), False, "plain text in 'text'."),
]


@pytest.mark.parametrize(("row", "name", "fields", "has_messages", "words"), KNOWN)
def test_every_common_layout_is_named(row, name, fields, has_messages, words):
    found = detect_format([row, dict(row)])
    assert (found.name, found.fields, found.has_messages) == (name, fields, has_messages)
    assert (found.rows, found.other_fields) == (2, ())
    assert str(found).startswith("The data set has 2 rows of ")
    assert words in str(found)
    assert str(found).count(".") == 1


@pytest.mark.parametrize(("row", "name", "fields", "has_messages", "words"), KNOWN)
def test_a_data_set_has_the_layout_of_its_rows(row, name, fields, has_messages, words):
    datasets = pytest.importorskip("datasets")
    found = detect_format(datasets.Dataset.from_list([row]))
    assert (found.name, found.fields, found.has_messages) == (name, fields, has_messages)
    assert str(found).startswith("The data set has 1 row of ")


@pytest.mark.parametrize(
    ("row", "name", "others"),
    [
        ({**ALPACA, "text": "derived", "id": 1}, "alpaca", ("text", "id")),
        ({"prompt": "q", "messages": [USER]}, "messages", ("prompt",)),
        ({"prompt": "q", "completion": "a", **ALPACA}, "prompt_completion", tuple(ALPACA)),
        ({"text": "t", "conversations": [HUMAN]}, "sharegpt", ("text",)),
        ({"instruction": "q", "text": "t"}, "text", ("instruction",)),
        ({"messages": None, "text": "t"}, "text", ("messages",)),
    ],
)
def test_the_first_of_several_layouts_counts_and_the_rest_is_told(row, name, others):
    found = detect_format([row])
    assert (found.name, found.other_fields) == (name, others)
    assert f"; not part of it: {', '.join(map(repr, others))}." in str(found)


def test_an_input_in_one_row_is_part_of_the_layout(write):
    rows = [ALPACA, {**ALPACA, "input": "i"}]
    found = detect_format(read_records(write(rows)))
    assert found.fields == ("instruction", "input", "output")
    assert str(found).startswith("train.jsonl has 2 rows of Alpaca")


def test_what_the_package_formats_is_known():
    assert detect_format(format_alpaca([ALPACA], "</s>")).has_messages is False
    assert detect_format(format_chat([ALPACA])).has_messages is True


def test_a_mixture_is_refused_with_the_first_row_of_each(write, refused):
    rows = [ALPACA, {"text": "t"}, ALPACA, {"messages": [USER]}, {"text": "t"}, {"text": "t"}]
    path = write("\n")
    path.write_text("\n" + write(rows, "other.jsonl").read_text())
    assert refused(detect_format, read_records(path)) == (
        "the rows are in 3 different layouts: got 2 rows of Alpaca instructions in 'instruction' "
        "and 'output', the first at train.jsonl:2; 3 rows of plain text in 'text', the first at "
        "train.jsonl:3; 1 row of OpenAI messages in 'messages' of 'role' and 'content', the first "
        "at train.jsonl:5; allowed: one layout for all rows. "
        "Put each layout into a file of its own, and convert them one by one."
    )


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [USER]}, {"conversations": [USER]}],
        [{"messages": [USER]}, {"messages": [HUMAN]}],
        [{"prompt": "q", "completion": "a"}, {"prompt": [USER], "completion": [ASSISTANT]}],
    ],
)
def test_near_layouts_do_not_pass_as_one(refused, rows):
    message = refused(detect_format, rows)
    assert message.startswith("the rows are in 2 different layouts")
    assert "the first at row 0;" in message and "the first at row 1;" in message


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"question": "q", "answer": "a"}, "has 'question', 'answer'"),
        ({}, "has no filled field"),
        ({"text": None}, "has no filled field"),
        ([1], "is a list, not an object"),
        ({"instruction": "q", "output": ["a"]}, "has 'output' as a list, not text"),
        ({"text": 3}, "has 'text' as a number, not text"),
        ({"messages": "[]"}, "has 'messages' as text, not a list of messages"),
        ({"messages": []}, "has 'messages' without a message"),
        ({"messages": [USER, {"speaker": "a"}]}, "has 'messages[1]' without 'role' and"),
        ({"messages": [USER, "a"]}, "has 'messages[1]' without 'role' and 'content'"),
        ({"messages": [USER, HUMAN]}, "has 'messages' of two layouts of message"),
        ({"messages": [{**USER, **HUMAN}]}, "has 'messages[0]' without 'role' and"),
        ({"messages": [USER], "conversations": [HUMAN]}, "has both 'conversations' and"),
        ({"prompt": "q", "completion": [ASSISTANT]}, "has 'prompt' as text and 'completion' as a"),
        ({"prompt": [], "completion": [ASSISTANT]}, "has 'prompt' without a message"),
        ({"prompt": [USER], "completion": [GPT]}, "has 'completion' of 'from' and 'value'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "has 'prompt', 'chosen', 'rejected'"),
    ],
)
def test_an_unknown_row_is_named_with_what_it_has(refused, row, fault):
    message = refused(detect_format, [ALPACA, row])
    assert message.startswith(f"1 of 2 rows is in no known layout: got row 1 {fault}")
    assert "allowed: 'instruction' and 'output'; 'conversations' or 'messages';" in message
    assert "to_sharegpt(rows, merged_prompt=" in message


def test_unknown_rows_have_file_and_line_and_the_rest_is_counted(write, refused):
    records = read_records(write([{"text": "t"}] + [{"q": "x"}] * 5))
    message = refused(detect_format, records)
    assert message.startswith("5 of 6 rows are in no known layout: got train.jsonl:2 has 'q'; ")
    assert "train.jsonl:4 has 'q'; and 2 more; allowed" in message


def test_no_row_is_refused(refused):
    assert refused(detect_format, []).startswith("there is no row: got 0 rows;")
    assert "Read the file first with read_records(path)" in refused(detect_format, "a.csv")
