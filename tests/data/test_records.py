from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from colab_qlora.data.records import Records, read_records, where

ROWS = [
    {"instruction": "a", "input": "", "output": "b"},
    {"instruction": "caf\u00e9 \u2028 \U0001f600", "output": "line\nbreak"},
    {"instruction": "c", "output": "d"},
]
SAMPLES = Path(__file__).resolve().parents[2] / "data_samples"


def as_lines(rows=ROWS, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "TRAIN.JSONL"])
def test_json_lines_read_the_same_in_every_encoding(write, bom, end, name):
    records = read_records(write(bom + as_lines(end=end).encode(), name))
    assert list(records) == ROWS
    assert records.lines == (1, 2, 3)
    assert records.where(1) == f"{name}:2"


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_a_json_list_knows_the_line_of_each_element(write, indent, bom):
    text = json.dumps(ROWS, indent=indent, ensure_ascii=False)
    records = read_records(write(bom + text.encode(), "train.json"))
    assert list(records) == ROWS
    starts = [1, 1, 1] if indent is None else [2, 7, 11]
    assert list(records.lines) == starts
    if indent:
        assert all(text.split("\n")[line - 1] == "  {" for line in records.lines)


def test_element_lines_survive_brackets_and_commas_inside_texts(write):
    rows = [{"a": '],[ {\\"'}, {"b": [1, [2]]}, {"c": {}}]
    text = "\n[\n\n" + ",\n\n".join(json.dumps(row) for row in rows) + "\n]\n"
    assert read_records(write(text, "x.json")).lines == (4, 6, 8)


def test_blank_lines_are_skipped_and_counted(write):
    records = read_records(write("\n  \t\n" + as_lines(ROWS[:1]) + "\r\n\n" + as_lines(ROWS[1:])))
    assert list(records) == ROWS
    assert records.lines == (3, 6, 7)


def test_any_layout_gives_the_same_rows_and_true_lines(write):
    generator = random.Random(0)
    for _ in range(40):
        lines, expected = [], []
        for number in range(generator.randint(1, 12)):
            lines += [""] * generator.randint(0, 2)
            row = {"n": number, "text": generator.choice(["a\nb", "\u2028", "\x85", "", "{}"])}
            lines.append(json.dumps(row, ensure_ascii=generator.random() < 0.5))
            expected.append((len(lines), row))
        records = read_records(write(generator.choice(["\n", "\r\n"]).join(lines)))
        assert list(zip(records.lines, records, strict=True)) == expected


def test_records_behave_as_a_read_only_sequence_that_keeps_lines():
    records = Records(tuple(ROWS), "t.jsonl", (1, 4, 9))
    assert len(records) == 3
    assert records[0] is ROWS[0]
    assert records[-1] is ROWS[2]
    assert records[1:].lines == (4, 9)
    assert records[::-1].where(0) == "t.jsonl:9"
    assert records.select([2, 0]).lines == (9, 1)
    assert ROWS[2] in records
    assert repr(records) == "Records(3 rows from t.jsonl)"
    with pytest.raises(TypeError):
        random.Random(0).shuffle(records)
    assert where(records, 1) == "t.jsonl:4"
    assert where(list(records), 1) == "row 1"


def test_missing_file_names_path_directory_and_like_names(write, refused, tmp_path, monkeypatch):
    write(ROWS, "alpaca_train.jsonl")
    write("x", "notes.txt")
    monkeypatch.chdir(tmp_path)
    message = refused(read_records, "alpaca_trian.jsonl")
    assert str(tmp_path / "alpaca_trian.jsonl") in message
    assert f"working directory {tmp_path};" in message
    assert f"{tmp_path} has alpaca_train.jsonl)" in message
    assert "notes.txt" not in message
    assert "Correct the path, or upload the file first." in message


def test_missing_file_lists_data_files_where_no_name_is_close(write, refused, tmp_path):
    for i in range(5):
        write(ROWS, f"{i}{i}{i}{i}.json")
    message = refused(read_records, tmp_path / "zebra_crossing.jsonl")
    assert "has 0000.json, 1111.json, 2222.json, and 2 more)" in message


def test_missing_file_in_an_empty_folder(refused, tmp_path):
    message = refused(read_records, tmp_path / "a.jsonl")
    assert f"{tmp_path} has no .jsonl, .json, .csv or .parquet file)" in message


def test_missing_folder_is_named(refused, tmp_path):
    message = refused(read_records, tmp_path / "nowhere" / "a.jsonl")
    assert f"the folder {tmp_path / 'nowhere'} does not exist" in message


def test_directory_and_foreign_suffix(write, refused, tmp_path):
    foreign = write("a,b\n1,2\n", "train.xlsx")
    message = refused(read_records, tmp_path)
    assert "is a directory" in message
    assert "no .jsonl, .json, .csv or .parquet file" in message
    write(ROWS, "a.jsonl")
    assert "a directory with a.jsonl;" in refused(read_records, tmp_path)
    message = refused(read_records, foreign)
    assert "train.xlsx" in message
    assert "got suffix '.xlsx'; allowed: .jsonl, .json, .csv or .parquet." in message


@pytest.mark.parametrize("name", ["e.jsonl", "e.json"])
@pytest.mark.parametrize("content", [b"", b"\n \r\n\t", b"\xef\xbb\xbf"])
def test_empty_file(write, refused, name, content):
    message = refused(read_records, write(content, name))
    assert f"{name} is empty: got {len(content)} bytes" in message
    assert "check that its upload has finished" in message


