"""Messages given straight to the trainer: images, tools and missing text are named, not dropped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("datasets")
pytest.importorskip("trl")

from datasets import Dataset, DatasetDict  # noqa: E402

from colab_qlora.data.records import Records  # noqa: E402
from colab_qlora.errors import UserError  # noqa: E402
from colab_qlora.training.message_checks import checked_messages  # noqa: E402

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TURN = [ASK, ANSWER]
IMAGE = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
CALL = [{"type": "function", "function": {"name": "now", "arguments": "{}"}}]
PARTS = "allowed: text, or a list of parts of type 'text'. Delete these rows, or keep"
TOOLS = "allowed: messages of system, user and assistant. Delete these rows, or write the tool's"
SEEN = {"role": "user", "content": IMAGE}
# the second row of two, and what is said of it
FAULTS = {
    "image": (
        {"messages": [SEEN, ANSWER]},
        f"row 1: 'messages[0].content[0]' is of type 'image'; {PARTS}",
    ),
    "image with a text": (
        {"messages": [{**ASK, "content": [{"type": "image", "text": "", "image": "a.png"}]}]},
        f"row 1: 'messages[0].content[0]' is of type 'image'; {PARTS}",
    ),
    "both layouts": (
        {"messages": [ASK, {"role": "assistant", "from": "gpt", "content": None, "value": "Hi"}]},
        "row 1: 'messages[1].content' is missing; allowed: text in every message. Fill or",
    ),
    "call": (
        {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": CALL}]},
        f"row 1: 'messages[1].tool_calls' is a tool's; {TOOLS}",
    ),
    "call beside text": (
        {"messages": [ASK, {**ANSWER, "tool_calls": CALL}]},
        f"row 1: 'messages[1].tool_calls' is a tool's; {TOOLS}",
    ),
    "tool": (
        {"messages": [*TURN, {"role": "tool", "content": "12:00"}]},
        f"row 1: 'messages[2].role' is 'tool'; {TOOLS}",
    ),
    "no text": (
        {"messages": [ASK, {"role": "assistant", "content": None}]},
        "row 1: 'messages[1].content' is missing; allowed: text in every message. Fill or",
    ),
    "weight": (
        {"messages": [ASK, {**ANSWER, "weight": 0}]},
        "row 1: 'messages[1].weight' is 0, which would be ignored; allowed: assistant messages",
    ),
    "tools": (
        {"messages": TURN, "tools": CALL},
        "row 1: 'tools' describes tools; allowed: rows without tools. Delete the field 'tools'",
    ),
}
FIRST = {
    "messages": {"messages": TURN},
    "prompt": {"prompt": [ASK], "completion": [ANSWER]},
    "conversations": {"conversations": TURN},
}


def checked(rows: Any, kind: str = "train", *, tokenizer: Any = None, laid_out: bool = True) -> Any:
    return checked_messages(rows, kind, tokenizer, "text", is_laid_out=laid_out)


def two_kinds(rows: list[dict[str, Any]]) -> list[Any]:
    """The rows as a list, and as a table if Arrow can hold them."""
    try:
        return [rows, Dataset.from_list(rows)]
    except ValueError:
        return [rows]


@pytest.mark.parametrize("name", FAULTS)
def test_what_would_be_dropped_is_named_with_its_row(name: str) -> None:
    bad, message = FAULTS[name]
    # a table has the columns of its first row alone
    for rows in two_kinds([{**dict.fromkeys(bad), **FIRST["messages"]}, bad]):
        with pytest.raises(UserError) as caught:
            checked(rows)
        expected = f"1 of 2 train rows cannot be used: got {message}"
        assert str(caught.value).startswith(expected), str(caught.value)


@pytest.mark.parametrize(
    ("bad", "place"),
    [
        ({"prompt": [SEEN], "completion": [ANSWER]}, "prompt[0].content[0]' is of type 'image'"),
        (
            {"prompt": [ASK], "completion": [{**ANSWER, "tool_calls": CALL}]},
            "completion[0].tool_calls' is a tool's",
        ),
        (
            {"prompt": [ASK, {"role": "tool", "content": "1"}], "completion": [ANSWER]},
            "prompt[1].role' is 'tool'",
        ),
        ({"conversations": [SEEN, ANSWER]}, "conversations[0].content[0]' is of type 'image'"),
        (
            {"conversations": [{"from": "human", "value": IMAGE}, {"from": "gpt", "value": "Hi"}]},
            "conversations[0].value[0]' is of type 'image'",
        ),
    ],
)
def test_each_field_of_messages_is_looked_at(bad: dict[str, Any], place: str) -> None:
    first = FIRST["prompt" if "prompt" in bad else "conversations"]
    for rows in two_kinds([first, bad]):
        with pytest.raises(UserError) as caught:
            checked({"a": rows}, "eval")
        assert f"1 of 2 eval rows cannot be used: got row 1: '{place}" in str(caught.value)


def test_a_row_of_a_file_is_named_by_its_line() -> None:
    rows = Records((FIRST["messages"], FAULTS["image"][0]), "train.jsonl", (1, 7))
    with pytest.raises(UserError, match=r"got train\.jsonl:7: 'messages\[0\]"):
        checked(rows)


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("laid_out", [True, False])
def test_columns_of_images(column: str, laid_out: bool) -> None:
    filled, none = (["a.png"], []) if column == "images" else ("a.png", None)
    for rows in two_kinds([{"messages": TURN, column: none}, {"text": "x", column: filled}]):
        with pytest.raises(UserError) as caught:
            checked(rows, laid_out=laid_out)
        assert str(caught.value) == (
            f"the train rows have images in '{column}', and this model reads text alone: got row "
            "1; allowed: rows of text. Delete the rows that need their images, then the field "
            f"'{column}' of all."
        )


@pytest.mark.parametrize(
    "row",
    [
        # the template's to judge: order, names, empty texts
        {"messages": [ASK, ASK, ANSWER]},
        {"messages": [ANSWER]},
        {"messages": [{"role": "critic", "content": ""}]},
        {"messages": [{"role": "user", "content": "Hi", "tool_calls": None}], "tools": None},
        {"messages": TURN, "tools": "[]"},
        {"text": "x", "tools": CALL},
        {"prompt": "x", "completion": "y", "messages": [SEEN]},
        {"text": "x", "conversations": [SEEN]},
        {"input_ids": [1], "messages": [SEEN]},
        {"messages": "odd"},
        {"messages": None},
    ],
)
def test_everything_else_is_left_as_it_is(row: dict[str, Any]) -> None:
    for rows in two_kinds([row]):
        assert checked(rows) is rows


def test_rows_that_are_not_laid_out_and_those_of_a_processor_are_left_alone() -> None:
    rows = [FAULTS["image"][0]]
    assert checked(rows, laid_out=False) is rows
    assert checked(rows, tokenizer=SimpleNamespace(image_processor=None)) is rows
    stream = Dataset.from_list([{"text": "x"}]).to_iterable_dataset()
    assert checked(stream) is stream and checked(None) is None and checked([]) == []


def test_parts_of_text_become_one_text() -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    joined = [{"role": "user", "content": "Hi there"}, ANSWER]
    for field, layout in (("messages", ("role", "content")), ("conversations", ("from", "value"))):
        role, text = layout
        rows: list[dict[str, Any]] = [{field: [{role: "user", text: parts}], "id": 3}]
        for given in two_kinds(rows):
            found = list(checked(given))
            assert found == [{field: [{role: "user", text: "Hi there"}], "id": 3}]
    # beside a plain text, which no table can hold
    assert checked([{"messages": [{"role": "user", "content": parts}, ANSWER]}]) == [
        {"messages": joined}
    ]


def test_of_two_layouts_the_one_is_read_that_trl_reads() -> None:
    both = {"role": "user", "from": "human", "content": "Hi", "value": IMAGE}
    rows = [{"messages": [both, ANSWER]}]
    assert checked(rows) == rows
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert checked([{"messages": [{**both, "content": parts}, ANSWER]}]) == rows


def test_several_sets_to_train_on_are_left_to_the_trainer() -> None:
    for rows in (DatasetDict(train=Dataset.from_list([{"messages": [SEEN]}])), {"a": [{"x": 1}]}):
        assert checked(rows) is rows


@pytest.mark.model
def test_a_trainer_names_several_sets_as_what_they_are(make_trainer: Any) -> None:
    # with faults, which are not what is to be mended first
    sets = DatasetDict(train=Dataset.from_list([{"messages": [SEEN]}]))
    with pytest.raises(UserError, match="train_dataset is not a dataset: got DatasetDict; allowed"):
        make_trainer(rows=sets)


@pytest.mark.model
@pytest.mark.parametrize("packing", [False, True])
def test_a_trainer_refuses_what_it_would_misread(make_trainer: Any, packing: bool) -> None:
    for name, (bad, message) in FAULTS.items():
        # wrapped packing checks no lengths, so nothing else looks at the rows there
        options = {"packing": True, "packing_strategy": "wrapped"} if packing else {}
        with pytest.raises(UserError) as caught:
            make_trainer(rows=[FIRST["messages"], bad], **options)
        assert message in str(caught.value), name
    with pytest.raises(UserError, match=r"have images in 'images'.*got row 0; allowed"):
        make_trainer(rows=[{**FIRST["messages"], "images": ["a.png"]}])
    with pytest.raises(UserError, match="1 of 2 eval rows cannot be used"):
        make_trainer(eval_rows=[FIRST["messages"], FAULTS["image"][0]])


@pytest.mark.model
def test_a_trainer_takes_parts_of_text(make_trainer: Any) -> None:
    parts = [{"type": "text", "text": "Hi"}]
    rows = [{"messages": [{"role": "user", "content": parts}, ANSWER]}] * 2
    found, plain = make_trainer(rows=rows), make_trainer(rows=[FIRST["messages"]] * 2)
    assert found.train_dataset["input_ids"] == plain.train_dataset["input_ids"]


@pytest.mark.model
def test_what_a_template_refuses_is_told_with_its_row(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer
    from colab_qlora.data.chat_templates import get_chat_template

    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, "float32")
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    rows = [FIRST["messages"], {"messages": [ASK, ASK, ANSWER]}]

    def trainer(name: str) -> Any:
        return SFTTrainer(
            model=model,
            args=SFTConfig(str(tmp_path / "out"), max_steps=1),
            train_dataset=rows,
            processing_class=get_chat_template(tokenizer, name),
        )

    # two messages of one speaker: one format has a place for them, the other has not
    assert len(trainer("chatml").train_dataset) == 2
    with pytest.raises(UserError, match="^row 1 does not fit the chat template: got "):
        trainer("gemma")
