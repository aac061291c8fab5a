"""Chat formats by name: what is written, what ends a turn, and what a vocabulary may lack."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colab_qlora.data.chat_templates import PAD_CANDIDATES, get_chat_template
from colab_qlora.data.chat_texts import apply_chat_template, check_conversation
from colab_qlora.data.template_parts import ChatFormat
from colab_qlora.data.template_texts import BY_NAME, FORMATS

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = [{"role": "system", "content": "Be kind"}]
ONE = [user("Hello"), assistant("Hi there")]
SEVERAL = [*ONE, user("Who are you"), assistant("A machine")]

_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_CHATML_ONE = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>\n"
_CHATML_REST = (
    "<|im_start|>user\nWho are you<|im_end|>\n<|im_start|>assistant\nA machine<|im_end|>\n"
)
_CHATML_ASK = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
_LLAMA_ONE = f"{_HEAD.format('user')}Hello<|eot_id|>{_HEAD.format('assistant')}Hi there<|eot_id|>"
_LLAMA_REST = (
    f"{_HEAD.format('user')}Who are you<|eot_id|>{_HEAD.format('assistant')}A machine<|eot_id|>"
)
_LLAMA_ASK = f"{_HEAD.format('user')}Hello<|eot_id|>{_HEAD.format('assistant')}"
_PHI_4_ONE = (
    "<|im_start|>user<|im_sep|>Hello<|im_end|><|im_start|>assistant<|im_sep|>Hi there<|im_end|>"
)
_LLAMA_SYSTEM = _HEAD.format("system")

# one turn, several turns, one turn with a system text, a question with a system text; written by
# hand from the definitions that `ChatFormat.source` names
EXPECTED = {
    "chatml": (
        _CHATML_ONE,
        _CHATML_ONE + _CHATML_REST,
        "<|im_start|>system\nBe kind<|im_end|>\n" + _CHATML_ONE,
        "<|im_start|>system\nBe kind<|im_end|>\n" + _CHATML_ASK,
    ),
    "llama-3": (
        "<bos>" + _LLAMA_ONE,
        "<bos>" + _LLAMA_ONE + _LLAMA_REST,
        f"<bos>{_LLAMA_SYSTEM}Be kind<|eot_id|>{_LLAMA_ONE}",
        f"<bos>{_LLAMA_SYSTEM}Be kind<|eot_id|>{_LLAMA_ASK}",
    ),
    "llama-3.1": (
        f"<bos>{_LLAMA_SYSTEM}{_DATES}<|eot_id|>{_LLAMA_ONE}",
        f"<bos>{_LLAMA_SYSTEM}{_DATES}<|eot_id|>{_LLAMA_ONE}{_LLAMA_REST}",
        f"<bos>{_LLAMA_SYSTEM}{_DATES}Be kind<|eot_id|>{_LLAMA_ONE}",
        f"<bos>{_LLAMA_SYSTEM}{_DATES}Be kind<|eot_id|>{_LLAMA_ASK}",
    ),
    "qwen-2.5": (
        f"{_QWEN}<|im_end|>\n{_CHATML_ONE}",
        f"{_QWEN}<|im_end|>\n{_CHATML_ONE}{_CHATML_REST}",
        "<|im_start|>system\nBe kind<|im_end|>\n" + _CHATML_ONE,
        "<|im_start|>system\nBe kind<|im_end|>\n" + _CHATML_ASK,
    ),
    "qwen-3": (
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nHi there<|im_end|>\n",
        f"{_CHATML_ONE}<|im_start|>user\nWho are you<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nA machine<|im_end|>\n",
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nHi there<|im_end|>\n",
        "<|im_start|>system\nBe kind<|im_end|>\n" + _CHATML_ASK,
    ),
    "mistral": (
        "<bos>[INST] Hello[/INST] Hi there</s>",
        "<bos>[INST] Hello[/INST] Hi there</s>[INST] Who are you[/INST] A machine</s>",
        "<bos>[INST] Be kind\n\nHello[/INST] Hi there</s>",
        "<bos>[INST] Be kind\n\nHello[/INST]",
    ),
    "zephyr": (
        "<|user|>\nHello</s>\n<|assistant|>\nHi there</s>\n",
        "<|user|>\nHello</s>\n<|assistant|>\nHi there</s>\n"
        "<|user|>\nWho are you</s>\n<|assistant|>\nA machine</s>\n",
        "<|system|>\nBe kind</s>\n<|user|>\nHello</s>\n<|assistant|>\nHi there</s>\n",
        "<|system|>\nBe kind</s>\n<|user|>\nHello</s>\n<|assistant|>\n",
    ),
    "vicuna": (
        f"{_VICUNA} USER: Hello ASSISTANT: Hi there</s>",
        f"{_VICUNA} USER: Hello ASSISTANT: Hi there</s>USER: Who are you ASSISTANT: A machine</s>",
        "Be kind USER: Hello ASSISTANT: Hi there</s>",
        "Be kind USER: Hello ASSISTANT:",
    ),
    "alpaca": (
        f"{_ALPACA}\n\n### Instruction:\nHello\n\n### Response:\nHi there</s>",
        f"{_ALPACA}\n\n### Instruction:\nHello\n\n### Response:\nHi there</s>\n\n"
        "### Instruction:\nWho are you\n\n### Response:\nA machine</s>",
        "Be kind\n\n### Instruction:\nHello\n\n### Response:\nHi there</s>",
        "Be kind\n\n### Instruction:\nHello\n\n### Response:\n",
    ),
    "phi-3": (
        "<|user|>\nHello<|end|>\n<|assistant|>\nHi there<|end|>\n",
        "<|user|>\nHello<|end|>\n<|assistant|>\nHi there<|end|>\n"
        "<|user|>\nWho are you<|end|>\n<|assistant|>\nA machine<|end|>\n",
        "<|system|>\nBe kind<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi there<|end|>\n",
        "<|system|>\nBe kind<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\n",
    ),
    "phi-4": (
        _PHI_4_ONE,
        f"{_PHI_4_ONE}<|im_start|>user<|im_sep|>Who are you<|im_end|>"
        "<|im_start|>assistant<|im_sep|>A machine<|im_end|>",
        "<|im_start|>system<|im_sep|>Be kind<|im_end|>" + _PHI_4_ONE,
        "<|im_start|>system<|im_sep|>Be kind<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHello<end_of_turn>\n"
        "<start_of_turn>model\nHi there<end_of_turn>\n",
        "<bos><start_of_turn>user\nHello<end_of_turn>\n"
        "<start_of_turn>model\nHi there<end_of_turn>\n"
        "<start_of_turn>user\nWho are you<end_of_turn>\n"
        "<start_of_turn>model\nA machine<end_of_turn>\n",
        "<bos><start_of_turn>user\nBe kind\n\nHello<end_of_turn>\n"
        "<start_of_turn>model\nHi there<end_of_turn>\n",
        "<bos><start_of_turn>user\nBe kind\n\nHello<end_of_turn>\n<start_of_turn>model\n",
    ),
}
EXPECTED["gemma-2"] = EXPECTED["gemma-3"] = EXPECTED["gemma"]
CASES = ((ONE, False), (SEVERAL, False), (SYSTEM + ONE, False), (SYSTEM + ONE[:1], True))
ALIASES = {
    "llama-3.2": "llama-3.1",
    "llama-3.3": "llama-3.1",
    "qwen2.5": "qwen-2.5",
    "qwen3": "qwen-3",
    "phi-3.5": "phi-3",
    "gemma2": "gemma-2",
    "gemma3": "gemma-3",
}
ALTERNATING = ("mistral", "vicuna", "alpaca", "gemma", "gemma-2", "gemma-3")


def make_tokenizer(*tokens: str, adds_bos: bool = False, **named: str | None) -> Any:
    """A tokenizer of single bytes and the given special tokens; `named` is eos_token and so on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([*tokens, *(token for token in named.values() if token)])
    if adds_bos:
        bos = named["bos_token"]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, **named
    )


