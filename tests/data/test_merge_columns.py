from __future__ import annotations

import random
from collections import Counter

import pytest

from colab_qlora.data.conversations import standardize_sharegpt
from colab_qlora.data.merge_columns import to_sharegpt
from colab_qlora.data.records import Records, read_records

ROWS = [
    {"instruction": "q0", "input": "i0", "output": "a0"},
    {"instruction": "q1", "input": "", "output": "a1"},
    {"instruction": "q2", "input": None, "output": "a2"},
    {"instruction": "q3", "input": " \n", "output": "a3"},
]
TEMPLATE = "{instruction}[[\nYour input is:\n{input}]]"


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def prompt_of(template, **cells):
    row = {"answer": "x", **cells}
    return to_sharegpt([row], template, output_column_name="answer")[0]["conversations"][0]["value"]


@pytest.fixture(params=["list", "records", "dataset"])
def as_kind(request, write):
    """Turn a list of rows into each kind that may be passed."""

    def _as_kind(rows):
        if request.param == "dataset":
            return pytest.importorskip("datasets").Dataset.from_list(rows)
        return rows if request.param == "list" else read_records(write(rows))

    return _as_kind


def test_an_optional_part_goes_where_its_cell_is_blank(as_kind):
    found = to_sharegpt(as_kind(ROWS), merged_prompt=TEMPLATE)
    assert list(found) == [
        {"conversations": turns("q0\nYour input is:\ni0", "a0")},
        *({"conversations": turns(f"q{i}", f"a{i}")} for i in (1, 2, 3)),
    ]


def test_without_a_template_a_column_is_the_prompt(as_kind):
    rows = [{"q": "1 + 2?", "a": 3, "output": "other"}]
    found = to_sharegpt(as_kind(rows), merged_column_name="q", output_column_name="a")
    assert list(found) == [{"conversations": turns("1 + 2?", "3")}]


def test_other_columns_can_be_kept(as_kind):
    rows = [{"instruction": "q", "input": "i", "output": "a", "id": 7}]
    kept = to_sharegpt(as_kind(rows), TEMPLATE, "prompt", remove_unused_columns=False)
    merged = "q\nYour input is:\ni"
    assert list(kept) == [{**rows[0], "conversations": turns(merged, "a"), "prompt": merged}]
    kept = to_sharegpt(as_kind(rows), TEMPLATE, remove_unused_columns=False)
    assert list(kept) == [{**rows[0], "conversations": turns(merged, "a"), "instruction": merged}]
    kept = to_sharegpt(as_kind(rows), remove_unused_columns=False)
    assert list(kept) == [{**rows[0], "conversations": turns("q", "a")}]
    # nothing is written into a column that was not merged, not even its number as text
    kept = to_sharegpt(as_kind([{"instruction": 3, "output": "a"}]), remove_unused_columns=False)
    assert list(kept) == [{"instruction": 3, "output": "a", "conversations": turns("3", "a")}]


def test_the_kind_the_split_and_the_lines_stay(write):
    datasets = pytest.importorskip("datasets")
    records = to_sharegpt(read_records(write(ROWS))[2:])
    assert isinstance(records, Records) and records.where(0) == "train.jsonl:3"
    for remove in (True, False):
        dataset = datasets.Dataset.from_list(ROWS, split="train").select([2, 3])
        found = to_sharegpt(dataset, remove_unused_columns=remove)
        assert isinstance(found, datasets.Dataset)
        assert found.split == "train"
        assert [row["conversations"][0]["value"] for row in found] == ["q2", "q3"]


def test_columns_that_the_template_does_not_name_are_not_decoded():
    datasets = pytest.importorskip("datasets")
    columns = {"instruction": ["q"], "output": ["a"], "image": [b"not a picture"]}
    kinds = {"instruction": datasets.Value("string"), "output": datasets.Value("string")}
    pytest.importorskip("PIL")
    features = datasets.Features({**kinds, "image": datasets.Image()})
    dataset = datasets.Dataset.from_dict(columns, features=features)
    assert to_sharegpt(dataset)[0]["conversations"] == turns("q", "a")


def test_the_result_standardises(as_kind):
    found = standardize_sharegpt(to_sharegpt(as_kind(ROWS), TEMPLATE, conversation_extension=3))
    for row in found:
        assert [m["role"] for m in row["conversations"]] == ["user", "assistant"] * 3


@pytest.mark.parametrize("extension", [1, 2, 3, 7])
def test_joined_rows_are_met_equally_often_and_never_with_themselves(as_kind, extension):
    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(7)]
    found = to_sharegpt(as_kind(rows), conversation_extension=extension)
    assert len(found) == 7
    places = Counter()
    for index, row in enumerate(found):
        texts = [message["value"] for message in row["conversations"]]
        numbers = [int(text[1:]) for text in texts[::2]]
        assert row["conversations"] == turns(*(t for n in numbers for t in (f"q{n}", f"a{n}")))
        assert numbers[0] == index
        assert len(set(numbers)) == extension
        places.update(enumerate(numbers))
    assert places == {(place, n): 1 for place in range(extension) for n in range(7)}


def test_the_order_of_joining_is_fixed_for_a_seed_and_moves_with_it():
    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(20)]

    def joined(**options):
        return to_sharegpt(rows, conversation_extension=2, **options)

    assert joined() == joined(random_state=3407)
    assert len({str(joined(random_state=seed)) for seed in range(10)}) == 10
    # the ring drawn here a second time, so that a change of the draw does not pass unseen
    second = [row["conversations"][2]["value"] for row in joined()]
    ring = list(range(20))
    random.Random(3407).shuffle(ring)
    assert second == [f"q{ring[(ring.index(i) + 1) % 20]}" for i in range(20)]
    random.seed(1)
    state = random.getstate()
    joined()
    assert random.getstate() == state


