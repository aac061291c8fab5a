from __future__ import annotations

import dataclasses
import random

import pytest

from colab_qlora.data.alpaca import format_alpaca, format_chat
from colab_qlora.data.audit import audit_lengths, check_labels, length_report
from colab_qlora.data.encode import encode

EOS = "<|im_end|>"


class CharacterTokenizer:
    """One token a character, so that every length is known without a tokenizer library."""

    chat_template = None

    def __init__(self, eos_token: str | None = "$") -> None:
        self.eos_token = eos_token

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


class MergingTokenizer(CharacterTokenizer):
    """As above, but "bc" is one token, also across the border of prompt and completion."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return super().__call__(text.replace("bc", "\u0100"))


def pair(prompt: int, completion: int) -> dict[str, str]:
    """An example of `prompt` + `completion` tokens; the last is the end token."""
    return {"prompt": "p" * prompt, "completion": "c" * (completion - 1) + "$"}


def alpaca_rows(count: int = 12):
    generator = random.Random(3)
    words = ["model", "caf\u00e9", "\U0001f600", "tokens\n\n", " answer", "7", "\u6771\u4eac"]
    rows = []
    for _ in range(count):
        texts = [" ".join(generator.choices(words, k=generator.randint(1, 25))) for _ in range(3)]
        rows.append({"instruction": texts[0], "input": texts[1], "output": texts[2].strip()})
    return rows


def test_counts_on_lengths_known_by_hand():
    report = audit_lengths(
        [pair(4, 2), pair(6, 4), pair(2, 1), pair(8, 3)], CharacterTokenizer(), 7
    )
    # lengths 6, 10, 3, 11; kept 6, 7, 3, 7; labelled 2, 1, 1, 0
    assert (report.rows, report.tokens_total) == (4, 30)
    assert (report.tokens_p50, report.tokens_p95, report.tokens_max) == (6, 11, 11)
    assert (report.rows_truncated, report.share_truncated) == (2, 0.5)
    assert report.rows_without_labels == (3,)
    assert report.labelled_share == pytest.approx(4 / 23)
    assert report.smallest_max_seq_length == 9
    assert report.max_seq_length == 7


def test_rows_that_are_tokenised_already_give_the_same_report():
    examples = [pair(4, 2), pair(6, 4), pair(2, 1), pair(8, 3)]
    pairs = [(6, 4), (10, 6), (3, 2), (11, 8)]
    assert length_report(pairs, 7) == audit_lengths(examples, CharacterTokenizer(), 7)


def test_a_row_as_long_as_the_window_is_not_truncated():
    for window, truncated in [(5, 1), (6, 0), (7, 0)]:
        assert audit_lengths([pair(4, 2)], CharacterTokenizer(), window).rows_truncated == truncated


@pytest.mark.parametrize("count", [1, 2, 3, 10, 19, 20, 21, 100])
def test_percentiles_are_nearest_rank(count):
    examples = [pair(n, 1) for n in range(1, count + 1)]
    random.Random(count).shuffle(examples)
    report = audit_lengths(examples, CharacterTokenizer(), 1000)
    lengths = list(range(2, count + 2))
    for percent, value in [(50, report.tokens_p50), (95, report.tokens_p95)]:
        assert value in lengths
        assert 100 * sum(length <= value for length in lengths) >= percent * count
        assert 100 * sum(length < value for length in lengths) < percent * count


def test_the_smallest_window_keeps_labels_and_one_less_does_not():
    generator = random.Random(1)
    for _ in range(50):
        examples = [
            pair(generator.randint(1, 30), generator.randint(1, 30))
            for _ in range(generator.randint(1, 8))
        ]
        smallest = audit_lengths(examples, CharacterTokenizer(), 5).smallest_max_seq_length
        assert smallest is not None
        assert not audit_lengths(examples, CharacterTokenizer(), smallest).rows_without_labels
        assert audit_lengths(examples, CharacterTokenizer(), smallest - 1).rows_without_labels


def test_a_missing_end_token_is_counted_as_the_trainer_adds_it():
    tokenizer = CharacterTokenizer()
    for completion in ("abc", "abc$"):
        assert encode({"prompt": "pp", "completion": completion}, tokenizer) == (
            [ord(c) for c in "ppabc$"],
            2,
        )
    assert encode({"text": "ab"}, tokenizer) == ([97, 98, 36], 0)
    assert encode({"text": "ab"}, CharacterTokenizer(eos_token=None)) == ([97, 98], 0)


def test_a_token_over_the_border_is_labelled():
    ids, start = encode({"prompt": "ab", "completion": "cd"}, MergingTokenizer())
    assert (ids, start) == ([97, 0x100, 100, 36], 1)


def test_a_prompt_that_is_the_whole_text_has_no_label(refused):
    examples = [{"prompt": "ab", "completion": ""}, pair(2, 2)]
    report = audit_lengths(examples, CharacterTokenizer(eos_token=None), 100)
    assert report.rows_without_labels == (0,)
    assert report.smallest_max_seq_length is None
    message = refused(check_labels, report)
    assert "allowed: at least one completion token in every row." in message
    assert "Fill the empty completions" in message


def test_ids_and_labels_of_a_real_tokenizer(tokenizer):
    for example in format_alpaca(alpaca_rows(), EOS):
        ids, start = encode(example, tokenizer)
        assert tokenizer.decode(ids[:start]) == example["prompt"]
        assert tokenizer.decode(ids[start:]) == example["completion"]
        assert ids[-1] == tokenizer.eos_token_id


def test_ids_and_labels_of_a_chat(tokenizer):
    for row, example in zip(alpaca_rows(), format_chat(alpaca_rows()), strict=True):
        ids, start = encode(example, tokenizer)
        assert tokenizer.decode(ids[:start]).endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(ids[start:]) == row["output"] + "<|im_end|>\n"
        whole = {"messages": example["prompt"] + example["completion"]}
        assert encode(whole, tokenizer) == (ids, 0)


@pytest.mark.parametrize("form", ["text", "chat"])
@pytest.mark.parametrize("window", [40, 160, 4096])
def test_the_audit_agrees_with_the_labels_that_trl_trains(tokenizer, tmp_path, form, window):
    pytest.importorskip("torch")
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = alpaca_rows()
    examples = format_alpaca(rows, EOS) if form == "text" else format_chat(rows)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=window, report_to="none", use_cpu=True, bf16=False
    )
    trained = trl.SFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(examples), processing_class=tokenizer
    ).train_dataset

    expected = []
    for example in examples:
        ids, start = encode(example, tokenizer)
        expected.append((ids[:window], [i >= start for i in range(len(ids))][:window]))
    got = []
    for row in trained:
        # newer versions hand over labels, older ones a mask
        labels = row.get("labels")
        mask = row["completion_mask"] if labels is None else [label != -100 for label in labels]
        got.append((list(row["input_ids"]), [bool(bit) for bit in mask]))
    # newer versions leave out rows without a label
    if len(got) < len(expected):
        expected = [(ids, mask) for ids, mask in expected if any(mask)]
    assert got == expected

    report = audit_lengths(examples, tokenizer, window)
    labelled = sum(sum(mask) for _, mask in got)
    assert report.rows - len(report.rows_without_labels) == sum(any(mask) for _, mask in got)
    kept = sum(min(len(encode(example, tokenizer)[0]), window) for example in examples)
    assert report.labelled_share == pytest.approx(labelled / kept)


def test_the_report_reads_as_sentences():
    examples = [pair(4, 2)] * 1199 + [pair(30, 10)]
    tokenizer = CharacterTokenizer()
    assert str(audit_lengths(examples, tokenizer, 35)) == (
        "1,200 rows with 7,234 tokens: half of them have at most 6, 95% at most 6, the longest "
        "40. 1 row (0.1%) is longer than max_seq_length=35 and cut at the end. "
        "33.2% of the kept tokens carry a label, some in every row."
    )
    text = str(audit_lengths(examples, tokenizer, 4))
    assert "1,200 rows (100.0%) are longer than max_seq_length=4" in text
    assert "0.0% of the kept tokens carry a label, 1,200 rows without any." in text
    assert "None is longer than max_seq_length=40." in str(audit_lengths(examples, tokenizer, 40))


def test_the_report_is_frozen():
    report = audit_lengths([pair(2, 2)], CharacterTokenizer(), 9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rows = 2


def test_rows_without_labels_are_refused_with_the_window_that_helps(refused):
    examples = [pair(4, 2), pair(60, 4), pair(70, 2), pair(3, 1), pair(64, 1), pair(99, 9)]
    report = audit_lengths(examples, CharacterTokenizer(), 32)
    assert refused(check_labels, report) == (
        "4 of 6 rows (66.7%) have no labelled token left after truncation: got "
        "max_seq_length=32, rows 1, 2, 4, and 1 more; allowed: max_seq_length of at least 100, "
        "which keeps a label in every row. Set max_seq_length=100 or more, or shorten or drop "
        "these rows."
    )
    with pytest.warns(UserWarning, match="4 of 6 rows .66.7%. have no labelled token left"):
        assert "4 rows (66.7%)" in check_labels(report, on="warn")


def test_one_row_without_a_label_is_told_in_the_singular(refused):
    message = refused(
        check_labels, audit_lengths([pair(9, 1)] + [pair(1, 1)], CharacterTokenizer(), 9)
    )
    assert message.startswith("1 of 2 rows (50.0%) has no labelled token left")
    assert "rows 0;" in message


def test_long_rows_are_reported_and_not_refused():
    report = audit_lengths([pair(4, 20), pair(4, 2)], CharacterTokenizer(), 10)
    assert check_labels(report) == (
        "1 row (50.0%) is longer than max_seq_length=10 and cut at the end."
    )


def test_bad_arguments(refused):
    tokenizer = CharacterTokenizer()
    for value in (0, -1, 2.0, "512", None, True):
        message = refused(audit_lengths, [pair(1, 1)], tokenizer, value)
        assert f"max_seq_length is not a number of tokens: got {value!r};" in message
    assert "max_seq_length is not a number" in refused(length_report, [(2, 1)], 0)
    assert "there is no example to audit" in refused(audit_lengths, [], tokenizer, 8)
    assert "there is no example to audit" in refused(length_report, [], 8)
    report = audit_lengths([pair(1, 1)], tokenizer, 8)
    assert "on is unknown: got 'raise'; allowed: 'error'" in refused(check_labels, report, "raise")


@pytest.mark.parametrize(
    ("example", "got"),
    [
        ({"instruction": "x", "output": "y"}, "got 'instruction' as str, 'output' as str;"),
        ({"prompt": "x"}, "got 'prompt' as str;"),
        ({"prompt": "x", "completion": []}, "got 'prompt' as str, 'completion' as list;"),
        ({"text": None}, "got 'text' as NoneType;"),
        ({}, "got no field;"),
        ("text", "got str;"),
    ],
)
def test_examples_of_no_known_form_are_refused(refused, example, got):
    message = refused(encode, example, CharacterTokenizer())
    assert got in message
    assert "Pass the rows through format_alpaca or format_chat first." in message


def test_a_chat_needs_a_template(refused):
    chat = format_chat([{"instruction": "a", "output": "b"}])
    message = refused(audit_lengths, chat, CharacterTokenizer(), 8)
    assert (
        "chat examples need a chat template: got a tokenizer whose chat_template is None" in message
    )
