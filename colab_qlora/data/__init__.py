"""From a file of rows to examples that a trainer takes: read, check, format, audit, show, split.

Plain Python: a tokenizer is passed in, and no module here imports torch or transformers.
"""

from __future__ import annotations

from colab_qlora.data.alpaca import (
    PROMPT_WITH_INPUT,
    PROMPT_WITHOUT_INPUT,
    alpaca_prompt,
    format_alpaca,
    format_chat,
    to_text,
    validate_alpaca,
)
from colab_qlora.data.audit import LengthReport, audit_lengths, check_labels
from colab_qlora.data.encode import encode
from colab_qlora.data.records import Records, read_records
from colab_qlora.data.split import check_no_overlap, find_overlap, split_rows
from colab_qlora.data.token_view import TokenView, show_tokens, token_rows

__all__ = [
    "PROMPT_WITHOUT_INPUT",
    "PROMPT_WITH_INPUT",
    "LengthReport",
    "Records",
    "TokenView",
    "alpaca_prompt",
    "audit_lengths",
    "check_labels",
    "check_no_overlap",
    "encode",
    "find_overlap",
    "format_alpaca",
    "format_chat",
    "read_records",
    "show_tokens",
    "split_rows",
    "to_text",
    "token_rows",
    "validate_alpaca",
]
