from __future__ import annotations

import csv
import io
import json
import random
import sys

import pytest

from colab_qlora.data.alpaca import validate_alpaca
from colab_qlora.data.records import Records, read_records

HEADER = "instruction,input,output\n"


def as_csv(rows: list[dict[str, str]], end: str = "\n") -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("name", ["train.csv", "TRAIN.CSV"])
def test_csv_reads_the_same_with_every_mark_and_line_end(write, bom, end, name):
    text = f'instruction,output{end}"say ""yes"", now",caf\u00e9 \u2028 \U0001f600{end}a,b{end}'
    records = read_records(write(bom + text.encode(), name))
    assert list(records) == [
        {"instruction": 'say "yes", now', "output": "caf\u00e9 \u2028 \U0001f600"},
        {"instruction": "a", "output": "b"},
    ]
    assert records.where(1) == f"{name}:3"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_field_over_several_lines_keeps_its_breaks_and_moves_the_lines(write, end):
    text = f'{HEADER}"one\n\ntwo",,"say ""hi,\nyou"""\n\n\nc,d,e\n"f","","g"'
    records = read_records(write(text.replace("\n", end), "t.csv"))
    assert list(records) == [
        {"instruction": "one\n\ntwo", "input": "", "output": 'say "hi,\nyou"'},
        {"instruction": "c", "input": "d", "output": "e"},
        {"instruction": "f", "input": "", "output": "g"},
    ]
    assert records.lines == (2, 8, 9)


def test_any_cells_come_back_with_the_line_they_start_on(write):
    generator = random.Random(3)
    pieces = ["a", ",", '"', '""', "\n", " ", "caf\u00e9", "\u2028", "\x85", ";", "'", "\t"]
    for _ in range(60):
        rows = [
            {
                # a letter in one cell, as a row without text is blank
                "q": "x" + "".join(generator.choices(pieces, k=generator.randint(0, 6))),
                "a": "".join(generator.choices(pieces, k=generator.randint(0, 6))),
            }
            for _ in range(generator.randint(1, 8))
        ]
        lines, line = [], 2
        for row in rows:
            lines.append(line)
            line += 1 + sum(cell.count("\n") for cell in row.values())
        records = read_records(write(as_csv(rows, generator.choice(["\n", "\r\n"])), "t.csv"))
        assert list(records) == rows
        assert list(records.lines) == lines


def test_one_row_and_one_column(write):
    assert list(read_records(write("text\nhello", "t.csv"))) == [{"text": "hello"}]


def test_white_space_around_names_goes_and_around_cells_stays(write):
    assert list(read_records(write(" a , b\n x , y", "t.csv"))) == [{"a": " x ", "b": " y"}]


def test_rows_of_commas_alone_are_skipped_and_counted(write):
    records = read_records(write(",,\n" + HEADER + ",,\na,,b\n , ,\n,,c\n", "t.csv"))
    assert [row["output"] for row in records] == ["b", "c"]
    assert records.lines == (4, 6)


def test_a_cell_longer_than_the_parser_allows_by_default_is_read(write):
    limit = csv.field_size_limit()
    long_text = "word " * (limit // 4)
    assert read_records(write(f"text\n{long_text}\n", "t.csv"))[0]["text"] == long_text
    assert csv.field_size_limit() == limit


def test_faults_found_later_name_the_line_of_the_csv(write, refused):
    records = read_records(write(HEADER + '"a\nb",,c\nd,,\n', "t.csv"))
    assert "t.csv:4: 'output' is empty" in refused(validate_alpaca, records)


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("1,2,3\na,b,c\n", "'1' as a name; '2' as a name; '3' as a name"),
        ("Name the capital.,Paris\nAdd one.,two\n", "'Name the capital.' as a name"),
        ('"one\ntwo",b\nc,d\n', "'one\\ntwo' as a name"),
        ("w" * 90 + ",b\nc,d\n", "with 90 characters as a name"),
        ("a,b,a\n1,2,3\n", "'a' twice"),
        ("a,,b\n1,2,3\n", "column 2 without a name"),
    ],
)
def test_a_first_row_that_is_no_header_is_refused(write, refused, text, got):
    message = refused(read_records, write("\n" + text, "t.csv"))
    assert message.startswith("t.csv:2: the first row is not a header: got ")
    assert f"{got};" in message
    assert message.endswith("Put a row of different column names above the first row.")


