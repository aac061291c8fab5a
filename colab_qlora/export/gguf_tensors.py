"""The tensors of a GGUF file: names, types and bytes, and each one's numbers when its turn comes.

Matrices are merged in float32 and rounded once, straight to the file's type. Norms and biases are
float32, as llama.cpp wants them. A matrix whose rows do not divide into blocks is f16.

Memory: the largest matrix in float32 and its checkpoint's 16 bits beside it (3.2 GB for the
embedding of Llama 3 8B), and one chunk of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from colab_qlora.errors import UserError
from colab_qlora.export.gguf_architecture import Architecture
from colab_qlora.export.gguf_methods import GgufMethod
from colab_qlora.quantization.merged_weights import MergedWeights

_TABLES = ("token_embd.weight", "output.weight")
# numbers that are quantised at a time
_CHUNK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, not made yet.

    Attributes:
        name: in the file.
        shape: as in transformers, (rows, columns) or (rows,).
        make: gives it, float32, on the CPU.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    def type_in(self, method: GgufMethod) -> Any:
        """Its `GGMLQuantizationType` in a file of one of our own methods."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if len(self.shape) < 2:
            return GGMLQuantizationType.F32
        assert method.matrix is not None and method.table is not None
        kind = GGMLQuantizationType[method.table if self.name in _TABLES else method.matrix]
        if self.shape[-1] % GGML_QUANT_SIZES[kind][0]:
            return GGMLQuantizationType.F16
        return kind

    def bytes_in(self, method: GgufMethod) -> int:
        """Its bytes there; of llama.cpp's own methods an estimate."""
        from gguf import GGML_QUANT_SIZES

        numbers = int(np.prod(self.shape, dtype=np.int64))
        if not method.is_ours:
            if len(self.shape) < 2:
                return 4 * numbers
            # rows that are no multiple of 256 get an older type of more bits
            bits = method.bits if self.shape[-1] % 256 == 0 else 8.5
            return int(numbers * max(bits, 6.57 if self.name in _TABLES else 0) / 8)
        block, size = GGML_QUANT_SIZES[self.type_in(method)]
        return numbers // block * size


def gguf_tensors(merge: MergedWeights, architecture: Architecture) -> list[GgufTensor]:
    """All tensors of the file, in the model's order.

    Args:
        merge: its `dtype` is float32.

    Raises:
        UserError: a tensor that llama.cpp's architecture does not have.
    """
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, architecture.layers)
    found = []
    for name, factors in architecture.tensors.items():
        found.append(GgufTensor(name, tuple(factors.shape), partial(torch.clone, factors)))
    for tensor in merge.planned():
        place = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise UserError(
                f"llama.cpp's {architecture.name} has no tensor for {tensor.name}",
                got=f"shape {tensor.shape}",
                do="Save the model with save_pretrained_merged",
            )
        make = _arranged(tensor.make, architecture.arrange(tensor.name))
        found.append(GgufTensor(place, tensor.shape, make))
    return found


def _arranged(
    make: Callable[[], torch.Tensor], arrange: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[], torch.Tensor]:
    return lambda: arrange(make().float())


def encoded(tensor: torch.Tensor, kind: Any, name: str) -> Iterator[bytes]:
    """A tensor's bytes in a type of gguf, some rows at a time.

    Args:
        tensor: float32.
        kind: a `GGMLQuantizationType` that gguf can make.
        name: for the message.

    Raises:
        UserError: a number that float16 cannot hold.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rows = tensor.reshape(-1, tensor.shape[-1]).numpy()
    step = max(1, _CHUNK_NUMBERS // max(1, rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        chunk = np.ascontiguousarray(rows[first : first + step])
        if kind is GGMLQuantizationType.F16 and np.abs(chunk).max(initial=0) > 65504:
            raise UserError(
                f"{name} has numbers that float16 cannot hold",
                got=f"{np.abs(chunk).max():.4g}",
                allowed="65504 at most",
                do='Take "bf16" in place of "f16", or beside a method of llama.cpp',
            )
        yield quantize(chunk, kind).tobytes()
