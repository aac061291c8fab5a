"""A model's weights under the names that a plain checkpoint has, seen through PEFT's wrappers.

A matrix is what quantisation may have touched: a linear, an embedding or the head. All else (norms,
biases, persistent buffers) is as it was loaded, or as it was trained.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from colab_qlora.models.fused_class import stock_class
from colab_qlora.models.fused_head import is_fused_head
from colab_qlora.models.settings import settings_of
from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.quantization.quantised_weights import is_quantised_weight


@dataclass(frozen=True, eq=False)
class Matrix:
    """A linear or an embedding, and what PEFT has put around it.

    Attributes:
        name: of the module in the plain model.
        module: the innermost one; its weight may be quantised.
        layer: PEFT's LoRA layer around it, if there is one.
        tokens: PEFT's `TrainableTokensLayer` around it, if there is one.
        is_trained_copy: the module is PEFT's own (`modules_to_save`), not the checkpoint's.
    """

    name: str
    module: Any
    layer: Any = None
    tokens: Any = None
    is_trained_copy: bool = False

    @property
    def key(self) -> str:
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), whatever the weight is packed into."""
        if isinstance(self.module, torch.nn.Embedding):
            return self.module.num_embeddings, self.module.embedding_dim
        return self.module.out_features, self.module.in_features

    @property
    def is_quantised(self) -> bool:
        return is_quantised_weight(self.module.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def adapters(self) -> list[str]:
        """The active LoRA adapters that this matrix has."""
        if self.layer is None:
            return []
        have = {*self.layer.lora_A, *self.layer.lora_embedding_A}
        return [name for name in self.layer.active_adapters if name in have]

    @property
    def tie(self) -> tuple[int, ...]:
        """Equal for two matrices that are one tensor, also after what is added to them."""
        added = (self.layer if self.adapters else None, _token_rows(self.tokens))
        return (id(self.module.weight), *(id(part) for part in added))


@dataclass(frozen=True, eq=False)
class Parts:
    """All tensors of a model.

    Attributes:
        matrices: in the model's order; tied ones are all there.
        others: by their name in a checkpoint; without the biases of matrices.
        aliases: name of a matrix -> name of the matrix before it that is the same tensor.
    """

    matrices: list[Matrix] = field(default_factory=list)
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def stored_matrices(self, causal: Any) -> Iterator[Matrix]:
        """Those that a checkpoint holds: of tied ones the first, if loading ties them again."""
        tied = getattr(causal, "all_tied_weights_keys", None) or {}
        for matrix in self.matrices:
            if matrix.name not in self.aliases or matrix.key not in tied:
                yield matrix

    def names_of(self, matrix: Matrix) -> list[str]:
        """The matrix's own name first, then those of the modules that share its base weight.

        A tied head has no weight of its own in the checkpoint, and may have an adapter of its own.
        """
        weight = matrix.module.weight
        shared = (m.name for m in self.matrices if m.module.weight is weight)
        return [matrix.name, *(name for name in shared if name != matrix.name)]

    def is_tied(self, causal: Any) -> bool:
        """Whether all that the config calls tied is so."""
        tied = getattr(causal, "all_tied_weights_keys", None) or {}
        return all(m.name in self.aliases for m in self.matrices if m.key in tied)


def parts_of(causal: Any, *, is_adapted: bool) -> Parts:
    """Look through a transformers model.

    Args:
        causal: the model inside the PEFT model.
        is_adapted: what PEFT trained counts; else the base is listed as if there were no adapters.
    """
    parts = Parts()
    _walk(causal, "", parts, is_adapted, False)
    first: dict[tuple[int, ...], str] = {}
    for matrix in parts.matrices:
        name = first.setdefault(matrix.tie, matrix.name)
        if name != matrix.name:
            parts.aliases[matrix.name] = name
    return parts


def _walk(module: Any, name: str, parts: Parts, is_adapted: bool, is_copy: bool) -> None:
    inner, layer, tokens, is_own_copy = _unwrap(module, is_adapted)
    is_copy = is_copy or is_own_copy
    prefix = f"{name}." if name else ""
    held = {**inner._parameters, **inner._buffers}
    if isinstance(inner, torch.nn.Linear | torch.nn.Embedding):
        parts.matrices.append(Matrix(name, inner, layer, tokens, is_copy))
        for own in ("weight", "bias", "SCB"):
            held.pop(own, None)
    for key, tensor in held.items():
        if tensor is not None and key not in inner._non_persistent_buffers_set:
            parts.others[prefix + key] = tensor
    for key, child in inner._modules.items():
        if child is not None:
            _walk(child, prefix + key, parts, is_adapted, is_copy)


def _unwrap(module: Any, is_adapted: bool) -> tuple[Any, Any, Any, bool]:
    """The innermost module, its LoRA layer, its token layer, and whether it is PEFT's copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        for name in module.active_adapters if is_adapted else ():
            if name in module.modules_to_save:
                return module.modules_to_save[name], None, None, True
        return module.original_module, None, None, False
    if isinstance(module, TrainableTokensWrapper):
        tokens = module.token_adapter
        return tokens.get_base_layer(), None, tokens if is_adapted else None, False
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer(), module if is_adapted else None, None, False
    return module, None, None, False


def _token_rows(tokens: Any) -> Any:
    # a tied head's layer shares the dictionary of the embedding's
    return None if tokens is None else tokens.trainable_tokens_delta


def compute_dtype_of(model: Any) -> torch.dtype:
    """What the model's quantised weights are decoded to."""
    state, settings = dynamic_state(model), settings_of(model)
    if state is not None:
        return state.compute_dtype
    found = getattr(torch, settings.compute_dtype) if settings is not None else model.dtype
    assert isinstance(found, torch.dtype)
    return found


def stored_dtype(causal: Any, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that transformers gives a tensor of this name when a model of `dtype` is loaded."""
    if not isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
        return tensor.dtype
    kept = set(getattr(causal, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(causal, "_keep_in_fp32_modules", None) or ())
    if any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept):
        return torch.float32
    return dtype


def plain_config(causal: Any, parts: Parts, dtype: torch.dtype) -> Any:
    """A copy of a model's config as a checkpoint in `dtype` that is not quantised has it."""
    config = copy.deepcopy(causal.config)
    forget_quantisation(config)
    config.dtype = str(dtype).removeprefix("torch.")
    kind = stock_class(type(causal)) if is_fused_head(causal) else type(causal)
    config.architectures = [kind.__name__]
    if not parts.is_tied(causal):
        untie(config)
    # training with checkpointing switches it off, and generation from the copy would be slow
    config.use_cache = True
    return config


def forget_quantisation(config: Any) -> None:
    """Take out of a config, in place, what says that its model is quantised."""
    for name in ("quantization_config", "_is_quantized"):
        config.__dict__.pop(name, None)


def untie(config: Any) -> None:
    """Say in a config, in place, that head and embedding differ."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
