"""The user's rows as micro-batches: every form that is taken, and every one that is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoTokenizer

from colab_qlora.data import format_chat
from colab_qlora.errors import UserError
from colab_qlora.quantization.calibration import ROWS, calibration_batches


@pytest.fixture(scope="module")
def tokenizer(embedded_folder):
    return AutoTokenizer.from_pretrained(embedded_folder)


def forms(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    from datasets import Dataset

    chat = format_chat(rows)
    return {
        "alpaca": rows,
        "text": [{"text": f"{r['instruction']} {r['output']}"} for r in rows],
        "strings": [f"{r['instruction']} {r['output']}" for r in rows],
        "prompt and completion": chat,
        "messages": [{"messages": r["prompt"] + r["completion"]} for r in chat],
        "dataset": Dataset.from_list(rows),
        "path": str(path),
        "generator": (row for row in rows),
    }


@pytest.mark.model
def test_every_form_gives_tokens_and_labels(tokenizer, sample_rows, tmp_path):
    counts = {}
    for name, data in forms(sample_rows[:24], tmp_path).items():
        batches = calibration_batches(data, tokenizer, 128)
        assert sum(len(batch["input_ids"]) for batch in batches) == ROWS, name
        for batch in batches:
            ids, mask, labels = (batch[k] for k in ("input_ids", "attention_mask", "labels"))
            assert ids.shape == mask.shape == labels.shape and ids.shape[1] <= 128
            assert (labels[mask == 0] == -100).all()
            assert torch.equal(labels[labels != -100], ids[labels != -100])
            assert (labels != -100).any(1).all()
        counts[name] = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    # answers alone, or all of the text
    assert counts["alpaca"] < counts["text"] == counts["strings"]
    assert counts["prompt and completion"] < counts["messages"]
    assert counts["path"] == counts["alpaca"] == counts["dataset"] == counts["generator"]


@pytest.mark.model
def test_rows_are_cut_and_those_without_labels_left_out(tokenizer, sample_rows):
    batches = calibration_batches(sample_rows, tokenizer, 80)
    assert all(batch["input_ids"].shape[1] <= 80 for batch in batches)
    long_prompt = [{"prompt": "word " * 300, "completion": "short"}]
    with pytest.raises(UserError, match="got 0 tokens in 0 rows with labels, of 8 rows"):
        calibration_batches(long_prompt * 8, tokenizer, 64)
    # rows of four tokens: more of them
    batches = calibration_batches(["red green blue"] * 500, tokenizer, 64)
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) >= 256


@pytest.mark.model
def test_rows_that_are_tokens_already(tokenizer):
    rows = [{"input_ids": list(range(5, 45)), "labels": [-100] * 30 + list(range(35, 45))}] * 8
    (batch,) = calibration_batches(rows, tokenizer, 64)
    assert ((batch["labels"] != -100).sum(1) == 10).all()
    # two answers with a prompt between them
    two = [-100, 6, 7, -100, -100, -100, 11, 12] + [-100] * 32
    (batch,) = calibration_batches([{**rows[0], "labels": two}] * 8, tokenizer, 64)
    assert batch["labels"][0].tolist() == two
    with pytest.raises(UserError, match="not one label for each id: got 40 ids and 2 labels"):
        calibration_batches([{**rows[0], "labels": [1, 2]}] * 8, tokenizer, 64)
    for wrong in (len(tokenizer), -1):
        with pytest.raises(UserError, match=f"no tokens of this model: got {wrong}; allowed: 0"):
            calibration_batches([{"input_ids": [1, wrong, 3]}] * 200, tokenizer, 64)


@pytest.mark.model
def test_no_more_than_a_few_thousand_tokens(tokenizer):
    endless = itertools.cycle(["many words " * 400])
    batches = calibration_batches(endless, tokenizer, 2048)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(8, 256), (8, 256)]


@pytest.mark.model
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, "calibration_data is not understood: got int; allowed: a list of texts"),
        ({"text": "a"}, "calibration_data is not understood: got dict"),
        ([], "calibration_data is empty"),
        (["too little"], "the calibration data are too short: got [0-9]+ tokens in 1 rows"),
        ([{"question": "a"}], "a row of calibration_data cannot be used"),
        ([7], "a row of calibration_data cannot be used"),
        ("no/such/file.jsonl", "file.jsonl"),
    ],
)
def test_other_data_are_refused(tokenizer, data, message):
    with pytest.raises(UserError, match=message):
        calibration_batches(data, tokenizer, 128)
