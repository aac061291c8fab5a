from __future__ import annotations

import json

import pytest

from colab_qlora.data.conversations import standardize_data_formats, standardize_sharegpt
from colab_qlora.data.formats import detect_format
from colab_qlora.data.messages import ASSISTANT_NAMES, SYSTEM_NAMES, USER_NAMES
from colab_qlora.data.records import Records, read_records

SYSTEM = {"role": "system", "content": "Be brief."}
USER, ASSISTANT = {"role": "user", "content": "q \u00e9"}, {"role": "assistant", "content": "a\n"}


def as_sharegpt(messages):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


CHATS = [
    [USER, ASSISTANT],
    [SYSTEM, USER, ASSISTANT],
    [USER, ASSISTANT, USER, ASSISTANT, USER],
    [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
]


@pytest.fixture(params=["list", "records", "dataset", "batches"])
def convert(request, write):
    """Convert rows as each kind that may be passed; return what came out."""
    kind = request.param

    def _convert(rows, **options):
        if kind == "list":
            return standardize_sharegpt(rows, **options)
        if kind == "records":
            return standardize_sharegpt(read_records(write(rows)), **options)
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        more = {"batch_size": 1} if kind == "batches" else {}
        return standardize_sharegpt(datasets.Dataset.from_list(rows), **more, **options)

    return _convert


def test_both_layouts_in_both_fields_become_the_same_messages(convert):
    for field in ("conversations", "messages"):
        for layout in (list, as_sharegpt):
            rows = [{field: layout(chat), "id": i} for i, chat in enumerate(CHATS)]
            before = json.dumps(rows)
            found = convert(rows)
            assert list(found) == [{"id": i, "conversations": c} for i, c in enumerate(CHATS)]
            assert json.dumps(rows) == before


def test_two_processes_give_the_same_rows_and_faults(refused):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"messages": chat} for chat in CHATS]
    found = standardize_sharegpt(datasets.Dataset.from_list(rows), num_proc=2)
    assert [row["conversations"] for row in found] == CHATS
    rows += [{"messages": [ASSISTANT]}]
    message = refused(standardize_sharegpt, datasets.Dataset.from_list(rows), num_proc=2)
    assert message.startswith("1 of 5 conversations cannot be used: got row 4: 'messages[0]' is")


def test_the_kind_of_the_rows_stays(write):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": chat, "id": 7} for chat in CHATS]
    records = standardize_sharegpt(read_records(write([{"messages": CHATS[0]}] * 2))[1:])
    assert isinstance(records, Records) and records.where(0) == "train.jsonl:2"
    assert type(standardize_sharegpt(rows)) is list
    dataset = standardize_sharegpt(datasets.Dataset.from_list(rows, split="train"))
    assert isinstance(dataset, datasets.Dataset)
    assert dataset.split == "train"
    assert dataset.column_names == ["id", "conversations"]


def test_the_newer_name_and_the_result_itself_go_through(convert):
    assert standardize_data_formats is standardize_sharegpt
    once = convert([{"conversations": as_sharegpt(CHATS[1])}])
    assert list(standardize_data_formats(once)) == list(once)
    assert detect_format(once).name == "messages"


def test_every_alias_is_known_in_any_case(convert):
    for name in (str.lower, str.upper, str.title):
        rows = [
            {
                "conversations": [
                    {"from": name(system), "value": "s"},
                    {"from": name(user), "value": "u"},
                    {"from": name(assistant), "value": "a"},
                ]
            }
            for system in SYSTEM_NAMES
            for user in USER_NAMES
            for assistant in ASSISTANT_NAMES
        ]
        roles = {tuple(m["role"] for m in row["conversations"]) for row in convert(rows)}
        assert roles == {("system", "user", "assistant")}


def test_aliases_can_be_named_as_tutorials_do(convert):
    rows = [{"conversations": [{"from": "x", "value": "u"}, {"from": "y", "value": "a"}]}]
    found = convert(
        rows,
        tokenizer=None,
        aliases_for_system=["system"],
        aliases_for_user=["user", "human", "X"],
        aliases_for_assistant=["gpt", "y"],
    )
    assert [m["role"] for m in found[0]["conversations"]] == ["user", "assistant"]


def test_the_order_of_positional_arguments():
    rows = [{"conversations": [{"from": "x", "value": "u"}, {"from": "y", "value": "a"}]}]
    found = standardize_sharegpt(rows, None, ["z"], ["x"], ["y"], 10, 1)
    assert [m["role"] for m in found[0]["conversations"]] == ["user", "assistant"]


