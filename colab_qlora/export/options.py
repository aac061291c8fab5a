"""Keyword arguments that tutorials pass to the saving functions, one by one.

`TABLE` says of each what becomes of it; the functions take those that are honoured themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from colab_qlora.errors import UserError
from colab_qlora.host import host_memory_gib
from colab_qlora.models.peer_arguments import HONOURED, PeerArgument
from colab_qlora.quantization.shard_writer import MAX_SHARD_BYTES

# share of the free host memory that a shard may take: other parts of the export need some too
MEMORY_SHARE = 0.75
_SMALLEST_SHARD_BYTES = 64 * 2**20
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# accepted, because tutorials pass it, and said to do nothing where it asks for something
WITHOUT_EFFECT = "without effect"
MERGED, GGUF = "save_pretrained_merged", "save_pretrained_gguf"
PUSH, PUSH_MERGED, PUSH_GGUF = "push_to_hub", "push_to_hub_merged", "push_to_hub_gguf"
_SAVE, _PUSH = (MERGED, GGUF), (PUSH, PUSH_MERGED, PUSH_GGUF)
_EVERY = _SAVE + _PUSH


def _rows(verdict: str, where: tuple[str, ...], rows: Mapping[str, str]) -> Iterator[PeerArgument]:
    return (PeerArgument(name, where, verdict, what) for name, what in rows.items())


_CARD = "a model card is yours to write"
_FORMAT = "files are safetensors or GGUF always"
TABLE: tuple[PeerArgument, ...] = (
    *_rows(
        HONOURED,
        _SAVE,
        {
            "save_directory": "written whole or not at all",
            "push_to_hub": "the folder is uploaded too",
        },
    ),
    PeerArgument("repo_id", _PUSH, HONOURED, "`user/name`; made if it is not there"),
    PeerArgument("tokenizer", _EVERY, HONOURED, "saved with its chat template"),
    PeerArgument(
        "save_method",
        (MERGED, PUSH_MERGED),
        HONOURED,
        "`merged_16bit` if it is left out, `merged_4bit` or `merged_4bit_forced`, `lora`",
    ),
    PeerArgument(
        "quantization_method",
        (GGUF, PUSH_GGUF),
        HONOURED,
        "a name or a list; `q8_0` if it is left out; `q2_k` to `q6_k` want llama-cpp-python",
    ),
    PeerArgument(
        "quantization_type", (GGUF, PUSH_GGUF), HONOURED, "another name of quantization_method"
    ),
    *_rows(
        HONOURED,
        _EVERY,
        {
            "token": "None for the environment's, Colab's secret or a saved login",
            "private": "of a repository that is made",
            "maximum_memory_usage": "share of the free host memory, above 0 and at most 1",
        },
    ),
    PeerArgument("max_shard_size", (MERGED, PUSH, PUSH_MERGED), HONOURED, "2 GiB at most"),
    *_rows(
        HONOURED,
        _PUSH,
        {
            "commit_message": "of the one commit that an upload is",
            "commit_description": "as in huggingface_hub",
            "revision": "a branch, made if it is not there",
            "create_pr": "as in huggingface_hub",
        },
    ),
    *_rows(
        WITHOUT_EFFECT,
        _EVERY,
        {
            "safe_serialization": _FORMAT,
            "save_function": _FORMAT,
            "save_peft_format": "an adapter is in PEFT's format always",
            "state_dict": "weights come from the 16-bit checkpoint and the adapters",
            "temporary_location": "nothing is buffered on the disk",
            "is_main_process": "every call writes",
            "variant": "file names have no variant",
            "tags": _CARD,
            "datasets": _CARD,
        },
    ),
    PeerArgument(
        "first_conversion",
        (GGUF, PUSH_GGUF),
        WITHOUT_EFFECT,
        "the intermediate file is f16, or a 16 or 32-bit file that you asked for",
    ),
    PeerArgument("max_shard_size", (GGUF, PUSH_GGUF), WITHOUT_EFFECT, "a GGUF file is never split"),
    PeerArgument("use_temp_dir", _PUSH, WITHOUT_EFFECT, "uploads come from a temporary folder"),
)
# name -> row, of what the functions take beside their own arguments
_WITHOUT_EFFECT = {row.name: row for row in TABLE if row.verdict == WITHOUT_EFFECT}


def check_options(options: Mapping[str, Any]) -> None:
    """Say once, in one line, which keyword arguments have no effect here.

    Raises:
        UserError: an unknown one.
    """
    refuse_unknown(options)
    given = [name for name, value in options.items() if value not in (None, True)]
    if given:
        reasons = "; ".join(f"{name} ({_WITHOUT_EFFECT[name].what})" for name in given)
        print(f"colab_qlora: without an effect: {reasons}.")


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raise UserError if there is a keyword argument that is not known."""
    unknown = sorted(set(options) - _WITHOUT_EFFECT.keys())
    if unknown:
        raise UserError(
            "unknown keyword argument",
            got=", ".join(unknown),
            allowed="those of the function's help, and, without an effect, "
            + ", ".join(sorted(_WITHOUT_EFFECT)),
        )


def shard_bytes(maximum_memory_usage: float, max_shard_size: str | int | None) -> int:
    """Most bytes of a shard: both limits kept, and 2 GiB.

    Args:
        maximum_memory_usage: share of the free host memory, above 0 and at most 1. A shard takes
            at most half of it, as the tensor that is merged next to it is there as well.
        max_shard_size: bytes, or a text such as "5GB" or "500MB"; None for no limit of your own.

    Raises:
        UserError: neither of these.
    """
    is_number = isinstance(maximum_memory_usage, int | float)
    if not is_number or isinstance(maximum_memory_usage, bool) or not 0 < maximum_memory_usage <= 1:
        raise UserError(
            "maximum_memory_usage is not a share of the free memory",
            got=repr(maximum_memory_usage),
            allowed="above 0, at most 1",
            do=f"Pass maximum_memory_usage={MEMORY_SHARE}",
        )
    limits = [MAX_SHARD_BYTES]
    free_gib = host_memory_gib()[1]
    if free_gib is not None:
        share = int(free_gib * 2**30 * maximum_memory_usage / 2)
        limits.append(max(_SMALLEST_SHARD_BYTES, share))
    if max_shard_size is not None:
        limits.append(_bytes_of(max_shard_size))
    return min(limits)


def _bytes_of(size: str | int) -> int:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", str(size))
    unit = _UNITS.get(found[2].upper()) if found else None
    if not found or unit is None or float(found[1]) * unit < 1:
        raise UserError(
            "max_shard_size is not a size",
            got=repr(size),
            allowed='a number of bytes above 0, or a text such as "5GB" or "500MB"',
            do='Pass max_shard_size="2GB"',
        )
    return int(float(found[1]) * unit)
