"""The key-value cache under the names it has had: `cache` from transformers 5.24, `past_key_values`
before.

Newer releases take the old name too, with a warning; so what came under a name is passed on under
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

_NAMES = ("cache", "past_key_values")


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The key-value cache that a call was given, or None."""
    return next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)


def cache_field(output_class: Any) -> str:
    """The name of the cache among the fields of a transformers output class."""
    names = {field.name for field in fields(output_class)}
    return next(name for name in _NAMES if name in names)
