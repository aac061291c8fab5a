from __future__ import annotations

import random

import pytest

from colab_qlora.data.records import Records, read_records
from colab_qlora.data.split import check_no_overlap, find_overlap, row_key, split_rows


def row(text: str, **more: object) -> dict[str, object]:
    return {"instruction": text, "output": "answer", **more}


@pytest.mark.parametrize(
    "variant",
    [
        row("NAME the Caf\u00e9"),
        row("  name\n the\tcafe\u0301 "),
        row("name the caf\u00e9", input=""),
        row("name the caf\u00e9", input="  "),
        row("name the caf\u00e9", input=None),
        row("name\u00a0the \uff43\uff41\uff46\u00e9"),
        {"output": "Answer", "instruction": "name the caf\u00e9"},
    ],
)
def test_rows_that_read_the_same_have_one_key(variant):
    assert row_key(variant) == row_key(row("name the caf\u00e9"))


@pytest.mark.parametrize(
    ("one", "other"),
    [("STRASSE", "stra\u00dfe"), ("\u2121", "Tel"), ("\u01c4", "d\u017e"), ("\ufb01t", "FIT")],
)
def test_letters_that_fold_to_several_have_one_key(one, other):
    assert row_key(row(one)) == row_key(row(other))


@pytest.mark.parametrize(
    "variant",
    [
        row("name the cafe"),
        row("name the caf\u00e9 "[::-1]),
        row("namethe caf\u00e9"),
        row("name the caf\u00e9", input="x"),
        {"instruction": "answer", "output": "name the caf\u00e9"},
        {"instruction": "name the caf\u00e9"},
    ],
)
def test_rows_that_differ_have_other_keys(variant):
    assert row_key(variant) != row_key(row("name the caf\u00e9"))


def test_keys_of_chats_reach_into_the_messages():
    def chat(content):
        return {"prompt": [{"role": "user", "content": content}], "completion": []}

    assert row_key(chat("A  b")) == row_key(chat("a b"))
    assert row_key(chat("a b")) != row_key(chat("a c"))


def test_fields_narrow_the_comparison():
    one, other = row("q", id=1), row("q", id=2)
    assert row_key(one) != row_key(other)
    assert row_key(one, ("instruction",)) == row_key(other, ("instruction",))
    assert find_overlap([one], [other]) == []
    assert find_overlap([one], [other], fields=("instruction", "output")) == [(0, 0)]


def test_overlap_agrees_with_comparing_every_pair():
    generator = random.Random(5)
    for _ in range(30):
        sides = [
            [row(generator.choice("aAbBcd") * generator.randint(1, 2)) for _ in range(size)]
            for size in (generator.randint(0, 9), generator.randint(0, 9))
        ]
        train_rows, eval_rows = sides
        expected = [
            (i, j)
            for i, a in enumerate(train_rows)
            for j, b in enumerate(eval_rows)
            if a["instruction"].lower() == b["instruction"].lower()
        ]
        assert find_overlap(train_rows, eval_rows) == expected


def random_rows(generator: random.Random) -> list[dict[str, object]]:
    count = generator.randint(2, 60)
    rows = [row(f"q{generator.randint(0, count)}") for _ in range(count - 1)]
    return [*rows, row("one that differs")] if count > 2 else [row("a"), row("b")]


def test_a_split_keeps_every_row_once_in_order_and_duplicates_together():
    generator = random.Random(7)
    for _ in range(200):
        rows = [{**r, "n": [i]} for i, r in enumerate(random_rows(generator))]
        plain = [{k: v for k, v in r.items() if k != "n"} for r in rows]
        if len({row_key(r) for r in plain}) < 2:
            continue
        share, seed = generator.uniform(0.01, 0.99), generator.randint(0, 9)
        train_rows, eval_rows = split_rows(plain, share, seed)
        assert train_rows and eval_rows
        assert find_overlap(train_rows, eval_rows) == []
        for side in (train_rows, eval_rows):
            positions = [next(i for i, r in enumerate(plain) if r is s) for s in side]
            assert positions == sorted(set(positions))
        assert len(train_rows) + len(eval_rows) == len(plain)
        sizes = [len([r for r in plain if row_key(r) == key]) for key in map(row_key, plain)]
        assert len(eval_rows) <= max(1, round(share * len(plain)), min(sizes))


