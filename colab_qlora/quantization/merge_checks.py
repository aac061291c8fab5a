"""What can be merged, and where its 16-bit weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.models.fuse import causal_model
from colab_qlora.quantization.adapter_starts import LEAVE_BASE, belongs_to_quantised, leaves_base
from colab_qlora.quantization.checkpoint_parts import Matrix
from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.quantization.own_source import checkpoint_name, own_source

# LoRA layers of PEFT whose weight is that of one linear or embedding
_LAYERS = ("Linear", "Embedding", "Linear4bit", "Linear8bitLt")
_DENSE = (
    "Load the 16-bit model with load_in_4bit=False, put the adapter on it with "
    "PeftModel.from_pretrained, and call its merge_and_unload()"
)


def check_unmerged(causal: Any) -> None:
    """Raise UserError if PEFT has merged an adapter into the weights already."""
    for name, module in causal.named_modules():
        merged = getattr(module, "merged_adapters", None)
        if merged:
            raise UserError(
                f"an adapter is merged into the quantised weight of {name}",
                got=", ".join(merged),
                allowed="adapters that stand beside their weights",
                do="Call model.unmerge_adapter() first",
            )


def check_unloadable(model: Any) -> None:
    """Raise UserError if a model has adapters and is not the PeftModel that can take them off."""
    if causal_model(model) is model and getattr(model, "peft_config", None):
        raise UserError(
            "the model inside a PEFT model cannot be merged by itself",
            got=type(model).__name__,
            allowed="the PeftModel, or a model without adapters",
            do="Pass what get_peft_model gave, or write a folder with save_merged_16_bit",
        )


def check_adapters(model: Any) -> None:
    """Raise UserError unless all that PEFT put on the model is LoRA, unmerged, on matrices."""
    causal = causal_model(model)
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise UserError(
                f"adapter {name} cannot be merged here", got=kind, allowed="LORA", do=_DENSE
            )
    check_unmerged(causal)
    _check_layers(causal)


def check_matrices(model: Any, matrices: Iterable[Matrix]) -> None:
    """Raise UserError unless what is added to each matrix is known."""
    configs, matrices = getattr(model, "peft_config", None) or {}, list(matrices)
    for matrix in matrices:
        _check_matrix(matrix, configs)
    for adapter, config in configs.items():
        having = [matrix for matrix in matrices if adapter in matrix.adapters]
        if belongs_to_quantised(config) and having and not any(m.is_quantised for m in having):
            raise loftq_over_16_bit(adapter)


def loftq_over_16_bit(adapter: str) -> UserError:
    """The error for a LoftQ adapter over weights that have lost nothing."""
    return UserError(
        f"adapter {adapter} was started by LoftQ: it stands in for what 4 bits lose, and this base "
        "has lost nothing",
        got="a base in 16 or 32 bits",
        allowed="the base that it was trained over",
        do="Load the adapter's folder with load_in_4bit=True",
    )


def _check_layers(causal: Any) -> None:
    from peft.tuners.lora import LoraLayer

    for name, layer in causal.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        is_matrix = isinstance(base, torch.nn.Linear | torch.nn.Embedding)
        if not is_matrix or type(layer).__name__ not in _LAYERS:
            raise UserError(
                f"the adapter on {name} cannot be merged here",
                got=f"lora.{type(layer).__name__} around {type(base).__name__}",
                allowed="adapters on linears and embeddings",
                do=_DENSE,
            )


def _check_matrix(matrix: Matrix, configs: dict[str, Any]) -> None:
    stock = getattr(matrix.module, "source_cls", torch.nn.Linear)
    if not issubclass(stock, torch.nn.Linear):
        raise UserError(
            f"the checkpoint has the weight of {matrix.name} transposed",
            got=stock.__name__,
            allowed="architectures with nn.Linear",
            do=_DENSE,
        )
    for adapter in matrix.adapters:
        variant = matrix.layer.lora_variant.get(adapter)
        kind = type(variant).__name__
        is_alone = len(matrix.adapters) == 1
        if variant is not None and not (kind == "DoraLinearVariant" and is_alone):
            raise UserError(
                f"adapter {adapter} on {matrix.name} is no plain LoRA",
                got=f"{kind}, {len(matrix.adapters)} active",
                allowed="LoRA, or DoRA on linears as the one active adapter",
                do=_DENSE,
            )
        if matrix.layer.lora_bias.get(adapter) and matrix.bias is None:
            raise UserError(
                f"adapter {adapter} has a bias, and {matrix.name} has none to add it to",
                got="lora_bias=True",
                do="Train with lora_bias=False",
            )
        start = getattr(configs.get(adapter), "init_lora_weights", True)
        if matrix.is_quantised and not leaves_base(start):
            raise UserError(
                f"adapter {adapter} was started with a part of the base weights",
                got=f"init_lora_weights={start!r}",
                allowed=f"True, False, {', '.join(map(repr, LEAVE_BASE))}",
                do="Train with one of these: the 16-bit weights are not what it was trained beside",
            )


def source_of(model: Any, matrices: Sequence[Matrix]) -> Callable[[str], torch.Tensor] | None:
    """What reads a model's 16-bit matrices by name; None if all of it is in 16 bit already.

    Raises:
        UserError: the model was loaded from a checkpoint that is quantised, or its checkpoint is
            not where it was.
    """
    state = dynamic_state(model)
    if state is not None:
        return state.source
    quantised = [m for m in matrices if m.is_quantised and not m.is_trained_copy]
    quantizer = getattr(causal_model(model), "hf_quantizer", None)
    if quantised and getattr(quantizer, "pre_quantized", False):
        raise _no_16_bit(checkpoint_name(model))
    try:
        source = own_source(model)
    except UserError:
        if quantised:
            raise
        return None
    if quantised:
        source(quantised[0].name)  # what is wrong with all of them is said before anything is made
    return source


def _no_16_bit(name: str) -> UserError:
    return UserError(
        "the model was loaded from a checkpoint that is quantised, and merging into quantised "
        "weights would round them a second time",
        got=name,
        allowed="a model that was loaded from its 16-bit checkpoint",
        do="Save the adapter with save_pretrained, load the 16-bit model of the same name (it is "
        "quantised while it is loaded), put the adapter on it with PeftModel.from_pretrained, and "
        "merge that",
    )
