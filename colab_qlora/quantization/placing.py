"""Give a weight of a model another precision, in place, from its 16-bit source.

    nf4_64, nf4_32   bitsandbytes Linear4bit with a searched-for Params4bit
    int8             Int8Linear, or Int8Embedding where it is a table
    16bit            nn.Linear or nn.Embedding

What stands around a weight stays: names, biases, the PEFT layer with its adapters and their
optimiser state. Between the two NF4 rungs even the module is the same.
"""

from __future__ import annotations

from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.quantization.activation_statistics import WeightItem
from colab_qlora.quantization.budget import BLOCK_SIZES, INT8, RUNGS, SIXTEEN_BIT
from colab_qlora.quantization.int8_modules import Int8Embedding, Int8Linear
from colab_qlora.quantization.int8_weight import encode_int8
from colab_qlora.quantization.scale_search import quantize_nf4


@torch.no_grad()
def place(
    model: Any,
    item: WeightItem,
    rung: str,
    weight: torch.Tensor,
    *,
    column_weights: torch.Tensor | None = None,
    compute_dtype: torch.dtype,
    search: bool = True,
) -> None:
    """Put a weight on a rung, in every module that uses it.

    Args:
        model: holds the item's modules, with or without PEFT's wrappers.
        item: from `weight_items(model)`.
        rung: one of `budget.RUNGS`; int8 or 16bit for tables, and tied heads with them.
        weight: (rows, columns), 16 or 32 bit, from the checkpoint, on any device.
        column_weights: (columns,), E[x_j^2], for the scale search.
        compute_dtype: what the weight is decoded to.
        search: False takes bitsandbytes' own scales.

    Raises:
        UserError: a rung that the weight cannot stand on, or a weight of another shape.
    """
    _check(item, rung, weight)
    device = _device_of(item)
    matrix = weight.to(device, compute_dtype)
    if rung in BLOCK_SIZES:
        made = quantize_nf4(
            matrix,
            column_weights=None if column_weights is None else column_weights.to(device),
            blocksize=BLOCK_SIZES[rung],
            search=search,
            name=item.name,
        )
        for module in item.modules:
            _set_nf4(model, module, made, compute_dtype)
        return
    if rung == INT8:
        codes, absmax = encode_int8(matrix)
        shared = torch.nn.Parameter(codes, requires_grad=False)
        for module in item.modules:
            replace(model, module, _int8(module, shared, absmax, compute_dtype))
        return
    shared = torch.nn.Parameter(matrix, requires_grad=False)
    for module in item.modules:
        replace(model, module, _dense(module, shared))


def rung_of(item: WeightItem) -> str:
    """The rung that a weight stands on; a stock 4-bit module counts by its block size.

    Raises:
        UserError: another format (LLM.int8, FP4, GPTQ ...), or NF4 in other blocks.
    """
    module: Any = item.modules[0]
    if isinstance(module, Int8Linear | Int8Embedding):
        return INT8
    weight = item.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        for rung, blocksize in BLOCK_SIZES.items():
            if state.quant_type == "nf4" and state.blocksize == blocksize:
                return rung
        found = f"{state.quant_type} in blocks of {state.blocksize}"
    elif weight.is_floating_point() and weight.ndim == 2 and weight.dtype.itemsize >= 2:
        return SIXTEEN_BIT
    else:
        found = f"{type(module).__name__} of {weight.dtype}"
    raise UserError(
        f"{item.name} is in a format that dynamic quantisation does not know",
        got=found,
        allowed="NF4 in blocks of 64 or 32, int8 of this kit, 16 or 32 bit",
        do="Load the model's 16-bit checkpoint",
    )


def replace(model: Any, old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Put `new` wherever `old` stands in the model."""
    new.train(old.training)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def _set_nf4(model: Any, module: torch.nn.Module, weight: Any, compute_dtype: torch.dtype) -> None:
    nn = import_bitsandbytes().nn
    target: Any = module
    if not isinstance(module, nn.Linear4bit):
        target = nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        target.bias = module.bias
        # see models.loading.keep_weights_in_place
        target.support_avx512bf16_for_cpu = False
    target.weight = weight
    target.quant_state = weight.quant_state
    weight.module = target
    if target is not module:
        replace(model, module, target)


def _int8(
    module: Any, codes: torch.nn.Parameter, absmax: torch.Tensor, compute_dtype: torch.dtype
) -> torch.nn.Module:
    if isinstance(module, torch.nn.Embedding):
        made: Any = Int8Embedding.from_codes(
            codes, absmax, padding_idx=module.padding_idx, compute_dtype=compute_dtype
        )
    else:
        made = Int8Linear.from_codes(codes, absmax, bias=module.bias, compute_dtype=compute_dtype)
    # tied modules share one tensor
    made.weight, made.SCB = codes, absmax
    return made


def _dense(module: Any, weight: torch.nn.Parameter) -> torch.nn.Module:
    rows, columns = weight.shape
    if isinstance(module, torch.nn.Embedding):
        made: Any = torch.nn.Embedding(
            rows, columns, padding_idx=module.padding_idx, device="meta", dtype=weight.dtype
        )
    else:
        made = torch.nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype)
        made.bias = module.bias
    made.weight = weight
    return made


def _device_of(item: WeightItem) -> torch.device:
    return item.weight.device


def shape_of(item: WeightItem) -> tuple[int, int]:
    """(rows, columns) of a weight, whatever it is packed into."""
    module: Any = item.modules[0]
    if isinstance(module, torch.nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def _check(item: WeightItem, rung: str, weight: torch.Tensor) -> None:
    allowed = (INT8, SIXTEEN_BIT) if item.is_table else RUNGS
    if rung not in allowed:
        raise UserError(
            f"{item.name} cannot stand on this rung", got=repr(rung), allowed=", ".join(allowed)
        )
    if tuple(weight.shape) != shape_of(item):
        raise UserError(
            f"the weight of {item.name} in the checkpoint has another shape than in the model",
            got=tuple(weight.shape),
            allowed=shape_of(item),
            do="Load the checkpoint that the model was made from",
        )
