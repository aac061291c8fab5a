from __future__ import annotations

import json
from pathlib import Path

import pytest

from colab_qlora.data.alpaca import (
    PROMPT_WITH_INPUT,
    PROMPT_WITHOUT_INPUT,
    alpaca_prompt,
    format_alpaca,
    format_chat,
    to_text,
    validate_alpaca,
)
from colab_qlora.data.records import read_records

EOS = "</s>"
GOOD = {"instruction": "Name the capital.", "input": "France", "output": "Paris"}
BARE = {"instruction": "Say hello.", "output": "Hello."}
SAMPLES = Path(__file__).resolve().parents[2] / "data_samples"


def test_prompts_are_those_of_alpaca_to_the_letter():
    assert alpaca_prompt("Name the capital.", "France") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName the capital.\n\n### Input:\nFrance\n\n### Response:\n"
    )
    assert alpaca_prompt("Say hello.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay hello.\n\n### Response:\n"
    )
    for prompt in (PROMPT_WITH_INPUT, PROMPT_WITHOUT_INPUT):
        assert prompt.endswith("### Response:\n")


@pytest.mark.parametrize("blank", [{}, {"input": None}, {"input": ""}, {"input": " \n\t"}])
def test_a_blank_input_gives_the_prompt_without_input(blank):
    (example,) = format_alpaca([{**BARE, **blank}], EOS)
    assert example == {"prompt": alpaca_prompt("Say hello."), "completion": "Hello.</s>"}
    (chat,) = format_chat([{**BARE, **blank}])
    assert chat["prompt"] == [{"role": "user", "content": "Say hello."}]


@pytest.mark.parametrize(
    "text", ["{input} {0} {{}}", "### Response:\n", "a\r\nb\u2028", "\U0001f600", " padded ", "%s"]
)
def test_texts_pass_through_unchanged(text):
    row = {"instruction": text, "input": text, "output": text}
    (example,) = format_alpaca([row], EOS)
    head, middle = PROMPT_WITH_INPUT.split("{instruction}")
    middle, tail = middle.split("{input}")
    assert example["prompt"] == head + text + middle + text + tail
    assert example["completion"] == text + EOS
    (chat,) = format_chat([row])
    assert chat["prompt"][0]["content"] == f"{text}\n\n{text}"
    assert chat["completion"] == [{"role": "assistant", "content": text}]


def test_eos_stands_behind_the_completion_once():
    for output in ("Paris", "Paris" + EOS):
        (example,) = format_alpaca([{**GOOD, "output": output}], EOS)
        assert example["completion"] == "Paris</s>"
        assert EOS not in example["prompt"]


@pytest.mark.parametrize("eos", [None, "", 2])
def test_a_missing_eos_is_refused(refused, eos):
    message = refused(format_alpaca, [GOOD], eos)
    assert "a model that never sees its end token never stops" in message
    assert f"got {eos!r};" in message
    assert "Pass eos_token=tokenizer.eos_token" in message


def test_the_rows_are_not_changed():
    row = dict(GOOD)
    format_alpaca([row], EOS)
    format_chat([row])
    assert row == GOOD


FAULTS = [
    ({"instruction": "x"}, "'output' is missing (has 'instruction')"),
    ({"instruction": "x", "response": "y"}, "'output' is missing (has 'instruction', 'response')"),
    ({**GOOD, "instruction": ""}, "'instruction' is empty"),
    ({**GOOD, "output": " \n\t"}, r"'output' is only white space (' \n\t')"),
    ({**GOOD, "output": 42}, "'output' is a number (42), not text"),
    ({**GOOD, "output": None}, "'output' is null (None), not text"),
    ({**GOOD, "output": ["a"]}, "'output' is a list (['a']), not text"),
    ({**GOOD, "instruction": True}, "'instruction' is true or false (True), not text"),
    ({**GOOD, "input": 3}, "'input' is a number (3), not text"),
]


