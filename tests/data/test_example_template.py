"""Chat formats read from an example with {SYSTEM}, {INPUT} and {OUTPUT}."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from colab_qlora.data.chat_texts import apply_chat_template

transformers = pytest.importorskip("transformers")

INTRO = "Below is an instruction. Answer it."
ALPACA = f"{INTRO}\n\n### Instruction:\n{{INPUT}}\n\n### Response:\n{{OUTPUT}}"
HEAD = "<|head|>{}\n\n"
LLAMA_TURN = f"{HEAD.format('user')}{{INPUT}}<|eot|>{HEAD.format('assistant')}{{OUTPUT}}<|eot|>"
LLAMA = f"<s>{HEAD.format('system')}{{SYSTEM}}<|eot|>{LLAMA_TURN}"

ONE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
TWO = [*ONE, {"role": "user", "content": "Who"}, {"role": "assistant", "content": "Me"}]
SYSTEM = {"role": "system", "content": "Be kind"}


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    """Single bytes, special tokens, and a bos that is added to every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    def make(*tokens: str) -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens(["<s>", "</s>", "<pad>", *tokens])
        bos = ("<s>", inner.token_to_id("<s>"))
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )

    return make


def _texts(tokenizer: Any, template: str, *conversations: Any, **options: Any) -> list[str]:
    rows = [{"conversations": messages} for messages in conversations]
    done = apply_chat_template(rows, tokenizer=tokenizer, chat_template=template, **options)
    return [row["text"] for row in done]


def test_one_turn_repeats_its_heading_from_the_last_blank_line(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    turn = "\n\n### Instruction:\n{}\n\n### Response:\n{}</s>"
    first = INTRO + turn.format("Hello", "Hi")
    assert _texts(tokenizer, ALPACA, ONE, TWO) == [first, first + turn.format("Who", "Me")]
    # a question, which the tokenizer lays out from now on
    asked = tokenizer.apply_chat_template(ONE[:1], tokenize=False, add_generation_prompt=True)
    assert first.startswith(asked.removeprefix("<s>")) and asked.endswith("### Response:\n")
    ids = tokenizer(first)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [LLAMA, LLAMA + LLAMA_TURN])
def test_the_token_behind_an_answer_ends_it(
    make_tokenizer: Callable[..., Any], template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer("<|head|>", "<|eot|>")
    written = LLAMA.removeprefix("<s>").replace("{SYSTEM}", "Be kind")
    one = written.replace("{INPUT}", "Hello").replace("{OUTPUT}", "Hi")
    two = one + LLAMA_TURN.replace("{INPUT}", "Who").replace("{OUTPUT}", "Me")
    assert _texts(tokenizer, template, [SYSTEM, *ONE], [SYSTEM, *TWO]) == [one, two]
    assert "{SYSTEM} is empty where a conversation brings none" in capsys.readouterr().out
    assert tokenizer.eos_token == "<|eot|>"
    # a default stands in for a system text, and a text goes before it
    given = {"default_system_message": "Be kind"}
    assert _texts(tokenizer, template, TWO, **given) == [two]
    other = {"role": "system", "content": "Be short"}
    [short] = _texts(tokenizer, template, [other, *TWO], **given)
    assert short == two.replace("kind", "short")
    assert capsys.readouterr().out == ""
    tokens = tokenizer.apply_chat_template(TWO, tokenize=True, return_dict=True)["input_ids"]
    assert tokenizer.decode(tokens) == "<s>" + two


def test_a_plain_system_text(make_tokenizer: Callable[..., Any]) -> None:
    template = "{SYSTEM}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}"
    texts = _texts(make_tokenizer(), template, TWO, default_system_message='Say "yes"')
    assert texts == [
        'Say "yes"\nUSER: Hello\nASSISTANT: Hi</s>\nUSER: Who\nASSISTANT: Me</s>',
    ]


def test_a_formats_name(make_tokenizer: Callable[..., Any], refused: Callable[..., str]) -> None:
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>")
    chatml = "<|im_start|>{}\n{}<|im_end|>\n".format
    turns = chatml("user", "Hello") + chatml("assistant", "Hi")
    assert _texts(tokenizer, "chatml", ONE) == [turns]
    [kind] = _texts(tokenizer, "chatml", ONE, default_system_message="Be kind")
    assert kind == chatml("system", "Be kind") + turns
    rows = [{"conversations": ONE}]
    assert "chat_template is unknown: got 'chat-ml'" in refused(
        apply_chat_template, rows, tokenizer, chat_template="chat-ml"
    )
    assert "default_system_message needs a chat_template" in refused(
        apply_chat_template, rows, tokenizer, default_system_message="Be kind"
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("Q: {INPUT}", "got {INPUT} in 'Q: {INPUT}'; allowed: {INPUT} {OUTPUT}, once or twice"),
        ("{OUTPUT} {INPUT}", "got {OUTPUT} {INPUT} in "),
        ("{INPUT} {SYSTEM} {OUTPUT}", "got {INPUT} {SYSTEM} {OUTPUT} in "),
        ("U {INPUT} A {OUTPUT} U {INPUT} B {OUTPUT}", "allowed: two turns written alike"),
        ("V {INPUT} A {OUTPUT} U {INPUT} A {OUTPUT}", "allowed: two turns written alike"),
        ("U {INPUT} A {OUTPUT} U {INPUT} A {OUTPUT}.", "allowed: two turns written alike"),
    ],
)
def test_an_example_that_is_none(
    make_tokenizer: Callable[..., Any], refused: Callable[..., str], template: str, said: str
) -> None:
    tokenizer = make_tokenizer()
    message = refused(apply_chat_template, [{"messages": ONE}], tokenizer, chat_template=template)
    assert message.startswith("chat_template cannot be read as an example") and said in message
    assert tokenizer.chat_template is None


def test_what_has_no_place(make_tokenizer: Callable[..., Any], refused: Callable[..., str]) -> None:
    rows, tokenizer = [{"messages": [SYSTEM, *ONE]}], make_tokenizer()
    options = {"chat_template": ALPACA, "default_system_message": "Be kind"}
    assert "default_system_message has no place" in refused(
        apply_chat_template, rows, tokenizer, **options
    )
    message = refused(apply_chat_template, rows, tokenizer, chat_template=ALPACA)
    assert "row 0 does not fit" in message and "turn 1 has the role system" in message
