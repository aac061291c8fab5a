"""Merge adapters into 16-bit weights. Nothing is quantised anew.

    W' = round(W + sum over active adapters of scaling * B A)      W from the 16-bit checkpoint

An adapter that was trained over quantised weights has also learned to make up for a part of their
error, so that merged and quantised model differ a little. One that LoftQ started makes up for it
from the beginning, and alone is added to the decoded weights that it was trained over.

`merge_16_bit` needs room for all 16-bit weights; `save_merged_16_bit` for a shard at a time.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch

from colab_qlora.models.adapters import disable_checkpointing
from colab_qlora.models.fuse import restore
from colab_qlora.models.smart import bring_embedding_back, free_recordings, stop_planning
from colab_qlora.quantization.checkpoint_parts import (
    Matrix,
    forget_quantisation,
    plain_config,
    untie,
)
from colab_qlora.quantization.dynamic import ATTRIBUTE
from colab_qlora.quantization.instance_methods import MERGES
from colab_qlora.quantization.merge_checks import check_unloadable
from colab_qlora.quantization.merged_weights import MergedWeights
from colab_qlora.quantization.shard_writer import MAX_SHARD_BYTES, write_checkpoint


def merge_16_bit(model: Any) -> Any:
    """Merge the active adapters and give a plain transformers model; `model` is used up.

    Args:
        model: a PEFT model with LoRA or DoRA adapters over a base in NF4, int8, 16 bit, or a
            mixture; or such a base alone.

    Returns:
        The transformers model inside it, on its device, frozen, with all weights in the compute
        dtype (float32 where a CPU computes in it), which `save_pretrained` writes as a checkpoint
        that is not quantised. Fused layers are the model's own again. Modules in `modules_to_save`
        are those that were trained.

    Raises:
        UserError: the 16-bit weights are not there, or these adapters cannot be merged; the model
            is then as it was.
    """
    check_unloadable(model)
    bring_embedding_back(model)
    free_recordings(model)
    merge = MergedWeights(model)
    # all of them before anything changes: a weight that cannot be read leaves a model that works
    made = {
        matrix.name: merge.weight(matrix).to(matrix.module.weight.device)
        for matrix in merge.parts.matrices
        if matrix.name not in merge.parts.aliases
    }
    biases = {matrix.name: merge.bias(matrix) for matrix in merge.parts.matrices}
    stop_planning(model)
    disable_checkpointing(merge.causal)
    merge.causal.disable_input_require_grads()
    restore(model)
    causal = model.unload() if model is not merge.causal else model
    shared = {name: torch.nn.Parameter(made.pop(name), requires_grad=False) for name in list(made)}
    for matrix in merge.parts.matrices:
        weight = shared[merge.parts.aliases.get(matrix.name, matrix.name)]
        _install(causal, matrix, weight, biases[matrix.name])
    for name, tensor in merge.parts.others.items():
        tensor.data = tensor.data.to(merge.dtype_of(name, tensor))
        if isinstance(tensor, torch.nn.Parameter):
            tensor.requires_grad_(False)
    _make_plain(causal, model, merge)
    return causal


def save_merged_16_bit(
    model: Any,
    folder: str | PathLike[str],
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write what `merge_16_bit` gives, bit for bit, without ever holding all of it.

    Args:
        model: as of `merge_16_bit`; it stays as it is.
        folder: for config, generation config, shards and their index; does not exist yet, or is
            empty. It appears when all of it is written.
        tokenizer: is saved with it.
        max_shard_bytes: of a file, and about what is in memory at a time; above 0.

    Returns:
        The folder, which `AutoModelForCausalLM.from_pretrained` of transformers loads.

    Raises:
        UserError: as of `merge_16_bit`; or the folder holds something, or the disk is too small or
            becomes full. Nothing that was written remains.
    """
    merge = MergedWeights(model)
    return write_checkpoint(
        folder,
        merge.planned(),
        config=plain_config(merge.causal, merge.parts, merge.dtype),
        generation_config=getattr(merge.causal, "generation_config", None),
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
    )


def _install(
    causal: Any, matrix: Matrix, weight: torch.nn.Parameter, bias: torch.Tensor | None
) -> None:
    """Put a dense weight where a matrix was; a module that is dense already stays."""
    module = matrix.module
    if matrix.is_quantised:
        rows, columns = matrix.shape
        if isinstance(module, torch.nn.Embedding):
            padding = module.padding_idx
            made: Any = torch.nn.Embedding(
                rows, columns, padding, device="meta", dtype=weight.dtype
            )
        else:
            made = torch.nn.Linear(columns, rows, False, device="meta", dtype=weight.dtype)
        made.train(module.training)
        parent, _, name = matrix.name.rpartition(".")
        setattr(causal.get_submodule(parent), name, made)
        module = made
    module.weight = weight
    if bias is not None:
        module.bias = torch.nn.Parameter(bias, requires_grad=False)


def _make_plain(causal: Any, model: Any, merge: MergedWeights) -> None:
    """Take away what says that the model is quantised."""
    for owner in (causal, model):
        for name in (ATTRIBUTE, "save_pretrained", "resize_token_embeddings", *MERGES):
            owner.__dict__.pop(name, None)
    for name in (
        "hf_quantizer",
        "quantization_method",
        "is_quantized",
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
        # how the quantised checkpoint was read; save_pretrained would undo it
        "_weight_conversions",
    ):
        causal.__dict__.pop(name, None)
    for module in causal.modules():
        if hasattr(module, "config"):
            forget_quantisation(module.config)
    if not merge.parts.is_tied(causal):
        untie(causal.config)
    causal.config.dtype = merge.dtype
    causal.config.use_cache = True
