"""The MLP half of a decoder layer: h2 = h1 + down_proj(act(gate(norm(h1))) * up(norm(h1))).

Plain functions over tensors (tokens, features). gate and up are one GEMM into one buffer
[gate | up | spare]. Where they are not kept, the activation takes up's place beside the spare
columns, and in the backward pass their gradients take their own places, so that neither needs a
buffer. down_proj is never computed again: no gradient needs its output. Both directions work on
chunks of tokens if the pass asks for it, which bounds the memory that lives inside the half; every
chunk decodes the weights again unless they still stand in their scratch slot.
"""

from __future__ import annotations

import math

import torch

from colab_qlora.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from colab_qlora.kernels.swiglu import glu_backward, glu_forward
from colab_qlora.layers.gradients import Gradients
from colab_qlora.layers.layer_parts import LayerParts, Pass
from colab_qlora.layers.linear_group import GroupCall
from colab_qlora.layers.saved import SavedTensors


def mlp_half(h1: torch.Tensor, parts: LayerParts, run: Pass, saved: SavedTensors) -> torch.Tensor:
    """Return h2 (tokens, width)."""
    h2, pieces = torch.empty_like(h1), _Pieces(saved.plan, h1.shape[0])
    kept = None
    if saved.plan >= {"gate", "up"}:
        kept = h1.new_empty((h1.shape[0], _buffer_width(parts, h1)))
    for rows in run.token_chunks(h1.shape[0]):
        wide, _ = _normed(h1[rows], parts, run)
        buffer = kept[rows] if kept is not None else _scratch_buffer(wide, parts, run)
        products = _gate_up(wide, buffer, None, parts, run, rows)
        pieces.put("xa_gate_up", rows, products)
        if kept is None:
            pieces.put("gate", rows, _halves(buffer, parts)[0])
            pieces.put("up", rows, _halves(buffer, parts)[1])
        m_wide = _activated(buffer, parts, is_free=kept is None)
        products = parts.down.forward(
            m_wide,
            h2[rows],
            _call(run, "down", rows),
            residual=h1[rows],
            lead=_lead(run, rows),
        )
        pieces.put("xa_down", rows, products)
    if kept is not None:
        pieces.whole |= zip(("gate", "up"), _halves(kept, parts), strict=True)
    for name, tensor in pieces.whole.items():
        saved.put(name, tensor)
    return h2


def mlp_half_backward(
    dh2: torch.Tensor,
    h1: torch.Tensor,
    parts: LayerParts,
    run: Pass,
    saved: SavedTensors,
    gradients: Gradients,
) -> torch.Tensor:
    """Gradient of h1 from that of h2 (tokens, width); parameters' gradients go into `gradients`."""
    dh1 = torch.empty_like(h1)
    for rows in run.token_chunks(h1.shape[0]):
        wide, rstd = _normed(h1[rows], parts, run)
        buffer = _restored(rows, wide, parts, run, saved)
        _through_down(dh2[rows], rows, buffer, parts, run, saved, gradients)
        dn = _through_gate_up(rows, wide, buffer, parts, run, saved, gradients)
        _, dw = rms_norm_backward(
            dn,
            h1[rows],
            parts.norm2.weight,
            rstd,
            residual_grad=dh2[rows],
            needs_weight_grad=parts.norm2.weight.requires_grad,
            out=dh1[rows],
        )
        gradients.add(parts.norm2.weight, dw)
    return dh1


def _normed(h1: torch.Tensor, parts: LayerParts, run: Pass) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(h1) in a scratch buffer with spare columns, and 1 / rms."""
    wide = parts.gate_up.wide("x", h1.shape[0], h1.shape[1], h1)
    n2 = wide[:, : h1.shape[1]]
    _, rstd, _ = rms_norm_forward(h1, parts.norm2.weight, parts.norm2.eps, out=n2)
    return wide, rstd


def _gate_up(
    wide: torch.Tensor,
    buffer: torch.Tensor,
    only: frozenset[int] | None,
    parts: LayerParts,
    run: Pass,
    rows: slice,
) -> torch.Tensor:
    group = parts.gate_up
    out = buffer[:, : group.out_features]
    return group.forward(wide, out, _call(run, "gate_up", rows), only=only, lead=_lead(run, rows))


def _activated(buffer: torch.Tensor, parts: LayerParts, *, is_free: bool) -> torch.Tensor:
    """act(gate) * up with down_proj's spare columns beside it; over `up` if the buffer is free."""
    width, spare = parts.down.in_features, parts.down.spare_columns(buffer.device)
    gate, up = _halves(buffer, parts)
    if is_free:
        wide = buffer[:, width : 2 * width + spare]
    else:
        wide = parts.down.wide("m", buffer.shape[0], width, buffer)
    glu_forward(gate, up, activation=parts.activation, out=wide[:, :width])
    return wide


