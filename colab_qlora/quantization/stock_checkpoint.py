"""Save quantised weights so that plain transformers with bitsandbytes reads them.

    on NF4 or FP4   bitsandbytes' own serialised form; each weight brings its block size along
    on int8         decoded: the numbers that this kit computes with, in the compute dtype
    in 16 bit       as they are

Stock bitsandbytes has no int8 weights beside unquantised activations, so these take twice the bytes
in such a checkpoint. Modules that are not in 4 bit are listed in `llm_int8_skip_modules`.
"""

from __future__ import annotations

from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.models.fuse import causal_model
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.quantization.checkpoint_parts import (
    Matrix,
    Parts,
    compute_dtype_of,
    parts_of,
    plain_config,
    stored_dtype,
)
from colab_qlora.quantization.int8_modules import Int8Embedding, Int8Linear
from colab_qlora.quantization.merge_checks import check_unmerged
from colab_qlora.quantization.shard_writer import (
    MAX_SHARD_BYTES,
    PlannedTensor,
    stored,
    write_checkpoint,
)


def save_stock_checkpoint(
    model: Any,
    folder: str | PathLike[str],
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a model's quantised weights for plain transformers and bitsandbytes.

    Of a PEFT model the base is written, without its adapters and modules_to_save: save these with
    `model.save_pretrained`.

    Args:
        model: in NF4, int8, 16 bit, or a mixture; it stays as it is.
        folder: does not exist yet, or is empty. It appears when all of it is written.
        tokenizer: is saved with it.
        max_shard_bytes: of a file, above 0.

    Returns:
        The folder; `AutoModelForCausalLM.from_pretrained(folder)` gives the base's logits.

    Raises:
        UserError: a format that bitsandbytes cannot mix (LLM.int8), adapters that are merged into
            quantised weights, or a folder or disk that cannot take it. Nothing that was written
            remains.
    """
    causal = causal_model(model)
    check_unmerged(causal)
    parts = parts_of(causal, is_adapted=False)
    dtype = compute_dtype_of(model)
    config = plain_config(causal, parts, dtype)
    quantization = _quantization_config(parts, dtype)
    if quantization is not None:
        config.quantization_config = quantization
    return write_checkpoint(
        folder,
        _planned(causal, parts, dtype),
        config=config,
        generation_config=getattr(causal, "generation_config", None),
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
    )


def _planned(causal: Any, parts: Parts, dtype: torch.dtype) -> list[PlannedTensor]:
    found = []
    for matrix in parts.stored_matrices(causal):
        found += _weight_tensors(matrix, dtype)
    others = dict(parts.others)
    for matrix in parts.matrices:
        if matrix.bias is not None:
            others[f"{matrix.name}.bias"] = matrix.bias
    for name, tensor in others.items():
        found.append(stored(name, tensor, stored_dtype(causal, name, tensor, dtype)))
    return found


def _weight_tensors(matrix: Matrix, dtype: torch.dtype) -> list[PlannedTensor]:
    """What a matrix's weight is written as, its bias left out."""
    module = matrix.module
    if isinstance(module, Int8Linear | Int8Embedding):
        decode = partial(module.decoded, dtype)
        return [PlannedTensor(matrix.key, matrix.shape, dtype, decode)]
    if _is_4bit(matrix):
        _check_not_repacked(matrix)
        state = module.state_dict(prefix=f"{matrix.name}.")
        return [stored(name, state[name]) for name in state if name.startswith(matrix.key)]
    if not matrix.is_quantised:
        return [stored(matrix.key, module.weight, dtype)]
    raise UserError(
        f"{matrix.name} is in a format that cannot stand beside 4-bit weights",
        got=f"{type(module).__name__} of {module.weight.dtype}",
        allowed="NF4, FP4, int8 of this kit, 16 or 32 bit",
        do="Save this model with its own save_pretrained",
    )


def _check_not_repacked(matrix: Matrix) -> None:
    """Refuse weights whose scales bitsandbytes has rounded to bfloat16 for good."""
    if getattr(matrix.module.weight.quant_state, "packing_format_for_cpu", False):
        raise UserError(
            f"the weight of {matrix.name} was repacked for a CPU, which rounded its scales",
            got="a model that was evaluated on a CPU as plain transformers loads it",
            allowed="weights as they were quantised",
            do="Load the model again with FastLanguageModel.from_pretrained, or call "
            "models.loading.keep_weights_in_place before its first evaluation",
        )


def _is_4bit(matrix: Matrix) -> bool:
    return isinstance(matrix.module, import_bitsandbytes().nn.Linear4bit)


def _quantization_config(parts: Parts, dtype: torch.dtype) -> Any:
    """The BitsAndBytesConfig of the 4-bit matrices; None if there are none."""
    from transformers import BitsAndBytesConfig

    weights = [matrix.module.weight for matrix in parts.matrices if _is_4bit(matrix)]
    if not weights:
        return None
    kinds = sorted({weight.quant_state.quant_type for weight in weights})
    if len(kinds) > 1:
        raise UserError(
            "the model mixes 4-bit formats, of which a checkpoint has one",
            got=" and ".join(kinds),
            do="Load it with one of them",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kinds[0],
        bnb_4bit_use_double_quant=any(weight.quant_state.nested for weight in weights),
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=weights[0].dtype,
        # a list, even if it is empty: without one transformers would leave out the head
        llm_int8_skip_modules=[
            matrix.name
            for matrix in parts.matrices
            if isinstance(matrix.module, torch.nn.Linear) and not _is_4bit(matrix)
        ],
    )
