"""One start token, also where a text brings its own.

Chat templates of Llama, Mistral and Gemma write the start token into the text. A tutorial's
`tokenizer.apply_chat_template(messages, tokenize=False)` gives such a text, and the tokenizer puts
another start token before it: <s> <s> [INST] ... The model never saw two, and generates after one.
"""

from __future__ import annotations

from typing import Any


def without_second_start(ids: list[int], tokenizer: Any) -> list[int]:
    """Token ids with one start token where the tokenizer added one to a text's own.

    Args:
        ids: (tokens,), what the tokenizer made of a text.
        tokenizer: it names its start token.
    """
    start = getattr(tokenizer, "bos_token_id", None)
    while start is not None and len(ids) > 1 and ids[0] == ids[1] == start:
        ids = ids[1:]
    return ids


def adds_start(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its start token before every text."""
    start = getattr(tokenizer, "bos_token_id", None)
    return start is not None and list(tokenizer("a")["input_ids"])[:1] == [start]
