"""The merged weights of a model, one at a time, from its 16-bit checkpoint and its adapters.

    W' = round(W + sum over active adapters of scaling * B A)
    W' = round(m (W + scaling * B A) / n)      DoRA, with n the rows' own norms

An adapter that LoftQ started already holds what the weight lost when it was quantised, so there W
is the quantised weight, decoded.

The sum is made in float32, a chunk of rows after the other, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.models.fuse import causal_model
from colab_qlora.quantization.adapter_starts import belongs_to_quantised
from colab_qlora.quantization.checkpoint_parts import (
    Matrix,
    compute_dtype_of,
    parts_of,
    stored_dtype,
)
from colab_qlora.quantization.merge_checks import check_adapters, check_matrices, source_of
from colab_qlora.quantization.quantised_weights import decoded_weight
from colab_qlora.quantization.shard_writer import PlannedTensor, stored
from colab_qlora.quantization.weight_source import SourceGone

# numbers that are in float32 at a time: 64 MiB, and as much again for the product
_CHUNK_NUMBERS = 1 << 24


class MergedWeights:
    """What merging a model gives, made one tensor at a time; nothing of the model changes.

    Args:
        model: as of `merging.merge_16_bit`.
        source: reads 16-bit matrices by name; None for the checkpoint that the model came from.

    Attributes:
        causal: the transformers model inside it.
        parts: its tensors.
        dtype: of what is made.
        source: reads 16-bit matrices by name; None if all of them are in the model.

    Raises:
        UserError: adapters that cannot be merged, or no 16-bit weights.
    """

    def __init__(self, model: Any, source: Callable[[str], torch.Tensor] | None = None) -> None:
        check_adapters(model)
        self.causal = causal_model(model)
        self._configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
        self.parts = parts_of(self.causal, is_adapted=True)
        check_matrices(model, self.parts.matrices)
        self.dtype = compute_dtype_of(model)
        self.source = source_of(model, self.parts.matrices) if source is None else source

    def dtype_of(self, name: str, tensor: torch.Tensor) -> torch.dtype:
        return stored_dtype(self.causal, name, tensor, self.dtype)

    def planned(self) -> list[PlannedTensor]:
        """All tensors of the merged checkpoint, none of them made yet."""
        found = []
        for matrix in self.parts.stored_matrices(self.causal):
            make = partial(self.weight, matrix)
            found.append(PlannedTensor(matrix.key, matrix.shape, self.dtype, make))
        for matrix in self.parts.matrices:
            bias = self.bias(matrix)
            if bias is not None:
                found.append(stored(f"{matrix.name}.bias", bias))
        for name, tensor in self.parts.others.items():
            found.append(stored(name, tensor, self.dtype_of(name, tensor)))
        return found

    @torch.no_grad()
    def weight(self, matrix: Matrix) -> torch.Tensor:
        """The merged weight, (rows, columns), in the compute dtype, on the CPU."""
        base = decoded_weight(matrix.module).cpu() if self._is_loftq(matrix) else self._base(matrix)
        factors = [_factors(matrix, adapter) for adapter in matrix.adapters]
        # one chunk of rows after the other, so that an embedding's delta is never there as a whole
        rows = max(1, _CHUNK_NUMBERS // max(1, base.shape[1]))
        merged = torch.empty(base.shape, dtype=self.dtype)
        for first in range(0, base.shape[0], rows):
            chunk = slice(first, first + rows)
            block = base[chunk]
            if factors:
                block = block.to(factors[0].left.device, torch.float32, copy=True)
                for factor in factors:
                    factor.add_to_(block, chunk)
            merged[chunk] = block.to(self.dtype)
        for index, values in _token_rows(matrix):
            merged[index] = values.to("cpu", self.dtype)
        if not torch.isfinite(merged).all():
            raise UserError(
                f"the merged weight of {matrix.name} has numbers that are infinite or NaN",
                got=f"adapters {', '.join(matrix.adapters) or 'none'}, merged in {self.dtype}",
                do="Train again with a lower learning rate, or load the model in bfloat16",
            )
        return merged

    @torch.no_grad()
    def bias(self, matrix: Matrix) -> torch.Tensor | None:
        """The merged bias, (rows,), in the compute dtype; None if there is none."""
        if matrix.bias is None:
            return None
        bias = matrix.bias.detach().float()
        for adapter in matrix.adapters:
            if matrix.layer.lora_bias.get(adapter):
                added = matrix.layer.lora_B[adapter].bias.to(bias.device).float()
                bias = bias + added * matrix.layer.scaling[adapter]
        return bias.to(self.dtype)

    def _is_loftq(self, matrix: Matrix) -> bool:
        starts = (belongs_to_quantised(self._configs.get(name)) for name in matrix.adapters)
        return matrix.is_quantised and any(starts)

    def _base(self, matrix: Matrix) -> torch.Tensor:
        """The weight that is added to, on the CPU, in the dtype that it is stored in."""
        live = matrix.module.weight.detach()
        if matrix.is_trained_copy or (self.source is None and not matrix.is_quantised):
            return live.cpu()
        try:
            weight = self._read(matrix)
        except UserError:
            # a head that the checkpoint does not have is only here
            if matrix.is_quantised:
                raise
            return live.cpu()
        if tuple(weight.shape) != matrix.shape and matrix.is_quantised:
            raise UserError(
                f"the checkpoint's weight of {matrix.name} has another shape than the model's",
                got=tuple(weight.shape),
                allowed=matrix.shape,
                do="Put back the checkpoint that the model was loaded from",
            )
        # a 16-bit weight that is no longer the checkpoint's was changed on purpose (new tokens)
        if not matrix.is_quantised and not torch.equal(weight.to(live.dtype), live.cpu()):
            return live.cpu()
        return weight

    def _read(self, matrix: Matrix) -> torch.Tensor:
        """The checkpoint's weight, which may be there under the name of a tied module."""
        assert self.source is not None
        first: UserError | None = None
        for name in self.parts.names_of(matrix):
            try:
                return self.source(name).cpu()
            except SourceGone:
                raise
            except UserError as error:
                first = first or error
        assert first is not None
        raise first