@pytest.mark.parametrize(("count", "share"), [(10, 0.1), (100, 0.1), (64, 0.25), (3, 0.01)])
def test_distinct_rows_give_the_share_asked_for(count, share):
    rows = [row(f"q{i}") for i in range(count)]
    assert len(split_rows(rows, share)[1]) == max(1, round(share * count))


def test_a_large_share_leaves_a_row_to_train():
    train_rows, eval_rows = split_rows([row("a"), row("b")], 0.99)
    assert (len(train_rows), len(eval_rows)) == (1, 1)


def test_duplicates_alone_too_many_for_the_share_still_give_both_sides():
    rows = [row("a")] * 5 + [row("B")] * 3
    train_rows, eval_rows = split_rows(rows, 0.1)
    assert (len(train_rows), len(eval_rows)) == (5, 3)


def test_the_split_is_fixed_for_a_seed_and_moves_with_it():
    rows = [row(f"q{i}") for i in range(50)]
    assert split_rows(rows) == split_rows(rows, 0.1, 42)
    # written out, so that a change of the draw does not pass unseen
    assert [r["instruction"] for r in split_rows(rows[:20], 0.2)[1]] == ["q3", "q12", "q13", "q15"]
    assert len({str(split_rows(rows, 0.2, seed)[1]) for seed in range(10)}) == 10


def test_the_draw_does_not_depend_on_the_order_of_the_file():
    rows = [row(f"q{i}") for i in range(50)]
    shuffled = random.Random(0).sample(rows, len(rows))
    first, second = split_rows(rows)[1], split_rows(shuffled)[1]
    assert {r["instruction"] for r in first} == {r["instruction"] for r in second}


def test_every_row_is_drawn_by_some_seed():
    rows = [row(f"q{i}") for i in range(10)]
    drawn = {r["instruction"] for seed in range(100) for r in split_rows(rows, 0.1, seed)[1]}
    assert drawn == {r["instruction"] for r in rows}


def test_records_stay_records_with_their_lines(write):
    records = read_records(write([row(f"q{i}") for i in range(10)]))
    train_rows, eval_rows = split_rows(records, 0.3)
    assert isinstance(train_rows, Records) and isinstance(eval_rows, Records)
    assert sorted(train_rows.lines + eval_rows.lines) == list(range(1, 11))
    for side in (train_rows, eval_rows):
        assert all(r["instruction"] == f"q{n - 1}" for r, n in zip(side, side.lines, strict=True))


def test_overlap_is_refused_with_file_and_line(write, refused):
    train_rows = read_records(write([row(f"q{i}") for i in range(9)]))
    eval_rows = read_records(write([row("new"), row("Q3"), row("q8 ")], "eval.jsonl"))
    assert refused(check_no_overlap, train_rows, eval_rows) == (
        "2 of 3 eval rows are training rows too: got train.jsonl:4 = eval.jsonl:2; "
        "train.jsonl:9 = eval.jsonl:3; allowed: no row on both sides. "
        "Split all rows with split_rows, or delete these from one side."
    )
    check_no_overlap(train_rows, eval_rows[:1])


def test_overlap_of_plain_lists_counts_rows_not_pairs(refused):
    message = refused(check_no_overlap, [row("a")] * 5, [row("b"), row("A")])
    assert message.startswith(
        "1 of 2 eval rows is a training row too: got train row 0 = eval row 1;"
    )
    assert "; and 2 more; allowed" in message
    check_no_overlap([], [row("a")])
    check_no_overlap([row("b")], [row("a")])


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan"), "0.1", None, True])
def test_a_share_out_of_range_is_refused(refused, share):
    message = refused(split_rows, [row("a"), row("b")], share)
    assert f"eval_share is not a share: got {share!r}; allowed: a number between 0 and 1" in message


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        ([], "got 0 rows, 0 of them different"),
        ([row("a")], "got 1 row, 1 of them different"),
        ([row("a"), row(" A")], "got 2 rows, 1 of them different"),
    ],
)
def test_rows_that_cannot_be_split_are_refused(refused, rows, got):
    message = refused(split_rows, rows)
    assert got in message
    assert "allowed: at least two different rows. Add rows" in message
