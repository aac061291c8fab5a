from __future__ import annotations

import random

import pytest

from colab_qlora.data.duplicates import drop_duplicates
from colab_qlora.data.records import Records, read_records
from colab_qlora.data.split import find_overlap


def row(text, answer="a"):
    return {"instruction": text, "output": answer}


def test_the_first_of_each_is_kept_and_the_rest_told():
    rows = [row("b"), row("a"), row(" B\n"), row("c"), row("a"), row("b")]
    kept, report = drop_duplicates(rows)
    assert kept == [rows[0], rows[1], rows[3]]
    assert (report.rows, report.kept) == (6, 3)
    assert report.dropped == ((2, 0), (4, 1), (5, 0))
    assert str(report) == (
        "3 of 6 rows repeat an earlier row, and 3 are kept: "
        "row 2 = row 0; row 4 = row 1; row 5 = row 0."
    )


def test_it_agrees_with_comparing_every_pair():
    generator = random.Random(11)
    for _ in range(100):
        rows = [row(generator.choice("aAbBcCdD")) for _ in range(generator.randint(1, 12))]
        kept, report = drop_duplicates(rows)
        expected = [
            i
            for i, one in enumerate(rows)
            if all(one["instruction"].lower() != r["instruction"].lower() for r in rows[:i])
        ]
        assert [id(r) for r in kept] == [id(rows[i]) for i in expected]
        assert report.kept + len(report.dropped) == len(rows)
        assert all(earlier in expected for _, earlier in report.dropped)
        for side in range(len(kept)):
            assert find_overlap(kept[:side], kept[side : side + 1]) == []


def test_nothing_to_drop():
    kept, report = drop_duplicates([row("a"), row("b")])
    assert len(kept) == 2
    assert str(report) == "None of 2 rows repeats another."
    assert str(drop_duplicates([row("a")])[1]) == "None of 1 row repeats another."


def test_records_keep_their_lines_and_name_them(write):
    rows = [row("a"), row("b"), row("A"), row("c"), row("a"), row("b"), row("b")]
    path = write("\n" + write(rows, "rows.jsonl").read_text())
    kept, report = drop_duplicates(read_records(path))
    assert isinstance(kept, Records)
    assert kept.lines == (2, 3, 5)
    assert str(report) == (
        "4 of 7 rows repeat an earlier row, and 3 are kept: train.jsonl:4 = train.jsonl:2; "
        "train.jsonl:6 = train.jsonl:2; train.jsonl:7 = train.jsonl:3; and 1 more."
    )


def test_a_data_set_stays_one():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([row("a"), row("A"), row("b")])
    kept, report = drop_duplicates(dataset)
    assert isinstance(kept, datasets.Dataset)
    assert kept["instruction"][:] == ["a", "b"]
    assert str(report) == "1 of 3 rows repeats an earlier row, and 2 are kept: row 1 = row 0."


def test_chats_are_compared_to_the_last_message():
    def chat(answer):
        return {
            "conversations": [{"role": "user", "content": "q"}, {"role": "a", "content": answer}]
        }

    assert len(drop_duplicates([chat("x"), chat("X "), chat("y")])[0]) == 2


def test_fields_narrow_the_comparison_and_rows_without_them_stay():
    rows = [row("a", "1"), row("a", "2"), {"text": "t"}, {"text": "u"}, row("b", "1")]
    assert drop_duplicates(rows)[1].dropped == ()
    assert drop_duplicates(rows, fields=["instruction"])[1].dropped == ((1, 0),)


def test_wrong_fields_and_no_rows_are_refused(refused):
    rows = [row("a"), row("b")]
    message = refused(drop_duplicates, rows, fields=["instruction", "question"])
    assert "got 'question'; allowed: a list of 'instruction', 'output'." in message
    assert "got 'instruction';" in refused(drop_duplicates, rows, fields="instruction")
    assert "got [];" in refused(drop_duplicates, rows, fields=[])
    assert refused(drop_duplicates, []).startswith("there is no row")