def test_templates_with_braces_brackets_and_many_parts():
    assert prompt_of("{a}", a="x") == "x"
    assert prompt_of("{a}{a}", a="x") == "xx"
    assert prompt_of("{{{a}}}", a="x") == "{x}"
    assert prompt_of("[{a}] ] [", a="x") == "[x] ] ["
    assert prompt_of("{a}[[ [{b}] ]]!", a="x", b="y") == "x [y] !"
    assert prompt_of("{a}[[ {b}]][[ {c}]]", a="x", b="", c="z") == "x z"
    assert prompt_of("{a}[[ {b} {c}]]", a="x", b="y", c=None) == "x"
    assert prompt_of("[[{b}]][[{c}]]", b="", c="z") == "z"
    assert prompt_of("{my column} \u00e9", **{"my column": "x"}) == "x \u00e9"
    # a cell is not a template
    assert prompt_of("{a}[[{b}]]", a="{b}[[", b="{{") == "{b}[[{{"


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (0, "0"), (2.5, "2.5"), (False, "False"), (" x\n", " x\n"), ("0", "0")],
)
def test_numbers_are_written_and_zero_is_not_blank(value, text):
    assert prompt_of("a[[ {a}]]", a=value) == f"a {text}"


@pytest.mark.parametrize("value", [None, "", " \t\n", float("nan")])
def test_blank_cells(value, refused):
    assert prompt_of("a[[ {a}]]", a=value) == "a"
    message = refused(prompt_of, "a {a}", a=value)
    assert "got row 0: 'a' is blank but stands outside [[ ]];" in message
    assert "Put what may be blank into [[ ]]" in message


def test_faulty_cells_have_file_line_and_field(write, refused):
    rows = [
        {"q": "x", "h": "", "a": "y"},
        {"q": "", "h": "", "a": ""},
        {"q": ["x"], "h": {"b": 1}, "a": "y"},
        {"q": "x", "h": ""},
        {"q": "x", "h": "", "a": []},
    ]
    call = dict(merged_prompt="{q}[[{h}]]", output_column_name="a")
    records = read_records(write(rows))
    message = refused(to_sharegpt, records, **call)
    assert message.startswith(
        "4 of 5 rows cannot be merged: got train.jsonl:2: 'q' is blank but stands outside [[ ]]; "
        "train.jsonl:2: the answer in 'a' is blank, not text; "
        "train.jsonl:3: 'q' is a list, not text or a number; and 3 more; allowed"
    )
    message = refused(to_sharegpt, records[3:], **call)
    assert "train.jsonl:4: the answer in 'a' is blank" in message
    assert "train.jsonl:5: the answer in 'a' is a list" in message
    assert "row 1: a list, not an object;" in refused(to_sharegpt, [rows[0], [1]], **call)
    message = refused(to_sharegpt, rows[:1], "[[{h}]]", output_column_name="a")
    assert "row 0: the merged prompt is blank;" in message


@pytest.mark.parametrize(
    ("template", "got"),
    [
        ("{instruction}[[ {input}", "'[[' without ']]'"),
        ("{instruction} {input}]]", "']]' at character 22 without its partner"),
        ("[[{instruction}[[{input}]]]]", "'[[' at character 16 without its partner"),
        ("{instruction", "'{' at character 1 without its partner"),
        ("{instruction} }", "'}' at character 15 without its partner"),
        ("{instruction}[[ none ]]", "the optional part ' none ', which names no column"),
        ("no column", "'no column', which names no column"),
        ("{{instruction}}", "'{{instruction}}', which names no column"),
        (["{instruction}"], "a list (['{instruction}'])"),
    ],
)
def test_a_template_that_cannot_be_read(refused, template, got):
    message = refused(to_sharegpt, ROWS, template)
    assert message.startswith(f"merged_prompt cannot be read: got {got}; allowed: a template")


def test_a_column_that_is_not_there_is_named_with_a_near_one(refused):
    message = refused(to_sharegpt, ROWS, "{instrution}")
    assert "got {instrution}; allowed: {instruction}, {input}, {output}. " in message
    assert message.endswith("Write {instruction}.")
    assert refused(to_sharegpt, ROWS, "{zebra}").endswith("Name one of these columns.")
    message = refused(to_sharegpt, ROWS, output_column_name="answer")
    assert message.startswith("output_column_name names a column that is not there: got 'answer';")
    assert "allowed: 'instruction', 'input', 'output'." in message
    message = refused(to_sharegpt, ROWS, merged_column_name="prompt")
    assert message.startswith("merged_column_name names a column that is not there: got 'prompt';")
    assert "or a template as merged_prompt" in message


@pytest.mark.parametrize("extension", [0, -1, 5, 1.0, "2", True, None])
def test_an_extension_out_of_range(refused, extension):
    message = refused(to_sharegpt, ROWS, conversation_extension=extension)
    assert f"got {extension!r}; allowed: an integer from 1 to 4, the number of rows." in message


def test_conversations_and_no_rows_are_refused(refused):
    message = refused(to_sharegpt, [{"conversations": turns("q", "a")}])
    assert "got the field 'conversations';" in message
    assert message.endswith("Call standardize_sharegpt(dataset) instead.")
    assert refused(to_sharegpt, []).startswith("there is no row")
