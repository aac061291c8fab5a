"""From rows to examples that a trainer takes: read, name, convert, check, audit, show, split.

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
from colab_qlora.data.conversations import standardize_data_formats, standardize_sharegpt
from colab_qlora.data.duplicates import DuplicateReport, drop_duplicates
from colab_qlora.data.encode import encode
from colab_qlora.data.formats import DataFormat, detect_format
from colab_qlora.data.merge_columns import to_sharegpt
from colab_qlora.data.records import Records, read_records
from colab_qlora.data.report import DataReport, data_report
from colab_qlora.data.split import check_no_overlap, find_overlap, split_rows
from colab_qlora.data.token_view import TokenView, show_tokens, token_rows

__all__ = [
    "PROMPT_WITHOUT_INPUT",
    "PROMPT_WITH_INPUT",
    "DataFormat",
    "DataReport",
    "DuplicateReport",
    "LengthReport",
    "Records",
    "TokenView",
    "alpaca_prompt",
    "audit_lengths",
    "check_labels",
    "check_no_overlap",
    "data_report",
    "detect_format",
    "drop_duplicates",
    "encode",
    "find_overlap",
    "format_alpaca",
    "format_chat",
    "read_records",
    "show_tokens",
    "split_rows",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "to_text",
    "token_rows",
    "validate_alpaca",
]