def test_empty_list(write, refused):
    assert "e.json is empty: got a list without" in refused(read_records, write("[]", "e.json"))


def reason_of(text):
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(text)
    return f"{caught.value.msg} at column {caught.value.colno}"


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_broken_line_has_file_line_reason_and_column(write, refused, name):
    bad = '{"instruction": "x" "output": "y"}'
    message = refused(read_records, write(as_lines() + "\n" + bad + "\n" + as_lines(), name))
    assert message.startswith(f"1 line of {name} cannot be read: got {name}:5: ")
    assert reason_of(bad) in message
    assert "at column 21;" in message
    assert "allowed: one JSON object a line" in message


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_the_first_three_broken_lines_are_named_and_the_rest_counted(write, refused, count):
    message = refused(read_records, write(as_lines() + "{oops\n" * count))
    for line in range(4, 4 + count):
        assert (f"train.jsonl:{line}:" in message) == (line < 7)
    assert ("more" in message) == (count > 3)
    if count > 3:
        assert f"; and {count - 3} more; allowed" in message


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("[1]", "a list"),
        ('"text"', "text"),
        ("3", "a number"),
        ("2.5", "a number"),
        ("null", "null"),
        ("true", "true or false"),
    ],
)
def test_a_value_that_is_not_an_object_is_named_by_its_kind(write, refused, value, kind):
    message = refused(read_records, write(as_lines() + value + "\n"))
    assert f"train.jsonl:4: {kind}, not an object" in message
    text = "[\n" + json.dumps(ROWS[0]) + ",\n" + value + "\n]"
    message = refused(read_records, write(text, "train.json"))
    assert f"got train.json:3: element 1 is {kind}, not an object" in message
    assert message.startswith("1 element of train.json cannot be used")


def test_values_that_break_the_parser_itself_are_told_too(write, refused):
    assert "train.jsonl:4: " in refused(read_records, write(as_lines() + "[" * 100_000))
    if hasattr(sys, "get_int_max_str_digits"):
        assert "train.jsonl:4: " in refused(read_records, write(as_lines() + "1" * 10_000))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_a_jsonl_file_says_how_to_rename_it(write, refused, indent):
    message = refused(read_records, write(json.dumps(ROWS, indent=indent)))
    assert "train.jsonl holds one JSON list" in message
    assert message.endswith("Rename it to train.json.")


@pytest.mark.parametrize(
    ("document", "got", "do"),
    [
        (
            {"version": 1, "data": ROWS},
            "got an object whose key 'data' holds a list;",
            "Save the list under 'data' as the whole file.",
        ),
        ({"a": [], "b": []}, "got an object;", "Put the objects between [ and ]"),
        (ROWS[0], "got an object;", "Put the objects between [ and ]"),
        ("text", "got text;", "Put the objects between [ and ]"),
        (3, "got a number;", "Put the objects between [ and ]"),
        (None, "got null;", "Put the objects between [ and ]"),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_document_that_is_not_a_list(write, refused, document, got, do, indent):
    message = refused(read_records, write(json.dumps(document, indent=indent), "t.json"))
    assert message.startswith("t.json does not hold a list of objects: " + got)
    assert do in message


def test_a_broken_document_has_line_and_column(write, refused):
    text = json.dumps(ROWS, indent=2).replace('"output": "d"', '"output" "d"')
    message = refused(read_records, write(text, "t.json"))
    line = next(i for i, t in enumerate(text.split("\n"), 1) if '"output" "d"' in t)
    assert message.startswith(f"t.json:{line}: broken JSON: got ")
    assert "at column 14;" in message


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_bytes_that_are_not_utf8_have_offset_and_line(write, refused, bom):
    start = bom + b'{"a": "b"}\r\n\n{"a": "caf'
    message = refused(read_records, write(start + b'\xe9"}\n'))
    assert f"train.jsonl:3: not UTF-8: got byte 0xe9 at offset {len(start)};" in message
    assert "allowed: UTF-8 text. Save the file as UTF-8" in message


def test_utf16_is_refused_at_its_first_byte(write, refused):
    message = refused(read_records, write(as_lines().encode("utf-16")))
    assert "train.jsonl:1: not UTF-8: got byte 0xff at offset 0" in message


def test_home_is_expanded(write, tmp_path, monkeypatch):
    write(ROWS)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert len(read_records("~/train.jsonl")) == 3


def test_the_broken_sample_names_its_two_unreadable_lines(refused):
    message = refused(read_records, SAMPLES / "broken.jsonl")
    line = (SAMPLES / "broken.jsonl").read_text(encoding="utf-8").split("\n")[1]
    assert message.startswith("2 lines of broken.jsonl cannot be read: got broken.jsonl:2: ")
    assert reason_of(line) in message
    assert "; broken.jsonl:7: a list, not an object; allowed" in message
    assert message.count("broken.jsonl:") == 2


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_the_good_samples_read(name):
    if not (SAMPLES / name).exists():
        pytest.skip(f"{name} is not there")
    assert len(read_records(SAMPLES / name)) > 0


def test_importing_the_folder_pulls_in_no_heavy_library():
    root = Path(__file__).resolve().parents[2]
    code = (
        "import sys, colab_qlora.data\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'pandas', 'IPython', 'numpy'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
