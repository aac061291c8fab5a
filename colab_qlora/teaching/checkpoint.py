"""Read one weight matrix from a model folder without loading anything else.

safetensors files start with an index of their tensors, so that one tensor costs the reading of its
own bytes only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def read_weight(config: Any, module_name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The weight of a module as the checkpoint has it.

    Args:
        config: the model's config; its `_name_or_path` is a folder, or a hub id whose files are in
            the local cache. Nothing is downloaded.
        module_name: full name of the module, without ".weight".
        shape: the shape that the weight must have, (out_features, in_features).

    Returns:
        The tensor on the CPU in the dtype of the file (normally 16 bits), or None where the folder
        is gone, or the weight is quantised there or has another name or shape.
    """
    # a checkpoint of the bare model without its head has names without "model."
    for name in (module_name, module_name.removeprefix("model.")):
        key = f"{name}.weight"
        file = _file_with(config, key)
        if file is not None:
            return _read(file, key, shape)
    return None


def _file_with(config: Any, key: str) -> Path | None:
    from safetensors import safe_open

    whole = _find(config, _ONE_FILE)
    if whole is not None:
        with safe_open(whole, framework="pt") as tensors:
            return whole if key in tensors.keys() else None  # noqa: SIM118  # not a dict
    index = _find(config, _INDEX)
    if index is None:
        return None
    file_name = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(key)
    return None if file_name is None else _find(config, file_name)


def _find(config: Any, file_name: str) -> Path | None:
    """The file in the model folder or in the hub's cache on this disk."""
    name = getattr(config, "_name_or_path", "") or ""
    if not name:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file_name if (folder / file_name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        revision = getattr(config, "_commit_hash", None)
        found = try_to_load_from_cache(name, file_name, revision=revision)
    except HFValidationError:  # a folder that has been deleted is no hub id either
        return None
    return Path(found) if isinstance(found, str) else None


def _read(file: Path, key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        if tuple(tensors.get_slice(key).get_shape()) != shape:
            return None  # 4-bit codes, two in a byte, have the shape (n / 2, 1)
        weight = tensors.get_tensor(key)
    return weight if weight.dtype in _FLOATS else None