def test_the_index_that_pandas_writes_has_its_own_remedy(write, refused):
    message = refused(read_records, write(",text\n0,a\n1,b\n", "t.csv"))
    assert "t.csv:1: the first row is not a header: got column 1 without a name;" in message
    assert "to_csv(path, index=False)" in message


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_marks_between_columns_are_told(write, refused, mark):
    message = refused(read_records, write(f"a{mark}b\n1{mark}2\n", "t.csv"))
    assert message.startswith(
        f"t.csv:1: the columns are not apart: got one column named {'a' + mark + 'b'!r};"
    )
    assert "sep=None" in message


@pytest.mark.parametrize("text", [HEADER, HEADER + "\n ,,\n", "\n" + HEADER.strip()])
def test_a_header_alone_is_refused(write, refused, text):
    message = refused(read_records, write(text, "t.csv"))
    assert message.startswith(
        "t.csv has no row: got only the header 'instruction', 'input', 'output';"
    )


def test_commas_alone_are_no_file(write, refused):
    message = refused(read_records, write(",,\n,,\n", "t.csv"))
    assert message.startswith("t.csv has no row: got cells without any text;")


def test_ragged_rows_are_named_by_the_line_they_start_on(write, refused):
    text = HEADER + 'a,"b\nb",c\nd,e\n"f\nf",g,h,i\nj,k,l\nm\nn,o\n'
    assert refused(read_records, write(text, "t.csv")) == (
        "4 rows of t.csv cannot be read: got t.csv:4: 2 cells; t.csv:5: 4 cells; t.csv:8: 1 cell; "
        "and 1 more; allowed: 3 cells in every row, as in the header. "
        'Put double quotes around a cell that holds a comma, as in "one, two".'
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('a,b\nc,d\n"open,e\nf,g\n', "fails at line 4: unexpected end of data"),
        ('a,b\nc,d\n"say "yes" now",e\n', "fails at line 3: ',' expected after '\"'"),
    ],
)
def test_a_wrong_quote_is_named_where_its_row_starts(write, refused, text, reason):
    message = refused(read_records, write(text, "t.csv"))
    assert message.startswith("t.csv:3: broken CSV: got a row that starts here and ")
    assert reason in message


def test_a_csv_of_another_encoding_is_refused(write, refused):
    text = "text\nhello\ncaf\u00e9\n"
    message = refused(read_records, write(text.encode("cp1252"), "t.csv"))
    assert message.startswith("t.csv:3: not UTF-8: got byte 0xe9 at offset 14;")
    assert "Excel: CSV UTF-8" in message
    message = refused(read_records, write(text.encode("utf-16"), "t.csv"))
    assert "t.csv:1: not UTF-8: got byte 0xff at offset 0, the mark of UTF-16;" in message


def test_utf16_without_its_mark_is_refused_in_csv_and_json(write, refused):
    for name, text in (("t.csv", "text\nhello\n"), ("t.jsonl", '{"text": "a"}\n')):
        message = refused(read_records, write(text.encode("utf-16-le"), name))
        assert message.startswith(f"{name}:1: not UTF-8: got byte 0x00 at offset 1, as in UTF-16")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t", b"\xef\xbb\xbf"])
def test_an_empty_csv(write, refused, content):
    message = refused(read_records, write(content, "t.csv"))
    assert message.startswith(f"t.csv is empty: got {len(content)} bytes without a row;")


@pytest.fixture
def parquet(tmp_path):
    """Write columns, or a pyarrow table, with pyarrow and return the path."""
    pyarrow = pytest.importorskip("pyarrow")
    files = pytest.importorskip("pyarrow.parquet")

    def _write(content, name="train.parquet", **options):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        table = pyarrow.table(content) if isinstance(content, dict) else content
        files.write_table(table, path, **options)
        return path

    return _write


def test_parquet_reads_texts_numbers_nulls_and_messages(parquet):
    turns = [{"from": "human", "value": "caf\u00e9 \U0001f600"}, {"from": "gpt", "value": "b\nc"}]
    columns = {"text": ["a", None, ""], "n": [1, 2, None], "conversations": [turns, [], None]}
    records = read_records(parquet(columns))
    assert isinstance(records, Records)
    assert list(records) == [
        {"text": "a", "n": 1, "conversations": turns},
        {"text": None, "n": 2, "conversations": []},
        {"text": "", "n": None, "conversations": None},
    ]
    assert [records.where(i) for i in range(3)] == [f"train.parquet row {i}" for i in range(3)]
    assert records[1:].where(0) == "train.parquet row 1"
    assert records.select([2, 0]).where(0) == "train.parquet row 2"