def authors_tokenizer(entry: ChatFormat) -> Any:
    """One with all that a format needs, whose eos and bos are as its authors have them."""
    tokens = [*entry.markers, *([entry.turn_end] if entry.turn_end else [])]
    bos = {"bos_token": "<bos>", "adds_bos": True} if entry.writes_bos else {}
    return make_tokenizer(*tokens, eos_token=entry.eos_token, pad_token="<pad>", **bos)


def rendered(tokenizer: Any, messages: list[Any], ask: bool = False, **options: Any) -> str:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=ask, **options
    )
    assert isinstance(text, str)
    return text


def token_ids(tokenizer: Any, messages: list[Any], ask: bool = False) -> list[int]:
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=ask
    )
    return list(encoded["input_ids"])


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What was printed, which is one line or nothing."""

    def _printed() -> str:
        text = capsys.readouterr().out
        assert text.count("\n") == bool(text)
        return text.strip()

    return _printed


def test_the_table_has_every_name_once_and_says_where_it_is_from() -> None:
    assert {entry.name for entry in FORMATS} == set(EXPECTED)
    assert len(FORMATS) == len(EXPECTED)
    assert {alias: BY_NAME[alias].name for alias in ALIASES} == ALIASES
    assert len(BY_NAME) == sum(1 + len(entry.aliases) for entry in FORMATS)
    for entry in FORMATS:
        assert re.fullmatch(r"https://[\w.-]+/\S+", entry.source), entry.name


@pytest.mark.parametrize("case", range(4), ids=["one turn", "several", "system", "question"])
@pytest.mark.parametrize("name", [*EXPECTED, *ALIASES])
def test_text_and_tokens_are_what_the_authors_define(
    name: str, case: int, printed: Callable[[], str]
) -> None:
    entry = BY_NAME[name]
    tokenizer = authors_tokenizer(entry)
    size = len(tokenizer)
    assert get_chat_template(tokenizer, name) is tokenizer
    assert printed() == "" and len(tokenizer) == size
    messages, ask = CASES[case]
    text = EXPECTED[ALIASES.get(name, name)][case]
    assert rendered(tokenizer, messages, ask) == text

    ids = token_ids(tokenizer, messages, ask)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.eos_token_id) >= sum(m["role"] == "assistant" for m in messages)
    if entry.writes_bos:
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", EXPECTED)
def test_the_end_of_a_turn_becomes_eos_only_if_asked(name: str) -> None:
    entry = BY_NAME[name]
    mapped = get_chat_template(authors_tokenizer(entry), name)
    assert mapped.eos_token == (entry.turn_end or entry.eos_token)
    assert mapped.convert_ids_to_tokens(mapped.eos_token_id) == mapped.eos_token
    kept = get_chat_template(authors_tokenizer(entry), name, map_eos_token=False)
    assert kept.eos_token == entry.eos_token


@pytest.mark.parametrize("name", EXPECTED)
def test_a_question_with_its_heading_begins_the_whole_conversation(name: str) -> None:
    # else the tokens before an answer would not be the ones that the model is asked with
    tokenizer = get_chat_template(authors_tokenizer(BY_NAME[name]), name)
    for messages in (ONE, SYSTEM + ONE):
        question = rendered(tokenizer, messages[:-1], ask=True)
        whole = rendered(tokenizer, messages)
        assert whole.startswith(question) and len(whole) > len(question)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("chatml", "<|im_start|>assistant\n  b \n<|im_end|>"),
        ("zephyr", "<|assistant|>\n  b \n</s>"),
        ("phi-4", "assistant<|im_sep|>  b \n<|im_end|>"),
        ("llama-3", "<|end_header_id|>\n\nb<|eot_id|>"),
        ("llama-3.1", "<|end_header_id|>\n\nb<|eot_id|>"),
        ("mistral", "[/INST] b</s>"),
        ("gemma", "<start_of_turn>model\nb<end_of_turn>"),
    ],
)
def test_white_space_around_an_answer_stays_where_the_authors_keep_it(
    name: str, answer: str
) -> None:
    tokenizer = get_chat_template(authors_tokenizer(BY_NAME[name]), name)
    text = rendered(tokenizer, [user("a"), assistant("  b \n")])
    assert answer in text


def test_phi_3_ends_a_finished_text_with_an_eos_of_its_own() -> None:
    tokenizer = get_chat_template(authors_tokenizer(BY_NAME["phi-3"]), "phi-3", map_eos_token=False)
    assert rendered(tokenizer, ONE) == EXPECTED["phi-3"][0] + "<|endoftext|>"
    assert rendered(tokenizer, SYSTEM + ONE[:1], ask=True) == EXPECTED["phi-3"][3]
    empty = [{"role": "system", "content": ""}]
    assert rendered(tokenizer, empty + ONE) == EXPECTED["phi-3"][0] + "<|endoftext|>"


def test_llama_3_1_takes_another_date() -> None:
    tokenizer = get_chat_template(authors_tokenizer(BY_NAME["llama-3.1"]), "llama-3.1")
    text = rendered(tokenizer, ONE, date_string="01 Jan 2025")
    assert text == EXPECTED["llama-3.1"][0].replace("26 Jul 2024", "01 Jan 2025")


QWEN_CONVERSATIONS = [
    [user("a"), assistant("<think>\nfirst\n</think>\n\nb"), user("c"), assistant("d")],
    [user("a"), assistant("<think>\nwhy\n</think>\n\nb")],
    [user("a"), {**assistant("b"), "reasoning_content": "\nwhy\n"}],
    [user("a"), assistant("b"), assistant("c")],
    [user("a"), assistant("<think>\nwhy\n</think>\n\nb"), assistant("c")],
    [*SYSTEM, assistant("a")],
    [user("say <think>x</think>"), assistant("b")],
]


@pytest.mark.parametrize("messages", QWEN_CONVERSATIONS)
def test_qwen_3_keeps_and_drops_reasoning_as_its_own_template(messages: list[Any]) -> None:
    reference = pytest.importorskip("trl.chat_template_utils")
    if not hasattr(reference, "qwen3_chat_template"):
        pytest.skip("this TRL has no copy of Qwen 3's own template")
    tokenizer = get_chat_template(authors_tokenizer(BY_NAME["qwen-3"]), "qwen-3")
    for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        for ask in (False, True):
            theirs = rendered(
                tokenizer, messages, ask, chat_template=reference.qwen3_chat_template, **options
            )
            assert rendered(tokenizer, messages, ask, **options) == theirs


def test_qwen_3_skips_thinking_when_told_to() -> None:
    tokenizer = get_chat_template(authors_tokenizer(BY_NAME["qwen-3"]), "qwen-3")
    text = rendered(tokenizer, ONE[:1], ask=True, enable_thinking=False)
    assert text == _CHATML_ASK + "<think>\n\n</think>\n\n"


def test_alpaca_is_the_prompt_of_this_package() -> None:
    from colab_qlora.data import format_alpaca

    tokenizer = get_chat_template(authors_tokenizer(BY_NAME["alpaca"]), "alpaca")
    [example] = format_alpaca([{"instruction": "Hello", "output": "Hi there"}], "</s>")
    assert rendered(tokenizer, ONE) == example["prompt"] + example["completion"]


@pytest.mark.model
def test_chatml_on_the_embedded_model_is_its_own_template(
    embedded_folder: Path, printed: Callable[[], str]
) -> None:
    own = transformers.AutoTokenizer.from_pretrained(embedded_folder)
    ours = transformers.AutoTokenizer.from_pretrained(embedded_folder)
    printed()
    get_chat_template(ours, "chatml")
    assert printed() == ""
    assert (ours.eos_token, ours.pad_token) == (own.eos_token, own.pad_token)
    for messages in (SYSTEM + ONE, SYSTEM + SEVERAL, SYSTEM + ONE[:1]):
        for ask in (False, True):
            assert rendered(ours, messages, ask) == rendered(own, messages, ask)
            assert token_ids(ours, messages, ask) == token_ids(own, messages, ask)
    # its own template brings a system text where there is none
    own_system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert rendered(ours, ONE) == _CHATML_ONE
    get_chat_template(ours, "chatml", system_message=own_system)
    assert rendered(ours, ONE) == rendered(own, ONE)
    assert token_ids(ours, ONE) == token_ids(own, ONE)


@pytest.mark.model
@pytest.mark.parametrize("name", EXPECTED)
def test_every_format_works_on_the_embedded_model(embedded_folder: Path, name: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_folder)
    size = len(tokenizer)
    get_chat_template(tokenizer, name)
    assert len(tokenizer) == size and tokenizer.eos_token == "<|im_end|>"
    ids = token_ids(tokenizer, SEVERAL)
    assert tokenizer.decode(ids) == rendered(tokenizer, SEVERAL)
    assert ids.count(tokenizer.eos_token_id) >= 2


def test_a_saved_tokenizer_brings_its_format_along(tmp_path: Path) -> None:
    tokenizer = get_chat_template(
        authors_tokenizer(BY_NAME["gemma"]),
        "gemma",
        mapping=SHAREGPT,
        system_message='Caf\u00e9 \U0001f600 "1"\n{% x %}',
    )
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.eos_token == "<end_of_turn>"
    text = rendered(again, [{"from": "human", "value": "Hello"}])
    assert text == (
        '<bos><start_of_turn>user\nCaf\u00e9 \U0001f600 "1"\n{% x %}\n\nHello<end_of_turn>\n'
    )


# bos


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("ask", [False, True])
def test_bos_comes_once_if_the_tokenizer_adds_it(name: str, ask: bool) -> None:
    entry = BY_NAME[name]
    tokens = [*entry.markers, *([entry.turn_end] if entry.turn_end else [])]
    tokenizer = make_tokenizer(
        *tokens, bos_token="<bos>", eos_token=entry.eos_token, pad_token="<pad>", adds_bos=True
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    get_chat_template(tokenizer, name)
    messages = SYSTEM + ONE[: 1 if ask else 2]
    ids = token_ids(tokenizer, messages, ask)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1

    # the trap: the same text, tokenised on its own
    text = rendered(tokenizer, messages, ask)
    assert list(tokenizer(text)["input_ids"]) == [tokenizer.bos_token_id, *ids]
    assert list(tokenizer(text, add_special_tokens=False)["input_ids"]) == ids
    # and what avoids it
    [row] = apply_chat_template([{"messages": messages}], tokenizer, add_generation_prompt=ask)
    assert list(tokenizer(row["text"])["input_ids"]) == ids


def test_bos_is_written_where_the_tokenizer_adds_none() -> None:
    for name, count in (("gemma", 1), ("llama-3", 1), ("chatml", 0), ("zephyr", 0)):
        entry = BY_NAME[name]
        tokens = [*entry.markers, *([entry.turn_end] if entry.turn_end else [])]
        tokenizer = make_tokenizer(
            *tokens, bos_token="<bos>", eos_token=entry.eos_token, pad_token="<pad>"
        )
        get_chat_template(tokenizer, name)
        ids = token_ids(tokenizer, ONE)
        assert ids.count(tokenizer.bos_token_id) == count, name
        [row] = apply_chat_template([{"messages": ONE}], tokenizer)
        assert list(tokenizer(row["text"])["input_ids"]) == ids


def test_a_format_with_bos_works_without_one() -> None:
    tokenizer = make_tokenizer("<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>")
    get_chat_template(tokenizer, "mistral")
    assert rendered(tokenizer, ONE) == "[INST] Hello[/INST] Hi there<|im_end|>"


# what a vocabulary lacks


def test_a_missing_end_token_is_written_as_the_own_eos(printed: Callable[[], str]) -> None:
    tokenizer = make_tokenizer("<pad>", eos_token="<|eot_id|>", pad_token="<pad>")
    size = len(tokenizer)
    get_chat_template(tokenizer, "chatml")
    assert printed() == (
        "chat template chatml: <|im_end|> is not in the vocabulary, and <|eot_id|>, the "
        "tokenizer's own eos, is written in its place; <|im_start|> is not in the vocabulary and "
        "written as plain text."
    )
    assert len(tokenizer) == size and "<|im_end|>" not in tokenizer.get_vocab()
    assert tokenizer.eos_token == "<|eot_id|>"
    assert rendered(tokenizer, ONE) == _CHATML_ONE.replace("<|im_end|>", "<|eot_id|>")
    ids = token_ids(tokenizer, ONE)
    assert ids.count(tokenizer.eos_token_id) == 2


def test_without_mapping_a_missing_end_token_is_plain_text(printed: Callable[[], str]) -> None:
    tokenizer = make_tokenizer("<|im_start|>", eos_token="</s>", pad_token="<pad>")
    size = len(tokenizer)
    get_chat_template(tokenizer, "chatml", map_eos_token=False)
    assert printed() == (
        "chat template chatml: <|im_end|> is not in the vocabulary and written as plain text."
    )
    assert rendered(tokenizer, ONE) == _CHATML_ONE
    assert token_ids(tokenizer, ONE).count(tokenizer.eos_token_id) == 0
    assert len(tokenizer) == size


def test_an_entry_that_no_text_becomes_counts_as_missing(printed: Callable[[], str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "</s>", "<pad>", "<|im_end|>", "<|", "im_end", "|>", "<", "|", ">"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="[UNK]"
    )
    assert "<|im_end|>" in tokenizer.get_vocab()
    assert len(tokenizer("<|im_end|>")["input_ids"]) > 1
    get_chat_template(tokenizer, "chatml")
    assert "<|im_end|> is not in the vocabulary, and </s>" in printed()
    assert tokenizer.eos_token == "</s>"


@pytest.mark.parametrize("name", ["chatml", "zephyr"])
def test_a_tokenizer_without_any_end_is_refused(name: str, refused: Callable[..., str]) -> None:
    tokenizer = make_tokenizer("<pad>", pad_token="<pad>")
    assert "could end a turn" in refused(get_chat_template, tokenizer, name)
    assert tokenizer.chat_template is None


# the pad token


def test_a_pad_token_of_its_own_stays(printed: Callable[[], str]) -> None:
    tokenizer = make_tokenizer("<|im_start|>", "<unk>", eos_token="<|im_end|>", pad_token="[P]")
    get_chat_template(tokenizer)
    assert tokenizer.pad_token == "[P]" and printed() == ""


@pytest.mark.parametrize("spare", PAD_CANDIDATES)
def test_a_missing_pad_token_is_taken_from_the_vocabulary(
    spare: str, printed: Callable[[], str]
) -> None:
    tokenizer = make_tokenizer("<|im_start|>", spare, eos_token="<|im_end|>")
    size = len(tokenizer)
    get_chat_template(tokenizer)
    assert tokenizer.pad_token == spare and len(tokenizer) == size
    assert printed() == (f"chat template chatml: the pad token was missing, and is now {spare}.")


def test_the_first_spare_token_is_taken() -> None:
    tokenizer = make_tokenizer(
        "<|im_start|>", *reversed(PAD_CANDIDATES), eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    assert get_chat_template(tokenizer).pad_token == PAD_CANDIDATES[0]


def test_a_pad_token_that_becomes_eos_is_replaced(printed: Callable[[], str]) -> None:
    tokenizer = make_tokenizer(
        "<|im_start|>", "<|im_end|>", eos_token="<|endoftext|>", pad_token="<|im_end|>"
    )
    get_chat_template(tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "the pad token was <|im_end|>, the end token, and is now <|endoftext|>" in printed()


def test_a_pad_token_that_is_eos_no_longer_stays(printed: Callable[[], str]) -> None:
    # as Qwen's base models have it
    tokenizer = make_tokenizer(
        "<|im_start|>", "<|im_end|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    get_chat_template(tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert printed() == ""


def test_bos_and_the_marks_of_the_format_are_never_the_pad_token(
    printed: Callable[[], str],
) -> None:
    tokenizer = make_tokenizer(
        "<|im_start|>", bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    get_chat_template(tokenizer)
    assert tokenizer.pad_token == "<|im_end|>"
    assert printed() == (
        "chat template chatml: the pad token is <|im_end|>, the end token, and the vocabulary has "
        "no spare one: a collator that hides padding hides the end token too, and the model may "
        "never stop."
    )


def test_no_pad_token_at_all_is_told(printed: Callable[[], str]) -> None:
    tokenizer = make_tokenizer("<|im_start|>", eos_token="<|im_end|>")
    size = len(tokenizer)
    get_chat_template(tokenizer)
    assert tokenizer.pad_token is None and len(tokenizer) == size
    assert "cannot be batched until you set one" in printed()


# mapping, own templates, system texts

THEIRS = [
    {"from": "system", "value": "Be kind"},
    {"from": "human", "value": "Hello"},
    {"from": "gpt", "value": "Hi there"},
]


@pytest.mark.parametrize("name", EXPECTED)
def test_mapping_reads_other_names_and_still_the_usual(name: str) -> None:
    tokenizer = get_chat_template(authors_tokenizer(BY_NAME[name]), name, mapping=SHAREGPT)
    assert rendered(tokenizer, THEIRS) == EXPECTED[name][2]
    assert rendered(tokenizer, SYSTEM + ONE) == EXPECTED[name][2]


def test_mapping_renames_the_system_role_too() -> None:
    tokenizer = authors_tokenizer(BY_NAME["gemma"])
    get_chat_template(tokenizer, "gemma", mapping={"system": "rules", "user": "you"})
    messages = [{"role": "rules", "content": "Be kind"}, {"role": "you", "content": "Hello"}]
    assert rendered(tokenizer, messages, ask=True) == EXPECTED["gemma"][3]


def test_without_mapping_other_names_are_refused() -> None:
    from jinja2 import TemplateError

    tokenizer = get_chat_template(authors_tokenizer(BY_NAME["zephyr"]), "zephyr")
    with pytest.raises(TemplateError, match="message 1 has no text"):
        rendered(tokenizer, THEIRS)
    with pytest.raises(TemplateError, match="turn 1 has the role human, not one of system, user"):
        rendered(tokenizer, [{"role": "human", "content": "Hello"}])


@pytest.mark.parametrize(
    "mapping",
    [{"rolle": "from"}, {"user": ""}, {"user": 3}, {"user": "human", "assistant": "human"}],
)
def test_a_mapping_that_says_nothing_is_refused(
    mapping: dict[str, Any], refused: Callable[..., str]
) -> None:
    tokenizer = authors_tokenizer(BY_NAME["chatml"])
    assert "mapping does not say" in refused(get_chat_template, tokenizer, "chatml", mapping)
    assert "mapping does not say" in refused(check_conversation, ONE, "chatml", mapping)


OWN = (
    "{% for m in messages %}{{ m['role'] }}={{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant={% endif %}"
)


def test_a_template_of_your_own(printed: Callable[[], str]) -> None:
    tokenizer = make_tokenizer("<end>", eos_token="</s>", pad_token="<pad>")
    get_chat_template(tokenizer, (OWN, "<end>"))
    assert tokenizer.eos_token == "<end>" and printed() == ""
    assert tokenizer.chat_template == OWN
    assert rendered(tokenizer, ONE) == "user=Hello<end>assistant=Hi there<end>"
    get_chat_template(tokenizer, [OWN, "<end>"], mapping=SHAREGPT)
    assert rendered(tokenizer, THEIRS[1:2], ask=True) == "user=Hello<end>assistant="


def test_a_template_of_your_own_whose_end_is_missing(printed: Callable[[], str]) -> None:
    tokenizer = make_tokenizer(eos_token="</s>", pad_token="<pad>")
    get_chat_template(tokenizer, (OWN, "<end>"))
    assert rendered(tokenizer, ONE) == "user=Hello</s>assistant=Hi there</s>"
    assert "<end> is not in the vocabulary, and </s>" in printed()


def test_eos_token_as_the_end_of_a_template_is_the_tokenizers(printed: Callable[[], str]) -> None:
    tokenizer = make_tokenizer(eos_token="</s>", pad_token="<pad>")
    own = OWN.replace("<end>", "{{ eos_token }}")
    get_chat_template(tokenizer, (own, "eos_token"), mapping=SHAREGPT)
    assert rendered(tokenizer, THEIRS[1:2]) == "user=Hello</s>"
    assert tokenizer.eos_token == "</s>" and printed() == ""


def test_a_system_text_for_conversations_without(refused: Callable[..., str]) -> None:
    for name in ("chatml", "mistral", "vicuna", "gemma-3", "qwen-2.5", "llama-3.1"):
        tokenizer = get_chat_template(
            authors_tokenizer(BY_NAME[name]), name, system_message="Be kind"
        )
        assert rendered(tokenizer, ONE) == EXPECTED[name][2]
        other = [{"role": "system", "content": "Be short"}]
        assert rendered(tokenizer, other + ONE) == EXPECTED[name][2].replace("kind", "short")
    bare = get_chat_template(authors_tokenizer(BY_NAME["qwen-2.5"]), "qwen-2.5", system_message="")
    assert rendered(bare, ONE) == _CHATML_ONE
    message = refused(get_chat_template, tokenizer, (OWN, "<end>"), system_message="Be kind")
    assert "Write the system text into your Jinja text" in message


@pytest.mark.parametrize("wanted", ["chat-ml", "", None, 3, ("text",), (OWN, ""), ("", "</s>")])
def test_an_unknown_format_is_refused(wanted: Any, refused: Callable[..., str]) -> None:
    tokenizer = authors_tokenizer(BY_NAME["chatml"])
    message = refused(get_chat_template, tokenizer, wanted)
    assert "allowed: chatml, llama-3, llama-3.1," in message
    assert message.endswith("Pass chat_template='chatml'.")


def test_a_near_name_is_suggested_and_a_tokenizer_is_needed(refused: Callable[..., str]) -> None:
    tokenizer = authors_tokenizer(BY_NAME["chatml"])
    assert "Pass chat_template='gemma-3'" in refused(get_chat_template, tokenizer, "gemma_3")
    assert "got NoneType" in refused(get_chat_template, None)


def test_text_parts_are_joined_and_images_refused() -> None:
    from jinja2 import TemplateError

    tokenizer = get_chat_template(authors_tokenizer(BY_NAME["gemma-3"]), "gemma-3")
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "user", "content": parts}, ONE[1]]
    assert rendered(tokenizer, messages) == EXPECTED["gemma-3"][0]
    check_conversation(messages, "gemma-3")
    with pytest.raises(TemplateError, match="message 1 has no text, or something beside"):
        rendered(tokenizer, [{"role": "user", "content": [*parts, {"type": "image"}]}])


def test_tools_are_refused() -> None:
    from jinja2 import TemplateError

    tokenizer = get_chat_template(authors_tokenizer(BY_NAME["qwen-3"]), "qwen-3")
    with pytest.raises(TemplateError, match="no place for tools"):
        rendered(tokenizer, ONE, tools=[{"type": "function", "function": {"name": "f"}}])


# conversations that a format cannot hold


@pytest.mark.parametrize("name", EXPECTED)
def test_speakers_out_of_turn(name: str, refused: Callable[..., str]) -> None:
    from jinja2 import TemplateError

    tokenizer = get_chat_template(authors_tokenizer(BY_NAME[name]), name)
    twice, answer_first = [*SYSTEM, user("a"), user("b")], [assistant("a")]
    check_conversation(SYSTEM + SEVERAL, name)
    if name not in ALTERNATING:
        for messages in (twice, answer_first):
            check_conversation(messages, name)
            assert messages[-1]["content"] in rendered(tokenizer, messages)
        return
    message = refused(check_conversation, twice, name)
    assert "got 'user' as message 3 (system user user); allowed: 'assistant' there" in message
    assert "got 'assistant' as message 1" in refused(check_conversation, answer_first, name)
    for messages in (twice, answer_first):
        with pytest.raises(TemplateError, match="have to speak in turn, beginning with user"):
            rendered(tokenizer, messages)
        message = refused(apply_chat_template, [{"messages": messages}], tokenizer)
        assert message.startswith("row 0 does not fit the chat template: got user and assistant")


def test_conversations_that_are_none(refused: Callable[..., str]) -> None:
    assert "is empty" in refused(check_conversation, [], "chatml")
    assert "message 2 has no role" in refused(check_conversation, [user("a"), "b"], "chatml")
    for content in (None, 3, [{"type": "image"}]):
        messages = [{"role": "user", "content": content}]
        assert "message 1 has no role or no text" in refused(check_conversation, messages, "phi-4")
    assert "does not know: got 'tool'" in refused(
        check_conversation, [user("a"), {"role": "tool", "content": "b"}], "qwen-3"
    )
    check_conversation([user("a"), {"role": "tool", "content": "b"}], "chatml")
    check_conversation([{"role": "anyone", "content": "b"}], (OWN, "<end>"))


def test_check_conversation_knows_the_mapping(refused: Callable[..., str]) -> None:
    check_conversation(THEIRS, "gemma", SHAREGPT)
    message = refused(check_conversation, THEIRS[:1] + THEIRS[2:], "gemma", SHAREGPT)
    assert "got 'assistant' as message 2" in message
    assert "texts as 'role' and 'content'" in refused(check_conversation, THEIRS, "gemma")


# data sets


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_rows_get_a_text(column: str) -> None:
    tokenizer = get_chat_template(authors_tokenizer(BY_NAME["phi-4"]), "phi-4")
    rows = [{"id": 7, column: ONE}, {"id": 8, column: SYSTEM + ONE}]
    done = apply_chat_template(rows, tokenizer)
    assert done == [
        {"id": 7, column: ONE, "text": EXPECTED["phi-4"][0]},
        {"id": 8, column: SYSTEM + ONE, "text": EXPECTED["phi-4"][2]},
    ]
    assert "text" not in rows[0]


def test_a_hugging_face_dataset_keeps_its_columns(refused: Callable[..., str]) -> None:
    datasets = pytest.importorskip("datasets")
    tokenizer = authors_tokenizer(BY_NAME["llama-3"])
    get_chat_template(tokenizer, "llama-3", mapping=SHAREGPT)
    rows = [{"id": 1, "chat": THEIRS[1:]}, {"id": 2, "chat": THEIRS}]
    done = apply_chat_template(
        datasets.Dataset.from_list(rows), tokenizer, column="chat", text_column="laid_out"
    )
    assert done.column_names == ["id", "chat", "laid_out"]
    # without the bos, which tokenising the text adds
    assert done["laid_out"][:] == [
        EXPECTED["llama-3"][0].removeprefix("<bos>"),
        EXPECTED["llama-3"][2].removeprefix("<bos>"),
    ]
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    assert apply_chat_template(parts, tokenizer, "chat")["train"][0]["text"]
    rows = [{"messages": ONE}, {"messages": [ONE[0], ONE[0]]}]
    gemma = get_chat_template(authors_tokenizer(BY_NAME["gemma"]), "gemma")
    assert "row 1 does not" in refused(apply_chat_template, datasets.Dataset.from_list(rows), gemma)


def test_rows_without_messages_are_refused(refused: Callable[..., str]) -> None:
    tokenizer = get_chat_template(authors_tokenizer(BY_NAME["chatml"]), "chatml")
    message = refused(apply_chat_template, [{"messages": ONE}, {"prompt": "a"}], tokenizer)
    assert message.startswith("row 1 has no messages: got 'prompt' as text; allowed: a list")
    assert "'messages' as a list" in refused(apply_chat_template, [{"messages": []}], tokenizer)
    assert "in 'chat'" in refused(apply_chat_template, [{"messages": ONE}], tokenizer, "chat")
    bare = make_tokenizer(eos_token="</s>", pad_token="<pad>")
    assert "has no chat template" in refused(apply_chat_template, [{"messages": ONE}], bare)


# imports


def test_importing_loads_no_library() -> None:
    code = (
        "import sys\nimport colab_qlora.chat_templates\n"
        "print('colab_qlora.data.chat_templates' in sys.modules)\n"
        "from colab_qlora.chat_templates import get_chat_template\n"
        "heavy = ('torch', 'transformers', 'tokenizers', 'jinja2', 'datasets')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "print(get_chat_template.__module__)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:3] == ["False", "[]", "colab_qlora.data.chat_templates"]


def test_the_module_of_the_tutorials_has_the_same_functions() -> None:
    import colab_qlora.chat_templates as tutorials

    assert tutorials.get_chat_template is get_chat_template
    assert tutorials.check_conversation is check_conversation
    assert tutorials.apply_chat_template is apply_chat_template
    assert {"chatml", "llama-3.1", "gemma3"} <= tutorials.CHAT_TEMPLATES.keys()
    assert dir(tutorials) == sorted(tutorials.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tutorials.nothing
