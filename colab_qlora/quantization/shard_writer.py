"""Write a checkpoint folder in shards: one shard in memory at a time, and all of it or nothing.

Everything goes into a hidden folder beside the target, which is renamed at the very end; where the
target is there and empty, into one inside it, whose files are moved. Whatever stops it before (a
full disk, an interrupt, a weight that cannot be read) removes that folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from colab_qlora.disk import check_space, readable_write_errors
from colab_qlora.errors import UserError
from colab_qlora.quantization.weight_source import INDEX, SINGLE
from colab_qlora.whole_files import check_new, hidden_folder, whole_files

MAX_SHARD_BYTES = 2 * 2**30
# config, tokenizer and index: a large vocabulary's tokenizer.json has 20 to 35 MB
OTHER_FILES_BYTES = 40 * 2**20
_NO_ROOM = "Free some space, or choose a folder on another disk; nothing was written"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a checkpoint that is made when its shard is written.

    Attributes:
        name: in the checkpoint.
        shape, dtype: of what `make` will give.
        make: gives it, on any device.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stored(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> PlannedTensor:
    """A tensor that is there already, written in `dtype` if one is given."""
    kind = dtype or tensor.dtype
    # a copy, since safetensors refuses tensors that share memory
    return PlannedTensor(
        name,
        tuple(tensor.shape),
        kind,
        lambda: tensor.detach().to("cpu", kind, copy=True),
    )


def write_checkpoint(
    folder: str | PathLike[str],
    tensors: Sequence[PlannedTensor],
    *,
    config: Any,
    generation_config: Any = None,
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a folder that `from_pretrained` of transformers reads.

    Args:
        folder: does not exist yet, or is empty.
        tensors: in the order in which they are written.
        config, generation_config, tokenizer: have save_pretrained; the last two may be None.
        max_shard_bytes: of a shard's tensors, above 0; a larger tensor has a shard of its own.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something, the disk is full or too small, or it cannot be
            written; there is then no new file anywhere.
    """
    _check_shard_bytes(max_shard_bytes)
    target = check_new(folder, do="Choose another folder, or delete this one first")
    shards = split_into_shards(tensors, max_shard_bytes)
    # one that is there may be a link or a mount point, whose place no other folder can take
    write = whole_files if target.is_dir() else _all_or_nothing
    with write(target, sum(tensor.bytes for tensor in tensors) + OTHER_FILES_BYTES) as partial:
        # the small files first: what is wrong with them is seen before gigabytes are written
        for part in (config, generation_config, tokenizer):
            if part is not None:
                part.save_pretrained(partial)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = SINGLE if len(shards) == 1 else file
            _write_shard(partial / file, shard)
            weight_map.update(dict.fromkeys((tensor.name for tensor in shard), file))
        if len(shards) > 1:
            _write_index(partial / INDEX, tensors, weight_map)
    return target


def split_into_shards(
    tensors: Sequence[PlannedTensor], max_shard_bytes: int
) -> list[list[PlannedTensor]]:
    """Cut into runs of at most `max_shard_bytes`, in order; at least one, which may be empty."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _write_shard(file: Path, shard: Sequence[PlannedTensor]) -> None:
    from safetensors.torch import save_file

    made = {}
    for tensor in shard:
        made[tensor.name] = tensor.make().to("cpu").contiguous()
        found = made[tensor.name].shape, made[tensor.name].dtype
        assert found == (tensor.shape, tensor.dtype), f"{tensor.name}: {found}"
    # what transformers asks for before it reads a file
    save_file(made, file, metadata={"format": "pt"})


def _write_index(file: Path, tensors: Sequence[PlannedTensor], weight_map: dict[str, str]) -> None:
    total = sum(tensor.bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_shard_bytes(max_shard_bytes: Any) -> None:
    is_number = isinstance(max_shard_bytes, int) and not isinstance(max_shard_bytes, bool)
    if not is_number or max_shard_bytes < 1:
        raise UserError(
            "max_shard_bytes is not a number of bytes",
            got=repr(max_shard_bytes),
            allowed="an integer above 0",
            do="Pass max_shard_bytes=2 * 2**30 for shards of 2 GiB",
        )


@contextmanager
def _all_or_nothing(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder beside the target that gets its name if nothing fails, and else disappears."""
    partial = hidden_folder(target.parent)
    try:
        with readable_write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            check_space(target.parent, needed_bytes, "this checkpoint", target, _NO_ROOM)
            partial.mkdir()
            yield partial
            partial.rename(target)
    finally:
        # gone already where it was renamed
        shutil.rmtree(partial, ignore_errors=True)
