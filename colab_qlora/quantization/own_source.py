"""The 16-bit checkpoint that a model came from, and whether a checkpoint is that model's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.models.fuse import causal_model
from colab_qlora.models.loading import locate_checkpoint
from colab_qlora.models.settings import settings_of
from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.quantization.quantised_weights import decoded_weight
from colab_qlora.quantization.weight_source import WeightSource

_QUANTISED_NAME = re.compile(r"[-_](unsloth-)?bnb-4bit$")
# NF4 is off by 9 % of the weights' spread, weights of another model by 140 %
_LARGEST_ERROR = 0.3


def checkpoint_name(model: Any) -> str:
    """The folder or hub id that a model was loaded from, as the user gave it."""
    settings = settings_of(model)
    name = settings.model_name if settings else causal_model(model).config._name_or_path
    return str(name)


def name_of_16_bits(name: str) -> str | None:
    """The hub id without "-bnb-4bit"; None where a name does not end so."""
    plain = _QUANTISED_NAME.sub("", name)
    return plain if plain != name else None


def own_source(model: Any) -> Callable[[str], torch.Tensor]:
    """What reads the matrices of the checkpoint that a model was loaded from, by name.

    Raises:
        UserError: it is not where it was, or has no safetensors.
    """
    state = dynamic_state(model)
    if state is not None:
        return state.source
    place = locate_checkpoint(checkpoint_name(model))
    # the very commit that the model came from, whatever the branch has become
    commit = getattr(causal_model(model).config, "_commit_hash", None)
    revision = None if Path(place).is_dir() else commit
    return WeightSource.of_checkpoint(place, revision=revision)


@torch.no_grad()
def check_same_model(module: Any, weight: torch.Tensor, matrix: str, name: str, do: str) -> None:
    """Raise UserError unless a checkpoint's weight is the one that a module holds in few bits.

    Args:
        module: a quantised linear.
        weight: (rows, columns), of the checkpoint.
        matrix: name of the module, for the message.
        name: of the checkpoint.
        do: the next step, for the message.
    """
    weight = weight.float()
    decoded = decoded_weight(module).to(weight.device)
    if decoded.shape == weight.shape:
        error = float((decoded - weight).norm() / weight.norm())
        if error <= _LARGEST_ERROR:
            return
        got = f"{matrix} differs by {error:.0%} of its size"
    else:
        got = f"{matrix} is {tuple(weight.shape)} there, and {tuple(decoded.shape)} here"
    raise UserError(
        f"{name} is not the model that was loaded in 4 or 8 bits",
        got=got,
        allowed=f"{_LARGEST_ERROR:.0%} at most, which is more than 4 bits cost",
        do=do,
    )
