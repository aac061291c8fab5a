"""Where the memory goes in a QLoRA training step.

Weights are measured: the bytes of the tensors that the model holds. What exists only while it
trains (gradients, optimiser state, activations, logits) is computed from their shapes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.models.host_embedding import compute_device
from colab_qlora.models.settings import settings_of
from colab_qlora.teaching.activations import (
    layer_bytes_per_token,
    layer_input_bytes_per_token,
    layer_shape,
    other_bytes_per_token,
)
from colab_qlora.teaching.lora import lora_layers

GIB = 2**30
T4_LIMIT_GIB = 14.74  # what PyTorch sees of a T4's 16 GB
CUDA_CONTEXT_GIB = 0.5
# float32 log-softmax, its gradient and that of the logits are alive at once when the backward pass
# begins; in the forward pass it is 2 + 4 + 4 (half-precision and float32 logits, log-softmax)
BYTES_PER_LOGIT = 4 + 4 + 4
# bitsandbytes: smaller tensors keep float32 states (min_8bit_size); a float32 absmax for 256 values
_LEAST_8BIT_NUMBERS, _STATE_BLOCK = 4096, 256
_STATE_MAPS_BYTES = 2 * 256 * 4  # the two lookup tables, one pair for all tensors


@dataclass(frozen=True)
class MemoryPart:
    """One part of the memory of a training step.

    Attributes:
        name: what it is.
        gib: size in GiB (2**30 bytes).
        is_measured: True for the bytes of tensors that exist; False where it is computed or
            assumed.
        note: how the number came about.
        is_at_peak: False for what is not there at the moment when most memory is taken, so that it
            does not add to the total.
    """

    name: str
    gib: float
    is_measured: bool
    note: str
    is_at_peak: bool = True


def memory_parts(
    model: Any,
    batch_size: int,
    seq_length: int,
    optimizer_bits: int = 8,
    checkpointing: bool = True,
    *,
    bytes_per_logit: float = BYTES_PER_LOGIT,
) -> list[MemoryPart]:
    """List what a training step of this model occupies.

    Args:
        model: a `PeftModel` over a Llama-like model.
        batch_size: sequences in one step (per_device_train_batch_size).
        seq_length: tokens in a sequence.
        optimizer_bits: 8 for bitsandbytes' 8-bit AdamW, 32 for the usual one.
        checkpointing: whether activations are recomputed; then each layer keeps its input only,
            and one layer at a time has its full set. The formula for the set is in `activations`.
        bytes_per_logit: 12 for the loss of transformers, which has all logits in memory; 14 in a
            loop of your own that keeps the model's output during the backward pass; 0 where the
            loss is computed in chunks (TRL from 1.x on).

    Returns:
        The parts, the weights first. The logits and the one layer at work are never there at the
        same moment, so the smaller of the two has `is_at_peak` False. Not counted: the gradients
        of activations (a tenth of one layer at work), and what the allocator holds without using
        it. With Llama-3-8B's shapes, cut to 4 layers, at 4096 tokens on an H100 (bfloat16, flash
        attention) the sum without the context was 8.52 GiB and max_memory_allocated 8.53.

    Raises:
        UserError: the model has no adapters, is not Llama-like, or a size is not positive.
    """
    _check(batch_size, seq_length, optimizer_bits)
    layers = [layer for _, layer in lora_layers(model)]
    if not layers:
        raise UserError(
            "the model has no LoRA adapters, so that nothing in it can be trained",
            do="Call FastLanguageModel.get_peft_model first, or weight_parts(model) for the "
            "weights alone",
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trainable)
    parts = weight_parts(model)
    parts.append(
        _part("gradients", _nbytes(trainable), f"one number for each of {count:,} parameters")
    )
    state = sum(optimizer_state_bytes(p.numel(), optimizer_bits) for p in trainable)
    if any(_is_8bit(p.numel(), optimizer_bits) for p in trainable):
        state += _STATE_MAPS_BYTES
    parts.append(
        _part("optimiser state", state, f"two {optimizer_bits}-bit numbers for each parameter")
    )
    parts += _step_parts(model, layers, batch_size * seq_length, checkpointing, bytes_per_logit)
    on_gpu = trainable[0].device.type == "cuda"
    note = "assumed: CUDA's own" if on_gpu else "computed: none on a CPU"
    parts.append(MemoryPart("CUDA context", CUDA_CONTEXT_GIB if on_gpu else 0.0, False, note))
    return parts


def weight_parts(model: Any) -> list[MemoryPart]:
    """Measure the weights and buffers of a model, with or without adapters.

    Args:
        model: a transformers model or a `PeftModel`.

    Returns:
        Parts for the 4-bit weights with the constants of their blocks, 8-bit weights, the rest
        in 16 or 32 bits, and the LoRA weights; none is empty. Memory that two names share (tied
        embeddings) counts once.
    """
    has_adapters = any(True for _ in lora_layers(model))
    four_bit, constants, eight_bit, lora, others = [], [], [], [], []
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            four_bit.append(tensor)
            constants += _state_tensors(state)
        elif has_adapters and tensor.requires_grad:
            lora.append(tensor)
        elif tensor.dtype == torch.int8:
            eight_bit += [tensor, *_row_scales(tensor)]
        else:
            others.append(tensor)
    # a few buffers are float32 in any model; what most bytes are in gives the name
    sizes: Counter[int] = Counter()
    for tensor in others:
        sizes[8 * tensor.element_size()] += _nbytes([tensor])
    bits = max(sizes, key=lambda size: sizes[size], default=16)
    block_constants = (
        f"{_nbytes(constants) / _nbytes(four_bit + constants):.1%} of it for block constants"
    )
    found = (
        ("4-bit weights", four_bit + constants, block_constants),
        ("8-bit weights", eight_bit, "with a scale for each row"),
        (f"{bits}-bit weights", others, "embedding, norms, output head"),
        ("LoRA weights", lora, "A and B of all layers"),
    )
    return [
        MemoryPart(name, _nbytes(tensors) / GIB, True, f"measured: {note}")
        for name, tensors, note in found
        if tensors
    ]


def optimizer_state_bytes(numbers: int, optimizer_bits: int = 8) -> int:
    """Bytes of AdamW's two states for one parameter tensor.

    Args:
        numbers: parameters in the tensor.
        optimizer_bits: 8 or 32. In 8 bits, as bitsandbytes does it, a tensor of 4096 numbers or
            more keeps 2 bytes for each, and two float32 constants for each 256; a smaller one
            stays in float32 (Dettmers et al. 2021, arXiv 2110.02861).
    """
    if _is_8bit(numbers, optimizer_bits):
        return 2 * (numbers + 4 * -(-numbers // _STATE_BLOCK))
    return 2 * 4 * numbers


def _is_8bit(numbers: int, optimizer_bits: int) -> bool:
    return optimizer_bits == 8 and numbers >= _LEAST_8BIT_NUMBERS


def _step_parts(
    model: Any, lora: list[Any], tokens: int, checkpointing: bool, bytes_per_logit: float
) -> list[MemoryPart]:
    """What comes and goes in a step: kept activations, then the logits, then one layer after the
    other."""
    shape, dtype = layer_shape(model.config), _compute_dtype(model)
    on_cpu = compute_device(model).type == "cpu"
    ranks = sum(sum(layer.r.get(a, 0) for a in layer.active_adapters) for layer in lora)
    full = layer_bytes_per_token(
        shape, -(-ranks // shape.layers), dtype.itemsize, on_cpu and dtype == torch.bfloat16
    )
    kept = layer_input_bytes_per_token(shape, dtype.itemsize) if checkpointing else full
    other = other_bytes_per_token(shape, dtype.itemsize, checkpointing)
    work = _largest_decoded(model) + (tokens * full if checkpointing else 0)
    work_note = "a decoded weight" + (f" and {tokens:,} x {full:,} bytes" if checkpointing else "")
    logits = tokens * shape.vocabulary
    loss = logits * bytes_per_logit
    return [
        _part(
            "activations",
            tokens * (shape.layers * kept + other),
            f"{tokens:,} tokens x ({shape.layers} x {kept:,} + {other:,}) bytes",
        ),
        _part("logits and loss", loss, f"{logits:,} x {bytes_per_logit:g} bytes", loss >= work),
        _part("one layer at work", work, work_note, work > loss),
    ]


def _largest_decoded(model: Any) -> int:
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    return max((s.shape.numel() * s.dtype.itemsize for s in states if s is not None), default=0)


def _compute_dtype(model: Any) -> torch.dtype:
    settings = settings_of(model)
    if settings is not None:
        return getattr(torch, settings.compute_dtype)
    return model.dtype if model.dtype.is_floating_point else torch.float16


def _row_scales(weight: torch.Tensor) -> list[torch.Tensor]:
    scales = getattr(weight, "SCB", None)  # what LLM.int8 calls them
    return [] if scales is None else [scales]


def _state_tensors(state: Any) -> list[torch.Tensor]:
    nested = getattr(state, "state2", None)
    found = [state.absmax, state.code, getattr(state, "offset", None)]
    if nested is not None:
        found += [nested.absmax, nested.code]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors; those that share their memory count once."""
    sizes = Counter({(t.device, t.data_ptr()): t.numel() * t.element_size() for t in tensors})
    return sizes.total()


def _part(name: str, size_bytes: float, note: str, is_at_peak: bool = True) -> MemoryPart:
    return MemoryPart(name, size_bytes / GIB, False, f"computed: {note}", is_at_peak)


def _check(batch_size: int, seq_length: int, optimizer_bits: int) -> None:
    for name, value in (("batch_size", batch_size), ("seq_length", seq_length)):
        if value < 1:
            raise UserError(f"{name} is not positive", got=value, allowed="an integer from 1 up")
    if optimizer_bits not in (8, 32):
        raise UserError(
            "there is no such optimiser state", got=f"{optimizer_bits} bits", allowed="8 or 32"
        )
