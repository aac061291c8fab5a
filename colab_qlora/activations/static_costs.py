"""Bytes that do not depend on the batch: weights, adapters, optimiser states, CUDA context."""

from __future__ import annotations

import math

from colab_qlora.activations.cost_settings import DEFAULT, CostSettings
from colab_qlora.activations.model_shape import ModelShape, Rank, adapter_sizes

_MIB = 2**20
# an assumption, that of teaching/memory.py; it depends on GPU, driver and the kernels loaded, and
# is outside torch's allocator. On a GPU ask: what torch.cuda.mem_get_info() calls used, less
# torch.cuda.memory_reserved()
CUDA_CONTEXT_BYTES = 512 * _MIB

# bitsandbytes: a code of 8 bits for each 64 numbers, a float32 for each 256 codes; and tables of 16
# and 256 float32 with an offset, for every linear anew
_NF4_BLOCK, _NF4_CODES, _NF4_TABLE_BYTES = 64, 256, 4 * (16 + 256 + 1)
# training/flat_parameters.py and training/optimizer.py
_FLAT_ALIGNMENT, _LEAST_8BIT_NUMBERS, _STATE_LEVELS_BYTES = 256, 4096, 2 * 256 * 4


def nf4_bytes(numbers: int) -> int:
    """Bytes of a weight in NF4 with double quantisation: 0.5 + 1/64 + 4/16384 a number."""
    blocks = -(-numbers // _NF4_BLOCK)
    return -(-numbers // 2) + blocks + 4 * -(-blocks // _NF4_CODES)


def static_bytes(shape: ModelShape, rank: Rank, settings: CostSettings = DEFAULT) -> dict[str, int]:
    """Bytes that do not depend on the batch, by name.

    Exact, as tensors' sizes: "weights" (bitsandbytes' blocks), "weight tables", "embedding" (0 if
    it is on the host), "head" (0 if tied), "norms", "biases", "rotation" (two tables of
    frequencies), "adapters" (float32 in `FlatParameters`' layout), "optimizer states" (`FlatAdamW`:
    a tensor of fewer than 4096 numbers has float32 states) and "gradients" (float32, at the end of
    a backward pass; not before it).
    Estimates: "GEMM workspace" and, outside torch's allocator, "CUDA context".
    """
    size, linears = settings.itemsize, [math.prod(shape.linear(name)) for name in shape.linears]
    weights = sum(nf4_bytes(n) if settings.is_4bit else n * size for n in linears)
    tables = _NF4_TABLE_BYTES * len(linears) * settings.is_4bit
    norms = (4 if shape.has_branch_norms else 2) * shape.hidden
    norms += 2 * shape.head_dim * shape.has_head_norms
    biases = shape.qkv * shape.has_qkv_bias + shape.hidden * shape.has_o_bias
    biases += (2 * shape.intermediate + shape.hidden) * shape.has_mlp_bias
    head = shape.vocab * shape.hidden * size
    adapters, states, gradients = _adapter_bytes(shape, rank, settings.optimizer_bits)
    return {
        "weights": shape.layers * weights,
        "weight tables": shape.layers * tables,
        "embedding": 0 if settings.embedding == "host" else head,
        "head": 0 if shape.is_tied else head,
        "norms": (shape.layers * norms + shape.hidden) * size,
        "biases": shape.layers * biases * size,
        "rotation": shape.rotations * 2 * 4 * ((shape.rotary_dim or shape.head_dim) // 2),
        "adapters": adapters,
        "optimizer states": states,
        "gradients": gradients,
        "GEMM workspace": settings.gemm_workspace_bytes,
        "CUDA context": CUDA_CONTEXT_BYTES,
    }


def _adapter_bytes(shape: ModelShape, rank: Rank, bits: int) -> tuple[int, int, int]:
    """Bytes of all adapters in float32, of their moments, and of their gradients."""
    adapters = states = gradients = levels = 0
    for numbers in adapter_sizes(shape, rank):
        room = -(-numbers // _FLAT_ALIGNMENT) * _FLAT_ALIGNMENT
        is_8bit = bits == 8 and numbers >= _LEAST_8BIT_NUMBERS
        adapters += 4 * room
        gradients += 4 * numbers
        # a byte a number and a float32 for each block, or a float32 a number; two of them
        states += 2 * (room + 4 * room // _FLAT_ALIGNMENT) if is_8bit else 8 * room
        levels = _STATE_LEVELS_BYTES if is_8bit else levels
    return shape.layers * adapters, shape.layers * states + levels, shape.layers * gradients
