"""The file beside an adapter that says which precision each weight of its base model has.

An adapter is trained on a base of particular errors; on a base of others it is worth less. So
`save_pretrained` and every checkpoint write `quantization_map.safetensors`: per weight E[x_j^2] of
its input, float32, as `column_weights.<name>`; and in the header, as JSON under
`colab_qlora_quantization_map`:

    version         1
    base            the checkpoint that the 16-bit weights are read from
    compute_dtype   "bfloat16", "float16" or "float32"
    budget, cap_bytes, has_data
    weights         name -> rung, bytes, price, plain_rung, plain_bytes, plain_price, why
    history         changes during training: step, name, before, after, added_bytes, why

From the same checkpoint, the same E[x_j^2] and the same rung the same bits are made again on the
same kind of machine. Nothing in the file is code, and stock PEFT leaves it alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.quantization.budget import RUNGS
from colab_qlora.quantization.dynamic import DynamicQuantization, MapChange
from colab_qlora.quantization.precision_map import Placement, PrecisionMap

FILE = "quantization_map.safetensors"
VERSION = 1
_HEADER, _COLUMNS = "colab_qlora_quantization_map", "column_weights."


@dataclass(frozen=True)
class RecordedMap:
    """What a map file holds; fields as of `DynamicQuantization`."""

    map: PrecisionMap
    column_weights: dict[str, torch.Tensor]
    budget: str
    has_data: bool
    history: list[MapChange]
    base: str
    compute_dtype: str


def save_map(state: DynamicQuantization, folder: str | Path) -> Path:
    """Write the map of a model into a folder; a file there is replaced at once or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    from safetensors.torch import save_file

    header = {
        "version": VERSION,
        "base": state.source_name,
        "compute_dtype": str(state.compute_dtype).removeprefix("torch."),
        "budget": state.budget,
        "cap_bytes": state.map.cap_bytes,
        "has_data": state.has_data,
        "weights": {name: asdict(p) for name, p in state.map.placements.items()},
        "history": [asdict(change) for change in state.history],
    }
    tensors = {
        _COLUMNS + name: values.detach().float().cpu().contiguous()
        for name, values in state.column_weights.items()
    }
    target = Path(folder) / FILE
    part = target.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, part, metadata={_HEADER: json.dumps(header)})
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def read_map(folder: str | Path) -> RecordedMap | None:
    """The map in a folder; None if there is none.

    Raises:
        UserError: a file that is not whole, or of a later version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})[_HEADER])
            columns = {
                key.removeprefix(_COLUMNS): opened.get_tensor(key)
                for key in opened.keys()  # noqa: SIM118  # safe_open is no mapping
            }
        return _parsed(header, columns)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read",
            got=f"{type(error).__name__}: {error}",
            allowed=f"a map of version {VERSION}",
            do="Copy it again from where the adapter was saved, or remove it to load plain NF4",
        ) from error


def _parsed(header: dict[str, Any], columns: dict[str, torch.Tensor]) -> RecordedMap:
    if header["version"] != VERSION:
        raise ValueError(f"version {header['version']}")
    placements = {name: Placement(**fields) for name, fields in header["weights"].items()}
    unknown = {p.rung for p in placements.values()} - set(RUNGS)
    if unknown:
        raise ValueError(f"rungs {', '.join(sorted(map(repr, unknown)))}")
    return RecordedMap(
        PrecisionMap(placements, int(header["cap_bytes"])),
        columns,
        str(header["budget"]),
        bool(header["has_data"]),
        [MapChange(**change) for change in header["history"]],
        str(header["base"]),
        str(header["compute_dtype"]),
    )