def test_text_parts_become_one_text(convert):
    # one kind of part need not be named
    parts = [{"type": "text", "text": "one "}, {"type": None, "text": "two"}]
    rows = [{"messages": [{"role": "user", "content": parts}, {**ASSISTANT, "content": parts[:1]}]}]
    assert [m["content"] for m in convert(rows)[0]["conversations"]] == ["one two", "one "]


def test_only_role_and_content_are_kept_and_null_fields_are_no_tools(convert):
    more = {"tool_calls": None, "from": None, "name": "Ann", "weight": 1}
    rows = [{"messages": [{**USER, "weight": 0}, {**ASSISTANT, **more}]}, {"messages": CHATS[1]}]
    assert [row["conversations"] for row in convert(rows)] == [CHATS[0], CHATS[1]]


GOOD = as_sharegpt(CHATS[0])
HUMAN, GPT = GOOD
FIRST_SYSTEM = as_sharegpt([SYSTEM])[0]

# messages, fault, remedy
BAD = [
    ([], "'conversations' has no message", "Fill or delete"),
    (None, "'conversations' is missing", "Write these rows again"),
    ([GPT, HUMAN], "'conversations[0]' is the assistant's where the user's is due", "Join"),
    ([HUMAN, GPT, GPT], "'conversations[2]' is the assistant's where the user's is due", "Join"),
    ([HUMAN, HUMAN], "'conversations[1]' is the user's where the assistant's is due", "Join"),
    ([FIRST_SYSTEM] * 2, "'conversations[1]' is the system's where the user's is due", "Join"),
    ([HUMAN, FIRST_SYSTEM], "'conversations[1]' is the system's where the assistant's is", "Join"),
    ([HUMAN], "'conversations' has no message of the assistant to learn from", "Join"),
    ([FIRST_SYSTEM], "'conversations' has no message of the assistant to learn from", "Join"),
    ([HUMAN, {**GPT, "value": ""}], "'conversations[1].value' is empty", "Fill or delete"),
    ([HUMAN, {**GPT, "value": " \n"}], "'conversations[1].value' is only white", "Fill or delete"),
    ([HUMAN, {**GPT, "value": None}], "'conversations[1].value' is missing", "Fill or delete"),
    ([{**FIRST_SYSTEM, "value": ""}, HUMAN, GPT], "'conversations[0].value' is empty", "system"),
    ([{**HUMAN, "from": "critic"}, GPT], "'conversations[0].from' is 'critic', none of", "aliases"),
    ([HUMAN, {**GPT, "from": "Tool"}, GPT], "'conversations[1].from' is 'Tool'", "the tool's call"),
    ([{"from": None, "value": "x"}], "'conversations[0]' has 'value'", "Write these rows again"),
    (
        [HUMAN, {**GPT, "weight": 0}],
        "'conversations[1].weight' is 0, which would be ignored",
        "delete their 'weight'",
    ),
]


@pytest.mark.parametrize(("messages", "fault", "do"), BAD)
def test_a_bad_conversation_is_refused_in_every_kind_of_rows(
    convert, refused, request, messages, fault, do
):
    place = "train.jsonl:3" if "records" in request.node.callspec.id else "row 2"
    rows = [{"conversations": m} for m in (GOOD, GOOD, messages)]
    message = refused(convert, rows)
    assert message.startswith(f"1 of 3 conversations cannot be used: got {place}: {fault}")
    assert do in message.rpartition("; allowed: ")[2]


