"""The 16-bit matrices of a checkpoint, one at a time, from memory-mapped safetensors.

Nothing is held: a matrix is read when it is asked for and belongs to the caller. So an 8B's 16 GB
are never in memory together, neither on loading nor when a module changes its precision in the
middle of a training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from colab_qlora.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class SourceGone(UserError):
    """The 16-bit checkpoint, or a part of it, is no longer where it was."""


class WeightSource:
    """Reads weights by the name of their module.

    Args:
        files: tensor name -> file that holds it.

    Attributes:
        files: as given.
    """

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files

    @classmethod
    def of_checkpoint(cls, name: str, **hub: Any) -> WeightSource:
        """Of a model folder, or of a hub model that is in the cache.

        Args:
            name: folder or hub id.
            **hub: token, revision; as of transformers.

        Raises:
            UserError: no safetensors, or weights that are not 16 or 32 bit.
        """
        index = _find(name, INDEX, hub)
        if index is not None:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {tensor: index.parent / file for tensor, file in weight_map.items()}
        else:
            single = _find(name, SINGLE, hub)
            if single is None:
                raise UserError(
                    f"{name} has no safetensors to read 16-bit weights from",
                    allowed=f"{SINGLE}, or shards with {INDEX}",
                    do='Convert it with model.save_pretrained(folder), or leave quantization="nf4"',
                )
            files = dict.fromkeys(_keys(single), single)
        return cls(files)

    def __contains__(self, name: str) -> bool:
        return f"{name}.weight" in self.files

    def __call__(self, name: str) -> torch.Tensor:
        """The matrix of a module, (rows, columns), on the CPU, in the dtype it is stored in.

        Raises:
            SourceGone: its file is gone or can no longer be read.
            UserError: there is no such weight, or it is quantised.
        """
        from safetensors import SafetensorError, safe_open

        key = f"{name}.weight"
        file = self.files.get(key)
        if file is None:
            raise UserError(
                f"the checkpoint has no weight of {name}",
                got=f"{len(self.files)} tensors",
                do="Load the checkpoint that the model was made from",
            )
        try:
            with safe_open(file, framework="pt") as opened:
                weight = opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise SourceGone(
                f"the 16-bit weight of {name} cannot be read any more",
                got=f"{file}: {error}",
                do="Put the checkpoint back where it was when the model was loaded",
            ) from error
        if not weight.is_floating_point() or weight.ndim != 2:
            raise UserError(
                f"the weight of {name} in the checkpoint is quantised already",
                got=f"{str(weight.dtype).removeprefix('torch.')} of shape {tuple(weight.shape)}",
                allowed="a matrix in 16 or 32 bit",
                do="Load the model's 16-bit checkpoint",
            )
        return weight


def _find(name: str, file: str, hub: dict[str, Any]) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from transformers.utils import cached_file

    options = {key: hub[key] for key in ("token", "revision") if hub.get(key)}
    found = cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, local_files_only=True, **options
    )
    return None if found is None else Path(found)


def _keys(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
