from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from colab_qlora.data.alpaca import format_alpaca, format_chat
from colab_qlora.data.encode import encode
from colab_qlora.data.token_view import TokenView, show_tokens, token_rows

EOS = "<|im_end|>"
ROW = {"instruction": "Name the capital.", "input": "France", "output": "Paris is <b>it</b> & so"}


class Boxes(HTMLParser):
    """Collects the token boxes as (tag, title, text) and refuses markup that it does not know."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.boxes, self.open, self.tags = [], [], set()
        self.text = ""
        self.feed(markup)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("br", "wbr"):
            return
        self.open.append(tag)
        if dict(attrs).get("class") == "cq-token":
            self.boxes.append([tag, dict(attrs).get("title"), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("ins", "span"):
            self.boxes[-1][2] += data
        elif "style" not in self.open:
            self.text += data


@pytest.mark.parametrize("form", ["text", "chat"])
def test_rows_spell_the_text_and_mark_the_completion(tokenizer, form):
    (example,) = format_alpaca([ROW], EOS) if form == "text" else format_chat([ROW])
    rows = token_rows(example, tokenizer)
    ids, start = encode(example, tokenizer)
    assert [token_id for _, token_id, _ in rows] == ids
    assert [trained for _, _, trained in rows] == [i >= start for i in range(len(ids))]
    assert "".join(text for text, _, _ in rows) == tokenizer.decode(ids)
    trained = "".join(text for text, _, trained in rows if trained)
    assert trained == ROW["output"] + EOS + ("\n" if form == "chat" else "")


def test_a_part_of_a_character_is_written_as_bytes(tokenizer):
    rows = token_rows({"prompt": "a ", "completion": "\U0001f600\u00e9\u00ad\x00"}, tokenizer)
    texts = [text for text, _, _ in rows]
    assert "\ufffd" not in "".join(texts)
    joined = "".join(texts).replace("><", "> <")
    assert re.findall(r"<0x(..)>", joined) == ["F0", "9F", "98", "80", "C3", "A9", "C2", "AD"]
    assert "\x00" in texts


def test_spaces_and_bytes_of_a_sentencepiece_tokenizer(sentencepiece_like):
    from tokenizers import processors

    begins = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    texts = ["the capital is Paris in the country of France"]
    llama_like = sentencepiece_like(texts, 300, begins)
    rows = token_rows({"prompt": "the capital", "completion": " is \u00e9"}, llama_like)
    assert rows[0] == ("<s>", 1, False)
    assert "".join(text for text, _, trained in rows if not trained) == "<s> the capital"
    assert "".join(text for text, _, trained in rows if trained) == " is <0xC3><0xA9></s>"


def test_the_window_keeps_the_first_tokens(tokenizer):
    (example,) = format_alpaca([ROW], EOS)
    rows = token_rows(example, tokenizer)
    for window in (1, 5, len(rows), len(rows) + 1):
        assert token_rows(example, tokenizer, window) == rows[:window]
        view = show_tokens(example, tokenizer, window)
        assert list(view.rows) == rows[:window]
        assert view.tokens_cut == max(0, len(rows) - window)
        assert (f"{len(rows) - window:,} token" in view.legend()) == (window < len(rows))


def test_bad_windows_are_refused(tokenizer, refused):
    (example,) = format_alpaca([ROW], EOS)
    for call in (token_rows, show_tokens):
        for window in (0, -3, 2.5, "8"):
            message = refused(call, example, tokenizer, window)
            assert f"got {window!r}; allowed: an integer from 1 up" in message


def test_unknown_examples_are_refused(tokenizer, refused):
    assert "format_alpaca" in refused(show_tokens, {"instruction": "x"}, tokenizer)


def test_text_fallback_puts_trained_tokens_in_brackets():
    view = TokenView((("Q:", 5, False), (" a\n", 6, False), (" b", 7, True), ("$", 8, True)), 3)
    assert str(view) == (
        "2 of 4 tokens trained, the rest read only. 3 tokens cut. "
        "Trained tokens are in [brackets].\nQ:\u00b7a\u21b5\n[\u00b7b][$]"
    )
    assert repr(view) == str(view)


def test_html_has_one_box_a_token_and_differs_by_more_than_colour(tokenizer):
    (example,) = format_alpaca([ROW], EOS)
    view = show_tokens(example, tokenizer)
    markup = view._repr_html_()
    page = Boxes(markup)
    assert page.tags == {"style", "div", "p", "ins", "span", "br", "wbr"}
    legend, tokens = page.boxes[:2], page.boxes[2:]
    assert [tuple(box) for box in legend] == [
        ("ins", None, "trained"),
        ("span", None, "read only"),
    ]
    assert view.legend() in page.text
    assert len(tokens) == len(view.rows)
    marks = str.maketrans({" ": "\u00b7", "\n": "\u21b5"})
    for (tag, title, text), (shown, token_id, trained) in zip(tokens, view.rows, strict=True):
        assert tag == ("ins" if trained else "span")
        assert title == f"token {token_id}, {'trained' if trained else 'read only'}"
        assert text == shown.translate(marks)
    trained_rule = re.search(r"ins\.cq-token \{border[^}]*\}", markup).group()
    other_rule = re.search(r"span\.cq-token \{border[^}]*\}", markup).group()
    assert "solid" in trained_rule and "underline" in trained_rule
    assert "dotted" in other_rule and "underline" not in other_rule


def test_html_sets_no_opaque_colour():
    markup = TokenView((("a", 1, True),))._repr_html_()
    style = markup[: markup.index("</style>")]
    assert not re.search(r"#[0-9a-fA-F]{3}", style)
    for declaration in re.findall(r"(?:color|background):\s*([^;}]+)", style):
        assert declaration.strip() in ("inherit", "transparent") or declaration.startswith("rgba(")


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "&amp;", "\"' onload=x", "</ins>"])
def test_html_is_escaped(text):
    for trained in (True, False):
        page = Boxes(TokenView(((text, 1, trained),))._repr_html_())
        assert page.boxes[2][2] == text.replace(" ", "\u00b7")
        assert page.tags <= {"style", "div", "p", "ins", "span"}


def test_white_space_is_drawn():
    rows = ((" a\tb", 1, False), ("\r\n", 2, True))
    boxes = Boxes(TokenView(rows)._repr_html_()).boxes[2:]
    assert [box[2] for box in boxes] == ["\u00b7a\u2192b", "\\r\u21b5"]


def test_a_line_may_break_between_any_two_tokens():
    view = TokenView([("a", 1, False), ("b", 2, True), ("c", 3, True)])
    boxes = view._repr_html_().split("</p>")[1]
    assert boxes.count("<wbr>") == 2
    assert [part.count("cq-token") for part in boxes.split("<wbr>")] == [1, 1, 1]
