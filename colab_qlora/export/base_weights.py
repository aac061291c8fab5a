"""The 16-bit weights that adapters are added to, of a model that was loaded in 4 bits as well.

A model that is quantised while it is loaded is merged into the checkpoint that it came from. One
whose checkpoint is quantised already ("...-bnb-4bit") has no 16-bit weights of its own: those of
the checkpoint that it was made from are taken, which is named, or fetched under its name without
that ending. Rounded weights are never merged into.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from colab_qlora.disk import check_space
from colab_qlora.models.fuse import causal_model
from colab_qlora.models.loading import locate_checkpoint
from colab_qlora.models.readable_errors import readable_errors
from colab_qlora.quantization.merged_weights import MergedWeights
from colab_qlora.quantization.own_source import check_same_model, checkpoint_name, name_of_16_bits
from colab_qlora.quantization.weight_source import WeightSource

_FILES = ("model*.safetensors", "model.safetensors.index.json", "config.json")


def merged_weights(
    model: Any, base_model: str | None = None, token: str | None = None
) -> MergedWeights:
    """What merging a model gives, one tensor at a time.

    Args:
        model: as of `save_pretrained_merged`.
        base_model: folder or hub id of the 16-bit checkpoint to add the adapters to; None for the
            one that the model was loaded from, or for its hub name without "-bnb-4bit".
        token: of the hub, for a gated model.

    Raises:
        UserError: the checkpoint cannot be had, is quantised, or is that of another model; or what
            `MergedWeights` refuses.
    """
    name = base_model or name_in_16_bits(model)
    if name is None:
        return MergedWeights(model)
    if base_model is None:
        print(
            "colab_qlora: the model was loaded from a checkpoint in 4 bits; its adapters are added "
            f"to the 16-bit weights of {name}."
        )
    return _MergedInto(model, WeightSource.of_checkpoint(_fetched(name, token)), name)


def name_in_16_bits(model: Any) -> str | None:
    """The hub id of the 16-bit checkpoint, where the model's own is quantised and named after it.

    None where the model was quantised while it was loaded, or its name says nothing.
    """
    quantizer = getattr(causal_model(model), "hf_quantizer", None)
    if not getattr(quantizer, "pre_quantized", False):
        return None
    return name_of_16_bits(checkpoint_name(model))


class _MergedInto(MergedWeights):
    """`MergedWeights` of another checkpoint than the model's own.

    Args:
        model: as of `MergedWeights`.
        source: reads the 16-bit matrices.
        name: of the checkpoint, for messages.
    """

    def __init__(self, model: Any, source: Callable[[str], torch.Tensor], name: str) -> None:
        super().__init__(model, source)
        do = "Pass base_model= with the 16-bit checkpoint that this one was made from"
        for matrix in self.parts.matrices:
            if matrix.is_quantised and not matrix.is_trained_copy:
                check_same_model(matrix.module, self._base(matrix), matrix.name, name, do)
                break


def _fetched(name: str, token: str | None) -> str:
    """The folder with the checkpoint, fetched from the hub if it is not on this machine."""
    place = locate_checkpoint(name)
    if Path(place).is_dir():
        return place
    from huggingface_hub import constants, snapshot_download

    with readable_errors(name):
        _check_room(name, token, Path(constants.HF_HUB_CACHE))
        return snapshot_download(name, allow_patterns=list(_FILES), token=token)


def _check_room(name: str, token: str | None, cache: Path) -> None:
    """Raise UserError if the checkpoint would not fit on the disk; asked before it is fetched."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    found = huggingface_hub.HfApi(token=token).model_info(name, files_metadata=True)
    wanted = [
        file for file in found.siblings or () if any(Path(file.rfilename).match(p) for p in _FILES)
    ]
    needed = sum(
        file.size or 0
        for file in wanted
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, file.rfilename), str)
    )
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    do = "Set HF_HOME to a larger disk, or pass base_model= with a folder that has it"
    check_space(place, needed, f"the 16-bit checkpoint {name}", place, do)