@pytest.mark.parametrize(
    ("message", "fault", "do"),
    [
        ({**ASSISTANT, "tool_calls": [{"id": "1"}]}, "[1].tool_calls' is a tool's", "the tool's"),
        ({"role": "tool", "content": "4", "tool_call_id": "1"}, "[1].tool_call_id' is", "tool's"),
        ({"role": "function", "content": "4"}, "[1].role' is 'function';", "the tool's call"),
        (
            {**ASSISTANT, "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            "[1].content[1]' is of type 'image_url'",
            "keep the text parts only",
        ),
        (
            {**ASSISTANT, "content": [{"type": "image", "text": "", "image": "a.png"}]},
            "[1].content[0]' is of type 'image'",
            "keep the text parts only",
        ),
        ({**ASSISTANT, "content": ["a"]}, "[1].content[0]' is text", "keep the text parts only"),
        ({**ASSISTANT, "content": {"a": 1}}, "[1].content' is an object ({'a': 1})", "text parts"),
        ({**ASSISTANT, "content": 3}, "[1].content' is a number (3)", "keep the text parts only"),
        ({**ASSISTANT, "content": []}, "[1].content' is empty", "Fill or delete"),
        ({"role": 3, "content": "a"}, "[1].role' is 3, none of system, developer, user", "aliases"),
        ("a", "[1]' is text, not an object", "Write these rows again"),
        ({"speaker": "a", "says": "b"}, "[1]' has 'speaker', 'says'", "Write these rows again"),
        ({**ASSISTANT, **GPT}, "[1]' has 'role', 'content', 'from', 'value'", "Write these rows"),
    ],
)
def test_a_bad_message_is_named_by_its_field(refused, message, fault, do):
    error = refused(standardize_sharegpt, [{"messages": [USER, message]}])
    assert f"got row 0: 'messages{fault}" in error
    assert do in error.rpartition("; allowed: ")[2]


def test_an_image_in_a_data_set_is_refused(refused):
    datasets = pytest.importorskip("datasets")
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]
    answer = [{"type": "text", "text": "A cat."}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    message = refused(standardize_sharegpt, datasets.Dataset.from_list([{"messages": chat}]))
    assert "got row 0: 'messages[0].content[0]' is of type 'image';" in message


def test_a_row_that_is_no_object_or_lacks_the_field_is_named(refused):
    message = refused(standardize_sharegpt, [{"messages": CHATS[0]}, [1], {"text": "t"}])
    assert message.startswith(
        "2 of 3 conversations cannot be used: got row 1: a list, not an object; "
        "row 2: 'messages' is missing;"
    )


def test_faults_of_several_kinds_are_counted_by_row(write, refused):
    blank = [{**HUMAN, "value": ""}, {**GPT, "value": ""}]
    rows = [{"conversations": chat} for chat in (GOOD, blank, [GPT], blank)]
    message = refused(standardize_sharegpt, read_records(write(rows)))
    assert message.startswith(
        "3 of 4 conversations cannot be used: got train.jsonl:2: 'conversations[0].value' is "
        "empty; train.jsonl:2: 'conversations[1].value' is empty; train.jsonl:3: 'conversations[0]'"
    )
    assert "; and 2 more; allowed: text in every message. " in message
    assert message.endswith("; then mend what is left.")


def test_a_first_batch_of_faults_does_not_hide_the_later_ones(refused):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"conversations": chat} for chat in ([], [], GOOD, [GPT])]
    message = refused(standardize_sharegpt, datasets.Dataset.from_list(rows), batch_size=1)
    assert message.startswith("3 of 4 conversations cannot be used: got row 0: ")
    assert "; row 3: 'conversations[0]' is the assistant's" in message


def test_conversations_as_text_are_refused_in_a_data_set(refused):
    datasets = pytest.importorskip("datasets")
    rows = [{"conversations": json.dumps(GOOD)}]
    message = refused(standardize_sharegpt, datasets.Dataset.from_list(rows))
    assert "row 0: 'conversations' is text, not a list of messages;" in message


def test_both_fields_at_once_are_refused(refused):
    message = refused(standardize_sharegpt, [{"messages": CHATS[0], "conversations": GOOD}])
    assert "got both 'conversations' and 'messages'; allowed: one of the two." in message


@pytest.mark.parametrize(
    ("row", "do"),
    [
        ({"instruction": "q", "output": "a"}, "Call to_sharegpt(dataset, merged_prompt='') first."),
        (
            {"instruction": "q", "input": "", "output": "a"},
            "Call to_sharegpt(dataset, merged_prompt='{instruction}[[\\n\\n{input}]]') first.",
        ),
        ({"text": "t"}, "Train on these rows as they are."),
    ],
)
def test_another_layout_is_named_with_its_way_on(refused, row, do):
    message = refused(standardize_sharegpt, [row])
    assert "got The data set has 1 row of " in message
    assert message.endswith(do)


def test_unknown_rows_none_at_all_and_wrong_aliases_are_refused(refused):
    assert "is in no known layout: got row 0 has 'q'" in refused(standardize_sharegpt, [{"q": "x"}])
    assert refused(standardize_sharegpt, []).startswith("there is no row")
    rows = [{"messages": CHATS[0]}]
    message = refused(standardize_sharegpt, rows, aliases_for_user="human")
    assert "aliases_for_user is not a list of names: got 'human';" in message
    message = refused(standardize_sharegpt, rows, aliases_for_user=["human", 3])
    assert "aliases_for_user is not a list of names: got ['human', 3];" in message
    message = refused(standardize_sharegpt, rows, aliases_for_user=["Bot"])
    assert "got 'bot' for user and for assistant;" in message
