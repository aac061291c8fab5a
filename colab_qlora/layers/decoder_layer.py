"""A whole decoder layer as one autograd.Function that owns what it keeps.

Autograd would keep 185 to 374 KB a token of an 8B layer, and a graph node an op; this keeps the
tensors that a plan names (94,568 bytes a token at most, `saved.py`) and is one node. It saves
nothing through autograd itself, so its backward pass can run once: a second one raises an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from colab_qlora.errors import UserError
from colab_qlora.kernels.copy_rows import copy_rows
from colab_qlora.layers.accumulation import float32_sums, no_autocast
from colab_qlora.layers.attention_half import (
    attention_half,
    attention_half_backward,
    mlp_input,
    rebuild_attention,
)
from colab_qlora.layers.gradients import Gradients
from colab_qlora.layers.layer_parts import LayerParts, Pass
from colab_qlora.layers.mlp_half import mlp_half, mlp_half_backward
from colab_qlora.layers.saved import SavedTensors
from colab_qlora.layers.scratch import Wide, new_rows, wide_of


def layer_forward(
    h0: torch.Tensor, parts: LayerParts, run: Pass, saved: SavedTensors
) -> torch.Tensor:
    """Output of the layer, (tokens, width), without a graph; `saved` gets what its plan names."""
    run.scratch.forget_contents()
    with torch.no_grad(), no_autocast(h0), float32_sums(h0):
        saved.put("h0", h0)
        h1 = attention_half(h0, parts, run, saved)
        h2 = mlp_half(h1, parts, run, saved)
        saved.end_forward()
        return h2


def layer_backward(
    dh2: Wide,
    parts: LayerParts,
    run: Pass,
    saved: SavedTensors,
    *,
    needs_dx: bool = True,
) -> tuple[torch.Tensor | None, Gradients]:
    """Gradient of the layer's input, (tokens, width), and those of its parameters.

    `dh2` has the spare columns of down_proj beside it.
    """
    run.scratch.forget_contents()
    gradients = Gradients()
    with torch.no_grad(), no_autocast(dh2.main), float32_sums(dh2.main):
        have = rebuild_attention(parts, run, saved)
        # nothing after it needs h1
        dh1 = mlp_half_backward(dh2, mlp_input(have, parts), parts, run, saved, gradients)
        dh0 = attention_half_backward(dh1, have, parts, run, gradients, needs_dx=needs_dx)
    return dh0, gradients


def check_backward(
    is_spent: bool, trainable: Sequence[torch.nn.Parameter], versions: Sequence[int]
) -> None:
    """Raise a UserError where a backward pass would give wrong gradients.

    Nothing goes through save_for_backward, so autograd does not watch the parameters.

    Args:
        is_spent: there was a backward pass already.
        versions: of `trainable`, in the forward pass.
    """
    if is_spent:
        raise UserError(
            "a second backward pass through a fused layer",
            got="retain_graph=True, or two losses that share this forward pass",
            allowed="one backward pass for each forward pass",
            do="Add the losses first, or undo the fused layers with restore(model)",
        )
    if [parameter._version for parameter in trainable] != versions:
        raise UserError(
            "an adapter was changed between the forward and the backward pass",
            got="an optimiser step, or another write into a LoRA weight",
            allowed="backward passes before the step that they belong to",
            do="Call backward() on every loss first, then optimizer.step()",
        )


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        parts: LayerParts,
        run: Pass,
        saved: SavedTensors,
        *trainable: torch.nn.Parameter,
    ) -> torch.Tensor:
        ctx.parts, ctx.run, ctx.saved, ctx.trainable = parts, run, saved, trainable
        ctx.versions = [parameter._version for parameter in trainable]
        flat = hidden.detach().reshape(-1, hidden.shape[-1]).contiguous()
        return layer_forward(flat, parts, run, saved).view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        check_backward(ctx.saved is None, ctx.trainable, ctx.versions)
        saved, ctx.saved = ctx.saved, None
        try:
            needs_dx = ctx.needs_input_grad[0]
            dh0, gradients = layer_backward(
                _widened(dh, ctx.parts, ctx.run), ctx.parts, ctx.run, saved, needs_dx=needs_dx
            )
        finally:
            saved.release()
        dx = dh0.view(dh.shape) if needs_dx and dh0 is not None else None
        return (dx, None, None, None, *(gradients.of(p) for p in ctx.trainable))


def _widened(dh: torch.Tensor, parts: LayerParts, run: Pass) -> Wide:
    """The gradient of the output as (tokens, width), with room for down_proj's products."""
    flat = dh.reshape(-1, dh.shape[-1])
    wide = run.scratch.taken(flat, parts.down.spare_columns(dh.device))
    if wide is None:
        tokens, width = flat.shape
        # only the last layer of a model comes here: no scratch, which would stand by for good
        room = parts.down.spare_columns(dh.device)
        wide = wide_of(new_rows(dh, (tokens, width + room)), width)
        copy_rows(flat if flat.stride(1) == 1 else flat.contiguous(), wide.main)
    return wide


def fused_layer(
    hidden: torch.Tensor, parts: LayerParts, run: Pass, saved: SavedTensors
) -> torch.Tensor:
    """A decoder layer, differentiable once with respect to its input and trainable parameters.

    Args:
        hidden: (batch, length, width) in float16, bfloat16, float32 or float64.
        parts: the layer's weights as this pass sees them.
        run: shapes, positions and scratch memory of the pass.
        saved: a store with the plan of what to keep for the backward pass.

    Returns:
        (batch, length, width), in the dtype of `hidden`.
    """
    trainable = parts.trainable()
    needs_graph = torch.is_grad_enabled() and (hidden.requires_grad or bool(trainable))
    if not needs_graph:
        flat = hidden.detach().reshape(-1, hidden.shape[-1]).contiguous()
        with torch.cuda.device_of(hidden):
            return layer_forward(flat, parts, run, SavedTensors(frozenset())).view(hidden.shape)
    # kernels start on the current device, which need not be the model's
    with torch.cuda.device_of(hidden):
        out: torch.Tensor = _FusedLayer.apply(hidden, parts, run, saved, *trainable)
    return out