class _Factors:
    """One adapter of one matrix: left (rows, r), right (r, columns), and DoRA's row norms."""

    def __init__(
        self, left: torch.Tensor, right: torch.Tensor, scaling: float, magnitude: Any
    ) -> None:
        self.left, self.right = left.detach(), right.detach().float()
        self.scaling = scaling
        self.magnitude = None if magnitude is None else magnitude.detach().float()

    def add_to_(self, block: torch.Tensor, rows: slice) -> None:
        """Add the adapter's rows to those of the weight, float32, in place."""
        block += (self.left[rows].float() @ self.right) * self.scaling
        if self.magnitude is not None:
            block *= (self.magnitude[rows] / torch.linalg.vector_norm(block, dim=1))[:, None]


def _factors(matrix: Matrix, adapter: str) -> _Factors:
    # PEFT's get_delta_weight rounds the product of 16-bit adapters to 16 bits before it is added
    layer = matrix.layer
    if adapter in layer.lora_embedding_A:
        left, right = layer.lora_embedding_A[adapter].T, layer.lora_embedding_B[adapter].T
    else:
        left, right = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    magnitude = None
    if adapter in layer.lora_variant:  # DoRA; the checks let nothing else pass
        magnitude = layer.lora_magnitude_vector[adapter].weight
    return _Factors(left, right, layer.scaling[adapter], magnitude)


def _token_rows(matrix: Matrix) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(row numbers, rows) that PEFT's `trainable_token_indices` puts in the place of others."""
    tokens = matrix.tokens
    if tokens is None:
        return []
    return [
        (torch.tensor(tokens.token_indices[name]), tokens.trainable_tokens_delta[name].detach())
        for name in tokens.active_adapters
        if name in tokens.trainable_tokens_delta
    ]