def _restored(
    rows: slice, wide: torch.Tensor, parts: LayerParts, run: Pass, saved: SavedTensors
) -> torch.Tensor:
    """The buffer [gate | up | spare] of these tokens: as kept, or computed again."""
    kept = [saved.get("gate"), saved.get("up")]
    whole = _whole_buffer(kept[0], kept[1], _buffer_width(parts, wide))
    if whole is not None:
        return whole[rows]
    buffer = _scratch_buffer(wide, parts, run)
    missing = frozenset(i for i, tensor in enumerate(kept) if tensor is None)
    for half, tensor in zip(_halves(buffer, parts), kept, strict=True):
        if tensor is not None:
            half.copy_(tensor[rows])
    if missing:
        _gate_up(wide, buffer, missing, parts, run, rows)
    return buffer


def _through_down(
    dh2: torch.Tensor,
    rows: slice,
    buffer: torch.Tensor,
    parts: LayerParts,
    run: Pass,
    saved: SavedTensors,
    gradients: Gradients,
) -> None:
    """Gradients of down_proj, and those of gate and up in the places of gate and up."""
    group, call, lead = parts.down, _call(run, "down", rows), _lead(run, rows)
    dy = group.wide("d_down", dh2.shape[0], group.out_features, dh2)
    dy[:, : group.out_features] = dh2
    gate, up = _halves(buffer, parts)
    dm = run.scratch.get("dm", tuple(gate.shape), dh2.dtype, dh2.device)
    group.input_gradient(dy, dm, call)
    products = saved.get("xa_down")
    products = None if products is None else products[rows]
    if group.has_modules:
        # autograd inside needs the activation before its own gradient is complete
        m = glu_forward(gate, up, activation=parts.activation)
        found = group.parameter_gradients(dy, m, products, call, dx=dm, lead=lead)
        glu_backward(dm, gate, up, activation=parts.activation, d_gate=gate, d_up=up, m=dm)
    else:
        glu_backward(dm, gate, up, activation=parts.activation, d_gate=gate, d_up=up, m=dm)
        found = group.parameter_gradients(dy, dm, products, call)
    gradients.add_all(group.trainable(), found)


def _through_gate_up(
    rows: slice,
    wide: torch.Tensor,
    buffer: torch.Tensor,
    parts: LayerParts,
    run: Pass,
    saved: SavedTensors,
    gradients: Gradients,
) -> torch.Tensor:
    """Gradient of the norm's output, from those of gate and up in their buffer."""
    group, call = parts.gate_up, _call(run, "gate_up", rows)
    dy = buffer[:, : group.out_features + group.spare_columns(buffer.device)]
    x = wide[:, : group.in_features]
    dn = torch.empty_like(x, memory_format=torch.contiguous_format)
    group.input_gradient(dy, dn, call)
    products = saved.get("xa_gate_up")
    products = None if products is None else products[rows]
    found = group.parameter_gradients(dy, x, products, call, dx=dn, lead=_lead(run, rows))
    gradients.add_all(group.trainable(), found)
    return dn


def _buffer_width(parts: LayerParts, like: torch.Tensor) -> int:
    spare = max(g.spare_columns(like.device) for g in (parts.gate_up, parts.down))
    return parts.gate_up.out_features + spare


def _scratch_buffer(like: torch.Tensor, parts: LayerParts, run: Pass) -> torch.Tensor:
    shape = (like.shape[0], _buffer_width(parts, like))
    return run.scratch.get("gate_up", shape, like.dtype, like.device)


def _halves(buffer: torch.Tensor, parts: LayerParts) -> tuple[torch.Tensor, torch.Tensor]:
    width = parts.down.in_features
    return buffer[:, :width], buffer[:, width : 2 * width]


def _whole_buffer(
    gate: torch.Tensor | None, up: torch.Tensor | None, width: int
) -> torch.Tensor | None:
    """The buffer that both are columns of, if it is still one; a store may have moved them."""
    if gate is None or up is None:
        return None
    together = (
        gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        and gate.stride() == up.stride() == (width, 1)
        and up.storage_offset() == gate.storage_offset() + gate.shape[1]
    )
    if not together:
        return None
    return gate.as_strided((gate.shape[0], width), (width, 1), gate.storage_offset())


def _lead(run: Pass, rows: slice) -> tuple[int, ...]:
    """Leading shape for modules that are called inside: the batch's, or one row of a chunk."""
    count = rows.stop - rows.start
    return run.lead if count == math.prod(run.lead) else (1, count)


def _call(run: Pass, name: str, rows: slice) -> GroupCall:
    """Every chunk of tokens draws random numbers of its own."""
    return run.call(f"{name}:{rows.start}")


class _Pieces:
    """Collects as one tensor each, of what a plan names, what comes chunk by chunk."""

    def __init__(self, plan: frozenset[str], tokens: int) -> None:
        self._plan = plan
        self._tokens = tokens
        self.whole: dict[str, torch.Tensor] = {}

    def put(self, name: str, rows: slice, tensor: torch.Tensor) -> None:
        if name not in self._plan:
            return
        if name not in self.whole:
            self.whole[name] = tensor.new_empty((self._tokens, *tensor.shape[1:]))
        self.whole[name][rows] = tensor
