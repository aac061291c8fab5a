from __future__ import annotations

import copy
from typing import Any

import pytest

from colab_qlora.data.response_markers import TurnMarkers, find_markers
from colab_qlora.data.response_spans import ResponseFinder, _spans_by_decoding, token_spans

CHAT = TurnMarkers("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>", True)
GIVEN = TurnMarkers("<|im_start|>user\n", "<|im_start|>assistant\n")
ALPACA = TurnMarkers("### Instruction:\n", "### Response:\n")
TURNS = [
    ("system", "Be brief."),
    ("user", "Name the capital.\n\nOf France \U0001f600"),
    ("assistant", "\nParis.\n\n  It is \u00e9l\u00e9gant \U0001f600"),
    ("user", "And   the assistant?"),
    ("assistant", " user assistant 42\n"),
]


@pytest.fixture(params=["small", "embedded"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    """The small tokenizer, and that of the embedded model."""
    if request.param == "small":
        return request.getfixturevalue("tokenizer")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(request.getfixturevalue("embedded_folder"))


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, **options)["input_ids"])


def _turn_by_turn(tokenizer: Any, turns: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    """The same row put together from parts that are tokenised apart, each trained or not."""
    ids: list[int] = []
    trained: list[bool] = []
    for role, content in turns:
        parts = [
            (f"<|im_start|>{role}\n", False),
            (content + "<|im_end|>", role == "assistant"),
            ("\n", False),
        ]
        for text, is_answer in parts:
            part = _ids(tokenizer, text)
            ids += part
            trained += [is_answer] * len(part)
    return ids, trained


def _trained(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    return tokenizer.decode([i for i, is_trained in zip(ids, mask, strict=True) if is_trained])


def _trained_text(tokenizer: Any, markers: TurnMarkers, text: str, **options: Any) -> str:
    ids = _ids(tokenizer, text)
    return _trained(tokenizer, ids, ResponseFinder(tokenizer, markers, **options).mask(ids))


@pytest.mark.parametrize("markers", [CHAT, GIVEN], ids=["template", "given"])
def test_answers_are_those_of_the_turns_tokenised_apart(any_tokenizer, markers):
    ids, expected = _turn_by_turn(any_tokenizer, TURNS)
    whole = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in TURNS)
    assert _ids(any_tokenizer, whole) == ids
    assert sum(expected) > 10
    assert ResponseFinder(any_tokenizer, markers).mask(ids) == expected
    # the first answer begins with a line break, which is the marker's then
    expected[expected.index(True)] = False
    assert ResponseFinder(any_tokenizer, markers, force_match=False).mask(ids) == expected


def test_the_template_alone_is_enough(any_tokenizer):
    messages = [{"role": role, "content": content} for role, content in TURNS]
    encoded = any_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    ids, expected = _turn_by_turn(any_tokenizer, TURNS)
    assert list(encoded["input_ids"]) == ids
    assert ResponseFinder(any_tokenizer, find_markers(any_tokenizer)).mask(ids) == expected


def test_a_row_cut_anywhere_keeps_the_labels_of_what_is_left(any_tokenizer):
    ids, expected = _turn_by_turn(any_tokenizer, TURNS)
    finder = ResponseFinder(any_tokenizer, CHAT)
    for length in range(len(ids)):
        assert finder.mask(ids[:length]) == expected[:length], length


def test_rows_without_an_answer_have_no_labels(tokenizer):
    finder = ResponseFinder(tokenizer, CHAT)
    assert finder.mask([]) == []
    for text in ("Hello", "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant"):
        ids = _ids(tokenizer, text)
        assert finder.mask(ids) == [False] * len(ids)


def test_a_token_across_the_border_is_not_trained(any_tokenizer):
    ids = _ids(any_tokenizer, "Q: x\nA: the model")
    assert " the" in [any_tokenizer.decode([i]) for i in ids]
    for marker in ("A: t", "A: the"):
        mask = ResponseFinder(any_tokenizer, TurnMarkers("Q:", marker)).mask(ids)
        assert _trained(any_tokenizer, ids, mask) == " model"
    # at its other end: the next instruction begins within " model"
    mask = ResponseFinder(any_tokenizer, TurnMarkers("mod", "A:")).mask(ids)
    assert _trained(any_tokenizer, ids, mask) == " the"


def test_the_space_before_the_first_word_is_the_answers(any_tokenizer):
    for markers in (TurnMarkers("Q:", "A:"), TurnMarkers("Q:\n", "\nA:")):
        for force_match in (True, False):
            if "\n" in markers.instruction and force_match:
                continue
            text = _trained_text(any_tokenizer, markers, "Q: x\nA: Paris", force_match=force_match)
            assert text == " Paris"


def test_without_force_match_white_space_is_the_markers(tokenizer):
    row = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\n\nYes<|im_end|>\n"
    bare = row.replace("assistant\n\n\n", "assistant")
    wide = {row: "Yes<|im_end|>", bare: "Yes<|im_end|>"}
    exact = {row: "\n\nYes<|im_end|>", bare: ""}
    for text in (row, bare):
        assert _trained_text(tokenizer, CHAT, text, force_match=False) == wide[text]
        assert _trained_text(tokenizer, CHAT, text) == exact[text]


@pytest.mark.parametrize("force_match", [True, False])
def test_a_marker_that_was_tokenised_as_plain_text_is_none(any_tokenizer, force_match):
    quoted = "a <|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
    parts = [
        ("<|im_start|>user\n", False, {}),
        (quoted, False, {"split_special_tokens": True}),
        ("<|im_end|>\n<|im_start|>assistant\n", False, {}),
        ("yes ", True, {}),
        (quoted, True, {"split_special_tokens": True}),
        ("<|im_end|>", True, {}),
    ]
    ids, expected = [], []
    for text, is_answer, options in parts:
        part = _ids(any_tokenizer, text, **options)
        ids += part
        expected += [is_answer] * len(part)
    assert any_tokenizer.decode(ids) == "".join(text for text, _, _ in parts)
    finder = ResponseFinder(any_tokenizer, CHAT, force_match=force_match)
    assert finder.mask(ids) == expected


def test_a_user_who_quotes_the_response_marker_is_not_trained_on(any_tokenizer):
    row = (
        "<|im_start|>user\nWrite <|im_start|>assistant\n twice<|im_end|>\n"
        "<|im_start|>assistant\nOk<|im_end|>\n"
    )
    assert _trained_text(any_tokenizer, CHAT, row) == "Ok<|im_end|>"


def test_a_user_who_imitates_a_whole_turn_is_trained_on(any_tokenizer):
    # token by token this is a conversation of four turns, and nothing tells that it is not one
    user = "Hi<|im_end|>\n<|im_start|>assistant\nHa<|im_end|>\n<|im_start|>user\nBye"
    row = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\nOk<|im_end|>\n"
    assert _trained_text(any_tokenizer, CHAT, row) == "Ha<|im_end|>Ok<|im_end|>"


def test_of_two_plain_markers_without_an_end_between_the_last_counts(any_tokenizer):
    turn = "### Instruction:\nWhat is {}?\n\n### Response:\n{}<|im_end|>"
    assert (
        _trained_text(any_tokenizer, ALPACA, turn.format("a\n### Response:\nin a prompt", "It is"))
        == "It is<|im_end|>"
    )
    assert (
        _trained_text(any_tokenizer, ALPACA, turn.format("x", "a ### Response:\nmarker"))
        == "marker<|im_end|>"
    )


def test_an_answer_ends_at_the_next_instruction_or_the_end_of_the_row(any_tokenizer):
    turn = "### Instruction:\nWhat?\n\n### Response:\nIt is {}.\n"
    text = turn.format(1) + turn.format(2) + turn.format(3)
    assert _trained_text(any_tokenizer, ALPACA, text) == "It is 1.\nIt is 2.\nIt is 3.\n"
    bare = _trained_text(any_tokenizer, ALPACA, text, force_match=False)
    assert bare == "It is 1.It is 2.It is 3.\n"


@pytest.mark.parametrize("markers", [CHAT, GIVEN], ids=["template", "given"])
def test_turns_of_tools_are_not_trained(any_tokenizer, markers):
    tokenizer = copy.deepcopy(any_tokenizer)
    if markers is GIVEN:  # then nothing but the next turn's first token ends an answer
        tokenizer.eos_token = "<|pad|>" if "<|pad|>" in tokenizer.get_vocab() else "<|endoftext|>"
    turns = [("user", "x"), ("assistant", "call"), ("tool", "found"), ("assistant", "y")]
    row = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    line = "" if markers is CHAT else "\n"
    expected = f"call<|im_end|>{line}y<|im_end|>{line}"
    assert _trained_text(tokenizer, markers, row) == expected


def test_an_end_of_sequence_behind_the_end_of_a_turn_is_trained_once(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<|pad|>"
    row = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    for tail, trained in (
        ("<|pad|>", "\n<|pad|>"),
        ("<|pad|><|pad|>", "\n<|pad|>"),
        ("more<|pad|>", ""),
        ("<|im_start|>user\nBye<|im_end|>\n<|pad|>", ""),
        ("", ""),
    ):
        assert _trained_text(tokenizer, CHAT, row + tail) == "Yes<|im_end|>" + trained
    # one behind a user's turn is nobody's
    assert _trained_text(tokenizer, CHAT, row.split("\n<|im_start|>a")[0] + "<|pad|>") == ""


def test_a_special_token_that_swallows_the_line_break(tokenizer):
    from tokenizers import AddedToken

    phi_like = copy.deepcopy(tokenizer)
    tokens = [AddedToken(f"<|{n}|>", rstrip=True, special=True) for n in ("user", "assistant")]
    phi_like.add_tokens(tokens, special_tokens=True)
    markers = TurnMarkers("<|user|>\n", "<|assistant|>\n", "<|im_end|>", True)
    ids = _ids(phi_like, "<|user|>\nHi<|im_end|>\n<|assistant|>\nYes<|im_end|>\n")
    assert "\nYes" not in phi_like.decode(ids)
    mask = ResponseFinder(phi_like, markers).mask(ids)
    assert _trained(phi_like, ids, mask) == "Yes<|im_end|>"


@pytest.mark.parametrize(
    "text", ["", "a", " a  b\n\n\u00e9 \U0001f600\U0001f600.", "x<|im_end|> <|im_start|>\n\ufffd y"]
)
def test_characters_of_tokens_by_offsets_and_by_decoding_agree(any_tokenizer, text):
    ids = _ids(any_tokenizer, text)
    found, spans = token_spans(ids, any_tokenizer)
    assert found == text
    decoded, decoded_spans = _spans_by_decoding(ids, any_tokenizer)
    assert decoded == text
    if "\ufffd" not in text:  # that one is waited for as the beginning of a character
        assert decoded_spans == spans
    for (start, end), token_id in zip(spans, ids, strict=True):
        own = any_tokenizer.decode([token_id])
        assert text[start:end] == own or "\ufffd" in own


def test_tokens_that_the_text_would_not_give_are_matched_all_the_same(any_tokenizer):
    # letter by letter, as no tokenizer with merges would cut it
    text = "<|im_start|>user\nCapital<|im_end|>\n<|im_start|>assistant\nParis is it<|im_end|>\n"
    ids: list[int] = []
    for piece in text.replace("<|", "\0<|").replace("|>", "|>\0").split("\0"):
        parts = [piece] if piece.startswith("<|") else list(piece)
        ids += [token for part in parts for token in _ids(any_tokenizer, part)]
    assert ids != _ids(any_tokenizer, text) and any_tokenizer.decode(ids) == text
    mask = ResponseFinder(any_tokenizer, CHAT).mask(ids)
    assert _trained(any_tokenizer, ids, mask) == "Paris is it<|im_end|>"
    assert sum(mask) == len("Paris is it") + 1


class _Pieces:
    """A tokenizer of five pieces, which gives the offsets that it is told to."""

    is_fast = True
    all_special_ids = ()
    pieces = ("a", "bc", "ab", "c", " x", "c ")

    def __init__(self, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        self.ids, self.offsets = ids, offsets

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        return {"input_ids": self.ids, "offset_mapping": self.offsets}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(self.pieces[token_id] for token_id in ids)


@pytest.mark.parametrize(
    "ids, encoded, offsets, expected",
    [
        ([0, 1], [0, 1], [(0, 1), (1, 3)], [(0, 1), (1, 3)]),
        ([0, 1], [2, 3], [(0, 2), (2, 3)], [(0, 1), (1, 3)]),
        ([0, 4], [0, 4], [(0, 1), (2, 3)], [(0, 1), (1, 3)]),
        ([0, 5], [0, 5], [(0, 1), (1, 2)], [(0, 1), (1, 3)]),
    ],
    ids=["as they are", "other tokens", "without a space", "without the last space"],
)
def test_offsets_that_are_not_the_tokens_own_are_not_used(ids, encoded, offsets, expected):
    tokenizer = _Pieces(encoded, offsets)
    assert token_spans(ids, tokenizer) == (tokenizer.decode(ids), expected)


def test_the_end_of_a_turn_is_seen_behind_a_part_of_a_character(any_tokenizer):
    tokenizer = copy.deepcopy(any_tokenizer)
    tokenizer.eos_token = "<|pad|>" if "<|pad|>" in tokenizer.get_vocab() else "<|endoftext|>"
    head = _ids(tokenizer, "<|im_start|>assistant\n")
    part = _ids(tokenizer, "\U0001f600")[:1]
    end, more = _ids(tokenizer, "<|im_end|>"), _ids(tokenizer, "\nmore")
    assert "\ufffd" in tokenizer.decode(part)
    mask = ResponseFinder(tokenizer, CHAT).mask(head + part + end + more)
    assert mask == [False] * len(head) + [True] * 2 + [False] * len(more)


def test_a_sentencepiece_tokenizer_keeps_the_answers_first_word(sentencepiece_like):
    texts = ["[INST] the capital [/INST] Paris Paris Paris"] * 4
    mistral_like = sentencepiece_like(texts, 340)
    ids = _ids(
        mistral_like, "<s>[INST] the capital [/INST] Paris \u00e9</s>[INST] the [/INST] Paris"
    )
    plain = _ids(mistral_like, "<s>[INST] the capital [/INST] Paris</s>[INST] the")
    assert _spans_by_decoding(plain, mistral_like)[0] == mistral_like.decode(plain)
    finder = ResponseFinder(mistral_like, TurnMarkers("[INST]", "[/INST]", "</s>"))
    found = [
        mistral_like.convert_ids_to_tokens(i)
        for i, trained in zip(ids, finder.mask(ids), strict=True)
        if trained
    ]
    assert found == ["\u2581Paris", "\u2581", "<0xC3>", "<0xA9>", "</s>", "\u2581Paris"]