@pytest.mark.parametrize(("row", "fault"), FAULTS, ids=[fault for _, fault in FAULTS])
@pytest.mark.parametrize(
    "check", [validate_alpaca, format_chat, lambda rows: format_alpaca(rows, EOS)]
)
def test_every_fault_names_file_line_field_and_value(write, refused, row, fault, check):
    message = refused(check, read_records(write([GOOD, GOOD, row])))
    assert message.startswith(f"1 of 3 rows cannot be used: got train.jsonl:3: {fault}; allowed:")
    assert message.endswith("Mend or delete each row named here.")


def test_plain_lists_are_named_by_row(refused):
    message = refused(validate_alpaca, [GOOD, ["x"], GOOD])
    assert "got row 1: a list, not an object;" in message
    assert "row 0: 'output' is missing (has no field)" in refused(validate_alpaca, [{}])


@pytest.mark.parametrize("bad", [1, 2, 3, 4, 50])
def test_the_first_three_faults_are_named_and_the_rest_counted(write, refused, bad):
    rows = [GOOD] + [{**GOOD, "output": ""}] * bad + [GOOD]
    message = refused(validate_alpaca, read_records(write(rows)))
    assert message.startswith(f"{bad} of {bad + 2} rows")
    assert message.count("train.jsonl:") == min(bad, 3)
    assert (f"; and {bad - 3} more;" in message) == (bad > 3)


def test_a_row_with_two_faults_counts_once(refused):
    message = refused(validate_alpaca, [GOOD, {"instruction": "", "output": ""}])
    assert message.startswith("1 of 2 rows")
    assert "row 1: 'instruction' is empty; row 1: 'output' is empty" in message


def test_long_values_are_shortened(refused):
    message = refused(validate_alpaca, [{**GOOD, "output": ["x" * 10_000]}])
    assert len(message) < 400


def test_other_fields_can_be_asked_for(refused):
    rows = [{"question": "q", "answer": " "}]
    message = refused(validate_alpaca, rows, fields=("question", "answer"))
    assert "row 0: 'answer' is only white space" in message
    assert "not blank in 'question' and 'answer'" in message
    validate_alpaca([{"question": "q", "answer": "a"}], fields=("question", "answer"))


def test_no_rows_are_refused(refused):
    for check in (validate_alpaca, format_chat):
        assert "there is no row to format: got 0 rows" in refused(check, [])


def test_the_broken_sample_holds_one_of_each_fault(write, refused):
    lines = (SAMPLES / "broken.jsonl").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 9
    # the two unreadable lines are blanked, so that the others keep their numbers
    readable = "\n".join("" if number in (2, 7) else t for number, t in enumerate(lines, 1))
    records = read_records(write(readable, "broken.jsonl"))
    assert records.lines == (1, 3, 4, 5, 6, 8)
    expected = {
        3: "'output' is missing (has 'instruction', 'input')",
        4: "'instruction' is empty",
        5: r"'output' is only white space ('  \n')",
        6: "'output' is a number (7), not text",
    }
    message = refused(validate_alpaca, records)
    assert message.startswith("4 of 6 rows cannot be used: got ")
    named = "; ".join(f"broken.jsonl:{n}: {expected[n]}" for n in (3, 4, 5))
    assert f"got {named}; and 1 more;" in message
    for index, line in enumerate(records.lines):
        if line in expected:
            one = refused(validate_alpaca, records[index : index + 1])
            assert f"got broken.jsonl:{line}: {expected[line]};" in one
        else:
            validate_alpaca(records[index : index + 1])


def test_to_text_joins_prompt_and_completion():
    examples = format_alpaca([GOOD, BARE], EOS)
    assert to_text(examples) == [{"text": e["prompt"] + e["completion"]} for e in examples]
    json.dumps(to_text(examples))


def test_to_text_lays_out_chats_by_the_template(tokenizer):
    assert to_text(format_chat([GOOD]), tokenizer) == [
        {
            "text": "<|im_start|>user\nName the capital.\n\nFrance<|im_end|>\n"
            "<|im_start|>assistant\nParis<|im_end|>\n"
        }
    ]


def test_to_text_of_chats_needs_a_chat_template(refused):
    chats = format_chat([GOOD])
    assert "got no tokenizer;" in refused(to_text, chats)

    class Bare:
        chat_template = None

    assert "whose chat_template is None" in refused(to_text, chats, Bare())
