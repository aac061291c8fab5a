"""Merged weights as a plain bitsandbytes NF4 checkpoint, quantised matrix after matrix.

    W4 = NF4(W + sum over active adapters of scaling * B A)        blocks of 64, double-quantised

Linears are in 4 bit, the output head and embeddings in the compute dtype, as transformers does it.
Bytes: 0.516 a weight in 4 bit; in memory one matrix beside the shard that is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.quantization.checkpoint_parts import Matrix
from colab_qlora.quantization.merged_weights import MergedWeights
from colab_qlora.quantization.shard_writer import PlannedTensor, stored

BLOCKSIZE, _NESTED_BLOCKSIZE = 64, 256
_STATE = "quant_state.bitsandbytes__nf4"
# the state is a JSON text of 150 to 200 bytes whose length depends on the weights; a shard's
# plan has to know it before, and JSON allows blanks behind
_STATE_BYTES = 320


def planned_4bit(merge: MergedWeights) -> list[PlannedTensor]:
    """All tensors of the checkpoint, none of them made yet."""
    found: list[PlannedTensor] = []
    for matrix in merge.parts.stored_matrices(merge.causal):
        if is_4bit(merge, matrix):
            found += _Quantised(merge, matrix).planned()
        else:
            make = _maker(merge, matrix)
            found.append(PlannedTensor(matrix.key, matrix.shape, merge.dtype, make))
    for matrix in merge.parts.matrices:
        bias = merge.bias(matrix)
        if bias is not None:
            found.append(stored(f"{matrix.name}.bias", bias))
    for name, tensor in merge.parts.others.items():
        found.append(stored(name, tensor, merge.dtype_of(name, tensor)))
    return found


def is_4bit(merge: MergedWeights, matrix: Matrix) -> bool:
    """Whether a matrix is a linear other than the output head, whatever it is held in now."""
    if not isinstance(matrix.module, torch.nn.Linear):
        return False
    head = next((name for name, _ in _heads(merge.causal)), "lm_head")
    return matrix.name != head


def _heads(causal: Any) -> Iterator[tuple[str, Any]]:
    """The output head under its name in the plain model."""
    head = causal.get_output_embeddings()
    for name, module in causal.named_modules():
        if module is head:
            yield name, module


def quantization_config(merge: MergedWeights) -> Any:
    """The BitsAndBytesConfig that transformers reads the checkpoint with."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=merge.dtype,
        # a list, even if it is empty: without one transformers would leave out the head
        llm_int8_skip_modules=[
            matrix.name
            for matrix in merge.parts.matrices
            if isinstance(matrix.module, torch.nn.Linear) and not is_4bit(merge, matrix)
        ],
    )


def _maker(merge: MergedWeights, matrix: Matrix) -> Callable[[], torch.Tensor]:
    return lambda: merge.weight(matrix)


class _Quantised:
    """One matrix's six tensors, quantised together when the first of them is asked for."""

    def __init__(self, merge: MergedWeights, matrix: Matrix) -> None:
        self.merge, self.matrix = merge, matrix
        self._made: dict[str, torch.Tensor] = {}

    def planned(self) -> list[PlannedTensor]:
        weights = self.matrix.shape[0] * self.matrix.shape[1]
        blocks = -(-weights // BLOCKSIZE)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "": (((weights + 1) // 2, 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "quant_map": ((16,), torch.float32),
            "nested_absmax": ((-(-blocks // _NESTED_BLOCKSIZE),), torch.float32),
            "nested_quant_map": ((256,), torch.float32),
            _STATE: ((_STATE_BYTES,), torch.uint8),
        }
        return [
            PlannedTensor(self._key(part), shape, dtype, self._taker(part))
            for part, (shape, dtype) in shapes.items()
        ]

    def _key(self, part: str) -> str:
        return f"{self.matrix.key}.{part}" if part else self.matrix.key

    def _taker(self, part: str) -> Callable[[], torch.Tensor]:
        def take() -> torch.Tensor:
            # a part is given once, so nothing is kept behind the last of them
            if part not in self._made:
                self._made = self._quantise()
            return self._made.pop(part)

        return take

    @torch.no_grad()
    def _quantise(self) -> dict[str, torch.Tensor]:
        device = self.matrix.module.weight.device
        weight = import_bitsandbytes().nn.Params4bit(
            self.merge.weight(self.matrix),
            requires_grad=False,
            blocksize=BLOCKSIZE,
            compress_statistics=True,
            quant_type="nf4",
        )
        weight = weight.to(device)
        parts = weight.quant_state.as_dict(packed=True)
        parts = {name: tensor.to("cpu") for name, tensor in parts.items()}
        blanks = torch.full((_STATE_BYTES - parts[_STATE].numel(),), ord(" "), dtype=torch.uint8)
        parts[_STATE] = torch.cat([parts[_STATE], blanks])
        return {"": weight.data.to("cpu"), **parts}
