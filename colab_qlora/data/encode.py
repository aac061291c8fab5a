"""Tokenise one example as TRL's SFTTrainer does, and say where its labels begin.

(Of two start tokens, the tokenizer's and a text's own, one is left; `SFTTrainer` sees to that.)

    prompt tokens          p0 p1 p2
    prompt + completion    p0 p1 p2 c0 c1 </s>
    labels                  -  -  - c0 c1 </s>

The full text is tokenised as a whole, because two texts tokenised apart need not give the same
tokens as their sum. The labels begin where the two token lists part. Usually that is the end of the
prompt; it is earlier where a token spans the border. (TRL before 1.0 begins them behind as many
tokens as the prompt has alone, which differs in that one case.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from colab_qlora.data.alpaca import require_chat_template
from colab_qlora.data.start_tokens import without_second_start
from colab_qlora.data.wording import shown
from colab_qlora.errors import UserError


def encode(example: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], int]:
    """Tokenise one example without truncation.

    Args:
        example: {"prompt", "completion"} as texts or as lists of messages, or {"text"}, or
            {"messages"}. The last two carry a label on every token.
        tokenizer: a Hugging Face tokenizer.

    Returns:
        Token ids, shape (tokens,), and the index of the first token that carries a label.

    Raises:
        UserError: the example has none of these forms, or is a chat and the tokenizer has no chat
            template.
    """
    if not isinstance(example, Mapping):
        _raise_unknown_form(example)
    if "prompt" in example and "completion" in example:
        prompt, completion = example["prompt"], example["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            full_ids = _text_ids(_with_eos(prompt, completion, tokenizer), tokenizer)
            return full_ids, _common_prefix(_text_ids(prompt, tokenizer), full_ids)
        if isinstance(prompt, list) and isinstance(completion, list):
            full_ids = _chat_ids(prompt + completion, tokenizer)
            prompt_ids = _chat_ids(prompt, tokenizer, add_generation_prompt=True)
            return full_ids, _common_prefix(prompt_ids, full_ids)
    elif isinstance(example.get("text"), str):
        return _text_ids(_with_eos("", example["text"], tokenizer), tokenizer), 0
    elif isinstance(example.get("messages"), list):
        return _chat_ids(example["messages"], tokenizer), 0
    _raise_unknown_form(example)
    raise AssertionError("unreachable")


def check_max_seq_length(max_seq_length: object) -> None:
    """Raise UserError unless `max_seq_length` is an integer from 1 up."""
    is_integer = isinstance(max_seq_length, int) and not isinstance(max_seq_length, bool)
    if not is_integer or max_seq_length < 1:  # type: ignore[operator]
        raise UserError(
            "max_seq_length is not a number of tokens",
            got=shown(max_seq_length),
            allowed="an integer from 1 up",
            do="Pass max_seq_length=1024, or what your model and memory allow",
        )


def _with_eos(prompt: str, completion: str, tokenizer: Any) -> str:
    # TRL puts a missing end token behind texts, but leaves chats to their template
    eos = getattr(tokenizer, "eos_token", None) or ""
    return prompt + completion + ("" if completion.endswith(eos) else eos)


def _text_ids(text: str, tokenizer: Any) -> list[int]:
    return without_second_start(list(tokenizer(text)["input_ids"]), tokenizer)


def _chat_ids(messages: list[Any], tokenizer: Any, **options: Any) -> list[int]:
    require_chat_template(tokenizer)
    # return_dict is named because its default differs between transformers 4 and 5
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(encoded["input_ids"])


def _common_prefix(prompt_ids: list[int], full_ids: list[int]) -> int:
    pairs = enumerate(zip(prompt_ids, full_ids, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(prompt_ids), len(full_ids)))


def _raise_unknown_form(example: object) -> None:
    if isinstance(example, Mapping):
        got = ", ".join(f"{shown(k)} as {type(v).__name__}" for k, v in example.items())
    else:
        got = type(example).__name__
    raise UserError(
        "the example is in none of the known forms",
        got=got or "no field",
        allowed="'prompt' and 'completion', both text or both messages; or 'text'; or 'messages'",
        do="Pass the rows through format_alpaca or format_chat first",
    )
