"""A decoder layer whose passes are recorded, as one autograd.Function: see `layer_graph.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from colab_qlora.layers.decoder_layer import check_backward
from colab_qlora.layers.layer_graph import LayerGraph


class _RecordedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        graph: LayerGraph,
        flight: Any,
        *trainable: torch.nn.Parameter,
    ) -> torch.Tensor:
        ctx.graph, ctx.flight, ctx.trainable = graph, flight, trainable
        ctx.versions = [parameter._version for parameter in trainable]
        return graph.forward(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        check_backward(ctx.graph is None, ctx.trainable, ctx.versions)
        graph, ctx.graph = ctx.graph, None
        try:
            dx, gradients = graph.backward(dh)
        finally:
            ctx.flight = None
        return (dx, None, None, *gradients)


def recorded_layer(hidden: torch.Tensor, graph: LayerGraph, flight: Any) -> torch.Tensor:
    """A layer from its recording, differentiable once as `fused_layer` is.

    Args:
        hidden: (batch, length, width), as it was recorded for.
        flight: held until the backward pass is through, or nobody can ask for it any more.

    Returns:
        (batch, length, width); of all but the last layer good until the next batch's pass.
    """
    with torch.cuda.device_of(hidden):
        out: torch.Tensor = _RecordedLayer.apply(hidden, graph, flight, *graph.trainable)
    return out
