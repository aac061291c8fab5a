"""The 16-bit weights that adapters are added to, of a model that was loaded in 4 bits as well.

A model that is quantised while it is loaded is merged into the checkpoint that it came from. One
whose checkpoint is quantised already ("...-bnb-4bit") has no 16-bit weights of its own: those of
the checkpoint that it was made from are taken, which is named, or fetched under its name without
that ending. Rounded weights are never merged into.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.export.whole_files import size_words
from colab_qlora.models.fuse import causal_model
from colab_qlora.models.loading import locate_checkpoint
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.models.readable_errors import readable_errors
from colab_qlora.models.settings import settings_of
from colab_qlora.quantization.checkpoint_parts import Matrix, compute_dtype_of, parts_of
from colab_qlora.quantization.merge_checks import check_adapters, check_matrices
from colab_qlora.quantization.merged_weights import MergedWeights
from colab_qlora.quantization.weight_source import WeightSource

_QUANTISED_NAME = re.compile(r"[-_](unsloth-)?bnb-4bit$")
_FILES = ("model*.safetensors", "model.safetensors.index.json", "config.json")
# NF4 is off by 9 % of the weights' spread, weights of another model by 140 %
_LARGEST_ERROR = 0.3


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
    settings = settings_of(model)
    name = settings.model_name if settings is not None else model.config._name_or_path
    plain = _QUANTISED_NAME.sub("", str(name))
    return plain if plain != name else None


class _MergedInto(MergedWeights):
    """`MergedWeights` of another checkpoint than the model's own.

    Args:
        model: as of `MergedWeights`.
        source: reads the 16-bit matrices.
        name: of the checkpoint, for messages.
    """

    def __init__(self, model: Any, source: Callable[[str], torch.Tensor], name: str) -> None:
        check_adapters(model)
        self.causal = causal_model(model)
        self.parts = parts_of(self.causal, is_adapted=True)
        check_matrices(model, self.parts.matrices)
        self.dtype = compute_dtype_of(model)
        self.source = source
        for matrix in self.parts.matrices:
            if matrix.is_quantised and not matrix.is_trained_copy:
                self._check_same_model(matrix, name)
                break

    @torch.no_grad()
    def _check_same_model(self, matrix: Matrix, name: str) -> None:
        """Compare one quantised weight with the checkpoint's."""
        base, weight = self._base(matrix).float(), matrix.module.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            return
        decoded = import_bitsandbytes().functional.dequantize_4bit(weight.data, state)
        error = float((decoded.cpu().float() - base).norm() / base.norm())
        if not error <= _LARGEST_ERROR:
            raise UserError(
                f"{name} is not the model that was loaded in 4 bits",
                got=f"{matrix.name} differs by {error:.0%} of its size",
                allowed=f"{_LARGEST_ERROR:.0%} at most, which is more than 4 bits cost",
                do="Pass base_model= with the 16-bit checkpoint that this one was made from",
            )


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
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"the disk of {place} is too small for the 16-bit checkpoint {name}",
            got=f"{size_words(free)} free",
            allowed=f"{size_words(needed)} or more",
            do="Set HF_HOME to a larger disk, or pass base_model= with a folder that has it",
        )
