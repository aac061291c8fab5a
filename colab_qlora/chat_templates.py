"""What public tutorials import from a module of this name; each name is fetched when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colab_qlora.lazy import lazy_names

# public name -> the module that defines it
_EXPORTS = {
    "CHAT_TEMPLATES": "data.chat_templates",
    "apply_chat_template": "data.chat_texts",
    "check_conversation": "data.chat_texts",
    "get_chat_template": "data.chat_templates",
    "standardize_data_formats": "data.conversations",
    "standardize_sharegpt": "data.conversations",
    "to_sharegpt": "data.merge_columns",
    "train_on_responses_only": "training.responses_only",
}

__all__ = [
    "CHAT_TEMPLATES",
    "apply_chat_template",
    "check_conversation",
    "get_chat_template",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]

if TYPE_CHECKING:
    from colab_qlora.data.chat_templates import CHAT_TEMPLATES, get_chat_template
    from colab_qlora.data.chat_texts import apply_chat_template, check_conversation
    from colab_qlora.data.conversations import standardize_data_formats, standardize_sharegpt
    from colab_qlora.data.merge_columns import to_sharegpt
    from colab_qlora.training.responses_only import train_on_responses_only

__getattr__, __dir__ = lazy_names("colab_qlora", _EXPORTS, __all__)