def test_row_numbers_run_on_over_row_groups(parquet):
    rows = list(range(507))
    records = read_records(parquet({"n": rows}, row_group_size=63))
    assert [row["n"] for row in records] == rows == list(records.lines)


def test_a_folder_named_like_a_partition_adds_no_column(parquet):
    path = parquet({"text": ["a"]}, "lang=en/train.parquet")
    assert list(read_records(path)) == [{"text": "a"}]


def test_faults_found_later_name_the_row_of_the_parquet(parquet, refused):
    records = read_records(parquet({"instruction": ["a", "b"], "output": ["c", None]}))
    assert "train.parquet row 1: 'output' is null" in refused(validate_alpaca, records)


@pytest.mark.parametrize("change", ["cut", "overwritten", "text"])
def test_a_broken_parquet_is_refused(parquet, refused, change):
    path = parquet({"text": ["a" * 50, "b" * 50] * 100}, compression="none")
    whole = path.read_bytes()
    broken = {
        "cut": whole[: len(whole) // 2],
        "overwritten": whole[:-8] + b"\xff\xff\xff\x7f" + whole[-4:],
        "text": b'{"text": "a"}\n' * 9,
    }
    path.write_bytes(broken[change])
    message = refused(read_records, path)
    assert message.startswith("train.parquet is not whole: got ")
    assert message.endswith("Download or write the file again.")


def test_a_pointer_to_a_large_file_says_how_to_fetch_it(write, refused):
    path = write("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "t.parquet")
    message = refused(read_records, path)
    assert message.startswith("t.parquet is not whole: got a Git LFS pointer instead of the data;")
    assert message.endswith("Run git lfs pull.")


def test_a_parquet_without_bytes_or_rows_is_refused(write, parquet, refused):
    assert refused(read_records, write(b"", "t.parquet")).startswith("t.parquet is empty: got 0")
    pyarrow = pytest.importorskip("pyarrow")
    empty = pyarrow.table({"a": pyarrow.array([], pyarrow.string())})
    message = refused(read_records, parquet(empty))
    assert message.startswith("train.parquet has no row: got columns 'a' and 0 rows;")


def test_a_parquet_with_two_columns_of_one_name_is_refused(parquet, refused):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 3, names=["a", "b", "a"])
    message = refused(read_records, parquet(table))
    assert "train.parquet has columns of one name: got 'a' more than once;" in message


def test_without_pyarrow_the_remedy_is_told(write, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refused(read_records, write(b"PAR1", "t.parquet"))
    assert message.startswith("Parquet cannot be read: got no pyarrow (")
    assert "Run pip install pyarrow" in message


def test_the_same_rows_in_every_file_type(write, parquet):
    rows = [{"instruction": f"q{i}, \u00e9", "output": f"line\n{i}"} for i in range(5)]
    files = [
        write(rows, "t.jsonl"),
        write(json.dumps(rows), "t.json"),
        write(as_csv(rows), "t.csv"),
        parquet({name: [row[name] for row in rows] for name in rows[0]}),
    ]
    assert [list(read_records(file)) for file in files] == [rows] * 4


def test_a_data_set_becomes_records_with_its_own_row_numbers():
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a", "n": 1}, {"text": None, "n": 2}]
    dataset = datasets.Dataset.from_list(rows)
    records = read_records(dataset)
    assert isinstance(records, Records)
    assert list(records) == rows
    assert records.where(1) == "dataset row 1"
    assert list(read_records(dataset.select([1]))) == rows[1:]
    # cells are plain values, whatever the format of the data set
    assert type(read_records(dataset.with_format("numpy"))[0]["n"]) is int


def test_what_is_neither_file_nor_data_set_is_refused(refused):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([{"text": "a"}])
    parts = datasets.DatasetDict(train=dataset, test=dataset)
    message = refused(read_records, parts)
    assert "got type DatasetDict with 'train', 'test';" in message
    assert message.endswith("Pass one of its parts, such as dataset['train'].")
    message = refused(read_records, dataset.to_iterable_dataset())
    assert "got type IterableDataset;" in message and "without streaming=True" in message
    assert "frame.to_dict('records')" in refused(read_records, dataset.to_pandas())
    assert "there is no row" in refused(read_records, dataset.select([]))
    message = refused(read_records, [{"text": "a"}])
    assert message.startswith("the rows are read already: got a list of 1 row;")
    assert "Put one row into a list" in refused(read_records, {"text": "a"})
    assert "got type int;" in refused(read_records, 3)
