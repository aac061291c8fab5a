"""The data report: counted by hand on small rows of every layout, drawn, and said."""

from __future__ import annotations

import pytest

from colab_qlora import UserError
from colab_qlora.data import data_report
from colab_qlora.data.report import script_shares
from colab_qlora.teaching.data_picture import PARTS, draw_data, token_parts

ALPACA = [
    {"instruction": "a b", "input": "", "output": "c d e"},
    {"instruction": "f", "input": "", "output": "g"},
    {"instruction": "a b", "input": "", "output": "c d e"},
]


class Words:
    """A tokenizer of words: a chat is its contents between marks, and ends with one."""

    eos_token = "</s>"
    chat_template = "yes"

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.replace("</s>", " </s>").split()]}

    def apply_chat_template(self, messages, *, add_generation_prompt=False, **options):
        ids = []
        for message in messages:
            ids += [90 if message["role"] == "user" else 91, *self(message["content"])["input_ids"]]
        return {"input_ids": [*ids, 91] if add_generation_prompt else [*ids, 99]}


def test_alpaca_rows_are_counted():
    # user mark, words, assistant mark, words, end: 2 + 3 + 3 and 2 + 1 + 1 + 1
    report = data_report(ALPACA, Words(), 6, eval_rows=ALPACA[1:2])
    assert report.row_tokens == (8, 5, 8)
    assert report.row_labels == (4, 2, 4)
    assert (report.lengths.rows_truncated, report.lengths.tokens_max) == (2, 8)
    assert report.duplicates.dropped == ((2, 0),)
    assert report.overlap == ((1, 0),)
    assert token_parts(report) == {"learnt": 2 + 2 + 2, "read only": 4 + 3 + 4, "cut off": 2 + 2}
    words = report.sentences()
    assert "1 row is among the eval rows too" in words[3]
    assert "1 of 3 rows repeats an earlier row" in words[2]
    assert words[4] == "Letters: Latin 100.0%."


@pytest.mark.parametrize(
    ("rows", "tokens", "labels"),
    [
        ([{"text": "a b c"}], (4,), (4,)),
        ([{"prompt": "a b ", "completion": "c"}], (4,), (2,)),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b"},
                    ]
                }
            ],
            (5,),
            (5,),
        ),
        (
            [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b c"}]}],
            (6,),
            (6,),
        ),
    ],
    ids=["text", "prompt and completion", "messages", "ShareGPT"],
)
def test_every_layout_is_taken(rows, tokens, labels):
    report = data_report(rows, Words(), 100)
    assert (report.row_tokens, report.row_labels, report.overlap) == (tokens, labels, None)
    assert report.lengths.rows_truncated == 0


class CountingWords(Words):
    """Keeps the texts that it was asked to tokenise."""

    chat_template = None

    def __init__(self):
        self.texts = []

    def __call__(self, text):
        self.texts.append(text)
        return super().__call__(text)


def test_every_row_is_tokenised_once():
    tokenizer = CountingWords()
    data_report([{"text": "a b c"}, {"text": "d"}], tokenizer, 100)
    assert tokenizer.texts == ["a b c</s>", "d</s>"]
    tokenizer = CountingWords()
    data_report([{"prompt": "a b ", "completion": "c"}], tokenizer, 100)
    # the whole text, and the prompt alone for the place where labels begin
    assert sorted(tokenizer.texts) == ["a b ", "a b c</s>"]


def test_the_window_is_checked_before_anything_is_tokenised():
    tokenizer = CountingWords()
    with pytest.raises(UserError, match="max_seq_length is not a number of tokens: got 0"):
        data_report([{"text": "a b c"}], tokenizer, 0)
    assert tokenizer.texts == []


def test_alpaca_text_where_there_is_no_chat_template():
    tokenizer = Words()
    tokenizer.chat_template = None
    report = data_report(ALPACA, tokenizer, 100)
    assert report.row_tokens[0] > 20, "the headings of the Alpaca prompt"
    assert report.row_labels[0] == 4  # three words and the end


def test_scripts_are_told_by_their_letters():
    rows = [
        {"text": "abcd 123 !"},
        {"text": "\u0433\u0434\u0435"},
        {"messages": [{"role": "x", "content": "\u4f60\u597d"}]},
    ]
    shares = dict(script_shares(rows))
    assert shares == {"Latin": 4 / 9, "Cyrillic": 3 / 9, "CJK": 2 / 9}
    assert script_shares([{"text": "123"}]) == ()
    few = script_shares([{"text": "a" * 1000 + "\u044f" * 2 + "\u4f60" * 2}])
    assert few == (("Latin", 1000 / 1004), ("other", 4 / 1004))


def test_the_picture_shows_all_tokens(tmp_path):
    figure = draw_data(data_report(ALPACA, Words(), 6))
    wide = {
        patch.get_gid(): patch.get_width()
        for patch in figure.get_children()
        if patch.get_gid() in PARTS
    }
    parts = {"learnt": 6, "read only": 11, "cut off": 4}
    total = sum(wide.values())
    assert {name: round(21 * share / total, 6) for name, share in wide.items()} == parts
    (axes,) = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == len(ALPACA)
    figure.savefig(tmp_path / "report.png")
    # a window far beyond the rows is said, and does not press them together
    far = draw_data(data_report(ALPACA, Words(), 4096))
    assert far.axes[0].get_xlim()[1] < 20
    (said,) = [text.get_text() for text in far.texts if text.get_gid() == "window"]
    assert said == "max_seq_length 4,096, beyond all rows"


def test_rows_of_no_layout_are_refused():
    with pytest.raises(UserError):
        data_report([{"a": 1}], Words(), 10)
