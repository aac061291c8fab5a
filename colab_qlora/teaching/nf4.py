"""NF4, the 4-bit data type of QLoRA, and what it does to a weight matrix.

A matrix is cut, row after row, into blocks of 64 weights. A block is divided by its largest
magnitude (absmax), and each quotient becomes the nearest of 16 fixed levels in [-1, 1], stored as a
4-bit code. The levels are quantiles of a normal distribution, since trained weights are close to
normal. Double quantisation stores the absmax values themselves in 8 bits, in blocks of 256, so that
a weight costs 4 + 8/64 + 32/(64 * 256) = 4.127 bits.

Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3. All arithmetic here is that of
bitsandbytes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.teaching.checkpoint import read_weight

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class WeightPair:
    """One weight matrix before and after quantisation to 4 bits.

    Attributes:
        name: full name of the module, as in `model.named_modules()`, without PEFT's wrappers.
        shape: (out_features, in_features).
        before: the matrix of the checkpoint, on the CPU in its own dtype; None where it cannot be
            known: the checkpoint is quantised already, or is no longer on this disk.
        after: the quantised matrix, decoded, on the CPU in the dtype that it is decoded to.
        relative_error: Frobenius norm of after - before, divided by that of before; None without
            before.
        bits_per_weight: what the codes and the block constants occupy in memory. The two lookup
            tables of a matrix (at most 1,088 bytes, whatever its size) are left out.
        block_size: weights that share one absmax.
    """

    name: str
    shape: tuple[int, int]
    before: torch.Tensor | None
    after: torch.Tensor
    relative_error: float | None
    bits_per_weight: float
    block_size: int = 64


def nf4_levels() -> torch.Tensor:
    """The 16 levels of NF4 in the order of their codes, from decoding the codes 0 to 15.

    Returns:
        float32, shape (16,), on the CPU: rising from -1 to 1, with an exact 0 at code 7.

    Example:
        >>> nf4_levels()[[0, 7, 15]]
        tensor([-1.,  0.,  1.])
    """
    functional = import_bitsandbytes().functional
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[0::2] << 4 | codes[1::2]).reshape(-1, 1)  # the first code in the high half
    state = functional.QuantState(
        absmax=torch.ones(1),
        shape=torch.Size([16]),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
    )
    return functional.dequantize_4bit(packed, state).reshape(16)


def nf4_round_trip(
    weight: torch.Tensor, block_size: int = 64, double_quant: bool = True
) -> torch.Tensor:
    """Quantise a tensor to NF4 and decode it again.

    Args:
        weight: float32, float16 or bfloat16, any shape, on a CPU or a GPU.
        block_size: weights that share one absmax, a power of 2 from 32 to 4096; QLoRA uses 64.
        double_quant: store the absmax values in 8 bits too, as QLoRA does.

    Returns:
        The decoded tensor, with the shape, dtype and device of `weight`. For normally distributed
        weights its relative error is about 0.09.

    Raises:
        UserError: another dtype, an empty tensor, or another block size.
    """
    if weight.dtype not in _FLOATS or not weight.numel():
        raise UserError(
            "only floating-point weights can be quantised",
            got=f"{str(weight.dtype).removeprefix('torch.')}, shape {tuple(weight.shape)}",
            allowed="float32, float16 or bfloat16, at least one weight",
            do="Pass weight.float()",
        )
    if block_size not in BLOCK_SIZES:
        raise UserError(
            "bitsandbytes has no such block size",
            got=block_size,
            allowed=", ".join(map(str, BLOCK_SIZES)),
        )
    functional = import_bitsandbytes().functional
    codes, state = functional.quantize_4bit(
        weight.detach().contiguous(),
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type="nf4",
    )
    # of one or two weights bitsandbytes returns the transpose
    return functional.dequantize_4bit(codes, state).reshape(weight.shape)


def weight_before_and_after(model: Any, module_name: str) -> WeightPair:
    """One 4-bit linear layer's weight as it was in the checkpoint and as it is now.

    Args:
        model: a model loaded in 4 bits, with or without LoRA adapters.
        module_name: the layer, e.g. "model.layers.0.self_attn.q_proj".

    Returns:
        The pair. Only this one matrix is read from the disk.

    Raises:
        UserError: there is no such layer, or it is not kept in 4 bits.
    """
    name, module = _find_4bit_layer(model, module_name)
    state = module.weight.quant_state
    after = decode_weight(module).cpu()
    before = read_weight(model.config, name, tuple(after.shape))
    error = None
    if before is not None:
        exact = before.float()
        error = float((after.float() - exact).norm() / exact.norm())
    stored = [module.weight, state.absmax]
    if state.nested:
        stored += [state.state2.absmax]
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in stored) / after.numel()
    rows, columns = after.shape
    return WeightPair(name, (rows, columns), before, after, error, bits, state.blocksize)


def decode_weight(module: Any) -> torch.Tensor:
    """The weight of a bitsandbytes `Linear4bit` as the 16- or 32-bit matrix it stands for.

    Args:
        module: the layer, on any device; it is left as it is.

    Returns:
        Shape (out_features, in_features), in the dtype that bitsandbytes decodes to.
    """
    functional = import_bitsandbytes().functional
    weight, state = module.weight.data, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        weight, state = _unpack_cpu_format(functional, weight, state)
    return functional.dequantize_4bit(weight, state).reshape(state.shape)


def _unpack_cpu_format(functional: Any, weight: torch.Tensor, state: Any) -> tuple[Any, Any]:
    """Undo the layout that bitsandbytes gives a weight when it generates on a CPU with AVX512-BF16.

    Its own inverse changes the state in place and quantises the absmax values anew; a copy that
    says that they never were quantised keeps both the state and the values.
    """
    state = copy.copy(state)
    state.original_nested = False
    absmax = state.absmax.T.reshape(-1).float()
    weight, state = functional._convert_weight_packed_for_cpu_inverse(weight, state)
    state.absmax, state.nested = absmax, False
    return weight.reshape(-1, 1), state


def _find_4bit_layer(model: Any, module_name: str) -> tuple[str, Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = module_name.removeprefix("base_model.model.").removesuffix(".base_layer")
    layers = {}
    for full_name, module in base.named_modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            layers[full_name.removesuffix(".base_layer")] = module
    if name in layers:
        return name, layers[name]
    known = {full_name for full_name, _ in base.named_modules()}
    if not layers:
        problem, do = "the model has no 4-bit layer", "Load it with load_in_4bit=True"
    elif name in known:
        problem, do = f"{name} is not kept in 4 bits", "Choose a layer that is"
    else:
        problem, do = "the model has no such layer", "Copy a name from model.named_modules()"
    examples = ", ".join(list(layers)[:3])
    raise UserError(
        problem,
        got=repr(module_name),
        allowed=f"one of {len(layers)} layers: {examples}, ..." if layers else None,
        do=do,
    )
