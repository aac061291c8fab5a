"""Chat formats beside the packages in which the models' authors publish them.

`test_chat_templates.py` compares with texts that were written by hand from the sources that
`ChatFormat.source` names. Here the authors' own code lays out the same conversations: Meta's
`llama-models` for llama-3, Mistral's `mistral-common` for mistral (version 3), and LMSYS' `fschat`
for vicuna. A package that is not installed is skipped. To install them beside the kit, and without
what they depend on, since some ask for an older numpy:

    pip install --target /tmp/authors --no-deps llama-models mistral-common fschat \
        tiktoken sentencepiece pydantic-extra-types pycountry
    PYTHONPATH=/tmp/authors pytest -rs tests/data/test_published_templates.py
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest

from colab_qlora.data.chat_templates import get_chat_template
from colab_qlora.data.template_texts import BY_NAME

transformers = pytest.importorskip("transformers")

from test_chat_templates import (  # noqa: E402
    ONE,
    SEVERAL,
    SYSTEM,
    assistant,
    authors_tokenizer,
    rendered,
    user,
)

ALPHABETS = [user("Caf\u00e9 \U0001f600 <b>'q'</b>"), assistant("\u4f60\u597d\n\n1 + 1 = 2")]
# one that ends with a question is laid out for an answer
CONVERSATIONS = {
    "question": ONE[:1],
    "turn": ONE,
    "several turns": SEVERAL,
    "several and question": [*SEVERAL, user("One line\nand another")],
    "system question": SYSTEM + ONE[:1],
    "system turn": SYSTEM + ONE,
    "other alphabets": ALPHABETS,
}
# lays a conversation out as a text
Authors = Callable[[list[dict[str, str]]], str]


def kits_text(name: str, messages: list[dict[str, str]], bos: str = "") -> str:
    """What the kit lays out, with the authors' name of the start token."""
    tokenizer = get_chat_template(authors_tokenizer(BY_NAME[name]), name)
    return rendered(tokenizer, messages, is_question(messages)).replace("<bos>", bos)


def is_question(messages: list[dict[str, str]]) -> bool:
    return messages[-1]["role"] == "user"


@pytest.fixture(scope="module")
def meta() -> Authors:
    """Text of the tokens that `llama-models` makes of a dialogue of Llama 3."""
    why = "llama-models is not installed: pip install llama-models tiktoken"
    pytest.importorskip("tiktoken", reason=why)
    module = pytest.importorskip("llama_models.llama3.chat_format", reason=why)
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.tokenizer import Tokenizer

    with resources.as_file(resources.files("llama_models.llama3") / "tokenizer.model") as file:
        tokenizer = Tokenizer(file)
    chat_format = module.ChatFormat(tokenizer)
    head = "<|start_header_id|>assistant<|end_header_id|>\n\n"

    def lay_out(messages: list[dict[str, str]]) -> str:
        # only the end of an answer is to be named, as a tool call would end otherwise
        ends = [
            {"stop_reason": "end_of_turn"} if m["role"] == "assistant" else {} for m in messages
        ]
        raw = [RawMessage(**m, **end) for m, end in zip(messages, ends, strict=True)]
        text = tokenizer.decode(chat_format.encode_dialog_prompt(raw).tokens)
        assert text.endswith(head)
        # it always opens an answer
        return text if is_question(messages) else text.removesuffix(head)

    return lay_out


@pytest.fixture(scope="module")
def mistral() -> Authors:
    """Text of the tokens that `mistral-common` makes of a conversation in version 3."""
    why = "mistral-common is not installed: pip install mistral-common sentencepiece"
    pytest.importorskip("sentencepiece", reason=why)
    module = pytest.importorskip("mistral_common.tokens.tokenizers.mistral", reason=why)
    from mistral_common.protocol.instruct import messages as kinds
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode

    vocabulary = (
        resources.files("mistral_common.data") / "mistral_instruct_tokenizer_240323.model.v3"
    )
    made = {
        "user": kinds.UserMessage,
        "assistant": kinds.AssistantMessage,
        "system": kinds.SystemMessage,
    }

    def lay_out(messages: list[dict[str, str]]) -> str:
        asks = ValidationMode.test if is_question(messages) else ValidationMode.finetuning
        with resources.as_file(vocabulary) as file:
            tokenizer = module.MistralTokenizer.from_file(str(file), mode=asks)
        request = ChatCompletionRequest(
            messages=[made[message["role"]](content=message["content"]) for message in messages]
        )
        tokens = tokenizer.encode_chat_completion(request).tokens
        return spelled(tokenizer.instruct_tokenizer.tokenizer, tokens)

    return lay_out


def spelled(tokenizer: Any, tokens: list[int]) -> str:
    """Text of sentencepiece's tokens: its pieces with "_" for a space, and single bytes."""
    found = b""
    for token in tokens:
        piece = tokenizer.id_to_piece(token)
        is_byte = len(piece) == 6 and piece.startswith("<0x")
        found += bytes([int(piece[1:-1], 16)]) if is_byte else piece.encode()
    return found.decode().replace("\u2581", " ")


@pytest.fixture(scope="module")
def lmsys() -> Authors:
    """The prompt that `fschat` makes of a conversation with Vicuna 1.1."""
    why = "fschat is not installed: pip install fschat"
    module = pytest.importorskip("fastchat.conversation", reason=why)

    def lay_out(messages: list[dict[str, str]]) -> str:
        conversation = module.get_conv_template("vicuna_v1.1")
        for message in messages:
            if message["role"] == "system":
                conversation.set_system_message(message["content"])
            else:
                place = 0 if message["role"] == "user" else 1
                conversation.append_message(conversation.roles[place], message["content"])
        if is_question(messages):
            conversation.append_message(conversation.roles[1], None)
        text = conversation.get_prompt()
        assert isinstance(text, str)
        return text

    return lay_out


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_llama_3_is_metas(meta: Authors, name: str) -> None:
    messages = CONVERSATIONS[name]
    assert kits_text("llama-3", messages, "<|begin_of_text|>") == meta(messages)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_mistral_is_mistrals(mistral: Authors, name: str) -> None:
    messages = CONVERSATIONS[name]
    assert kits_text("mistral", messages, "<s>") == mistral(messages)


def test_mistral_puts_a_system_text_elsewhere_in_later_turns(mistral: Authors) -> None:
    # the one difference, which `template_texts.py` gives the reason of
    messages = [*SYSTEM, *SEVERAL, user("And now")]
    ours, theirs = kits_text("mistral", messages, "<s>"), mistral(messages)
    assert ours.replace("Be kind\n\n", "") == theirs.replace("Be kind\n\n", "")
    assert ours.index("Be kind") < ours.index("Hello") < theirs.index("Be kind")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_vicuna_is_lmsys(lmsys: Authors, name: str) -> None:
    messages = CONVERSATIONS[name]
    assert kits_text("vicuna", messages) == lmsys(messages)
