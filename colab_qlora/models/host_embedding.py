"""An embedding whose table waits in host memory: of an 8B, a gigabyte for the price of a few ms.

A step reads as many rows of the table as it has tokens, 33 MB of 1 GiB for 2 x 2,048 tokens of an
8B; the host gathers them and sends them over. That the host has to see the token ids first makes
it wait for the GPU once a micro-batch, before the first layer, when little is queued.

The instance gets a subclass of its own class while its table is away; names, hooks and the
parameter itself stay.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from colab_qlora.models.fused_class import reduce_by, stock_class


def why_not_on_host(causal: Any) -> str:
    """Why the embedding of a causal language model has to stay; empty if it can go."""
    from colab_qlora.quantization.dynamic import dynamic_state

    table = causal.get_input_embeddings()
    if type(table) is not torch.nn.Embedding and not is_on_host(table):
        return f"the embedding is a {type(table).__name__}"
    head = causal.get_output_embeddings()
    # also the one that a wrapper of PEFT keeps beside the trained copy
    if head is not None and any(weight is table.weight for weight in head.parameters()):
        return "the head shares the embedding's weight"
    if dynamic_state(causal) is not None:
        return "its precision may change while the model trains"
    if table.weight.requires_grad:
        return "the embedding is trained"
    if table.max_norm is not None or "forward" in table.__dict__:
        return "the embedding does more than look rows up"
    return ""


def is_on_host(table: Any) -> bool:
    """True if `move_to_host` has moved this embedding's table."""
    return getattr(type(table), "forward", None) is _forward


def move_to_host(causal: Any) -> None:
    """Send the table to host memory; its rows are gathered there from now on."""
    table = causal.get_input_embeddings()
    if not is_on_host(table):
        stock: Any = type(table)
        table.weight.data = table.weight.data.cpu()
        table.__class__ = host_embedding_class(stock)


def bring_back(causal: Any, device: torch.device) -> None:
    """Undo `move_to_host`; where memory runs out, the table is still on the host, and in use."""
    table = causal.get_input_embeddings()
    if is_on_host(table):
        moved = table.weight.data.to(device)
        table.weight.data, table.__class__ = moved, stock_class(type(table))


def compute_device(model: torch.nn.Module) -> torch.device:
    """Where a model computes: its first parameter's device, but for a table on the host."""
    tables = [m.weight for m in model.modules() if is_on_host(m)]
    for parameter in model.parameters():
        if not any(parameter is table for table in tables):
            return parameter.device
    return torch.device("cpu")


@functools.cache
def host_embedding_class(stock: Any) -> Any:
    """The subclass of an embedding's class that gathers rows on the host."""
    made: Any = type(f"Host{stock.__name__}", (stock,), {"__module__": stock.__module__})
    made.forward = _forward
    made.__reduce_ex__ = reduce_by(host_embedding_class)
    return made


def _forward(self: Any, input: torch.Tensor) -> torch.Tensor:
    if self.weight.device == input.device:
        rows: torch.Tensor = torch.nn.functional.embedding(input, self.weight, self.padding_idx)
        return rows
    if self.weight.requires_grad:  # somebody trains it after all
        ids = input.to(self.weight.device)
        rows = torch.nn.functional.embedding(ids, self.weight, self.padding_idx)
        return rows.to(input.device)
    return gather_rows(self.weight, input)


def gather_rows(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a table in host memory, on the device of the ids.

    Args:
        table: (vocabulary, width).
        ids: token ids of any shape, on another device.

    Returns:
        (*ids.shape, width), in the dtype of `table`.

    Raises:
        IndexError: an id that the vocabulary does not have.
    """
    flat = ids.reshape(-1).to(table.device)
    # page-locked memory of torch's own pool, which knows when a copy out of it has ended
    rows = table.new_empty((flat.numel(), table.shape[1]), pin_memory=ids.is_cuda)
    torch.index_select(table, 0, flat, out=rows)
    return rows.to(ids.device, non_blocking=True).view(*ids.shape, table.shape[1])
