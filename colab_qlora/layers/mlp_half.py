"""The MLP half of a decoder layer: h2 = h1 + down_proj(act(gate(norm(h1))) * up(norm(h1))).

Plain functions over tensors (tokens, features). gate and up are one GEMM into one buffer
[gate | up | spare]. Where they are not kept, the activation takes up's place beside the spare
columns, and in the backward pass their gradients take their own places, so that neither needs a
buffer. down_proj is never computed again: no gradient needs its output. Both directions work on
chunks of tokens if the pass asks for it, which bounds the memory that lives inside the half; every
chunk decodes the weights again unless they still stand in their scratch slot.

Gemma 2 and 3 norm down_proj's output before it is added. The gradient of that norm needs its input,
which is always kept: it would take as many FLOPs a byte to compute again as down_proj has inputs,
3 to 8 times those of every other linear.
"""

from __future__ import annotations

import math

import torch

from colab_qlora.kernels.glu_lora import can_fuse_glu_lora, glu_lora_backward
from colab_qlora.kernels.swiglu import glu_backward, glu_forward
from colab_qlora.layers.gate_up_buffer import buffer_width, halves, new_buffer, whole_buffer
from colab_qlora.layers.gradients import Gradients
from colab_qlora.layers.layer_parts import LayerParts, Pass, token_chunks
from colab_qlora.layers.linear_group import GroupCall
from colab_qlora.layers.norm import norm_backward, normed
from colab_qlora.layers.saved import SavedTensors
from colab_qlora.layers.scratch import Wide, wide_of
from colab_qlora.layers.token_pieces import Pieces, part_of

# gradients by a block's first column and "a" or "b"
Known = dict[tuple[int, str], torch.Tensor]


def mlp_half(h1: torch.Tensor, parts: LayerParts, run: Pass, saved: SavedTensors) -> torch.Tensor:
    """Return h2 (tokens, width)."""
    h2 = _through(h1, parts, run, saved)
    if parts.branch_norms is None:
        return h2
    # in a function of its own: the buffers of the half are gone when h2 is made
    saved.put("down", h2)
    return normed(h2, parts.branch_norms[1], added=h1)[0]


def _through(h1: torch.Tensor, parts: LayerParts, run: Pass, saved: SavedTensors) -> torch.Tensor:
    """h2, or of a layer that norms its branches down_proj's output."""
    h2, pieces = torch.empty_like(h1), Pieces(saved.plan, h1.shape[0])
    is_normed = parts.branch_norms is not None
    kept = None
    if saved.plan >= {"gate", "up"}:
        kept = new_buffer(h1, parts)
    for rows in token_chunks(h1.shape[0], run.mlp_chunks.forward):
        wide, rstd = _normed(part_of(h1, rows), parts, run)
        pieces.put("rstd2", rows, rstd)
        buffer = part_of(kept, rows) if kept is not None else new_buffer(wide.main, parts)
        products = _gate_up(wide, buffer, None, parts, run, rows)
        pieces.put("xa_gate_up", rows, products)
        if kept is None:
            pieces.put("gate", rows, halves(buffer, parts)[0])
            pieces.put("up", rows, halves(buffer, parts)[1])
        m_wide = _activated(buffer, parts, is_free=kept is None)
        products = parts.down.forward(
            m_wide,
            part_of(h2, rows),
            _call(run, "down", rows),
            residual=None if is_normed else part_of(h1, rows),
            lead=_lead(run, rows),
        )
        pieces.put("xa_down", rows, products)
    if kept is not None:
        pieces.whole |= zip(("gate", "up"), halves(kept, parts), strict=True)
    for name, tensor in pieces.whole.items():
        saved.put(name, tensor)
    return h2


def mlp_half_backward(
    dh2: Wide,
    h1: torch.Tensor,
    parts: LayerParts,
    run: Pass,
    saved: SavedTensors,
    gradients: Gradients,
) -> Wide:
    """Gradient of h1, with room for o_proj's products, from that of h2 with room for down_proj's.

    The parameters' gradients go into `gradients`.
    """
    dh1 = parts.o.wide("d_o", h1.shape[0], h1.shape[1], h1)
    for rows in token_chunks(h1.shape[0], run.mlp_chunks.backward):
        # in a function of its own: nothing of one chunk stands beside the next
        _chunk_backward(rows, dh2, h1, dh1.main, parts, run, saved, gradients)
    return dh1


def _chunk_backward(
    rows: slice,
    dh2: Wide,
    h1: torch.Tensor,
    dh1: torch.Tensor,
    parts: LayerParts,
    run: Pass,
    saved: SavedTensors,
    gradients: Gradients,
) -> None:
    """`mlp_half_backward` for some of the tokens."""
    norm, some = parts.norm2, part_of(h1, rows)
    # the norm's backward pass writes the norm's output on its way, unless it is wanted before
    rstd = _kept_rstd(parts, saved, rows)
    comes_late = rstd is not None
    if rstd is None:
        wide, rstd = _normed(some, parts, run)
    else:
        wide = parts.gate_up.wide("x", some.shape[0], some.shape[1], some)
    buffer, products = _restored(rows, wide, parts, run, saved)
    dy = dh2 if some is h1 else wide_of(dh2.whole[rows], h1.shape[1])
    d_branch = _through_branch_norm(dy, rows, parts, saved, gradients)
    known = _through_down(d_branch, rows, buffer, products, parts, run, saved, gradients)
    d_buffer, dn = _through_gate_up(rows, wide, buffer, parts, run)
    if not comes_late:
        _add_gradients(rows, d_buffer, wide.main, products, known, parts, run, gradients, dn)
    again, out = wide.main if comes_late else None, part_of(dh1, rows)
    norm_backward(dn, some, norm, rstd, gradients, residual_grad=dy.main, out=out, written=again)
    if comes_late:
        _add_gradients(rows, d_buffer, wide.main, products, known, parts, run, gradients, dn)


def _through_branch_norm(
    dy: Wide, rows: slice, parts: LayerParts, saved: SavedTensors, gradients: Gradients
) -> Wide:
    """Gradient of down_proj's output, with room for its products."""
    if parts.branch_norms is None:
        return dy
    norm, branch = parts.branch_norms[1], saved.get("down")
    assert branch is not None
    branch = part_of(branch, rows)
    wide = parts.down.wide("d_branch", branch.shape[0], branch.shape[1], branch)
    _, rstd = normed(branch, norm, out=wide.main)
    norm_backward(dy.main, branch, norm, rstd, gradients, out=wide.main)
    return wide


def _kept_rstd(parts: LayerParts, saved: SavedTensors, rows: slice) -> torch.Tensor | None:
    """1 / rms of these tokens, if it was kept and nothing wants the norm's output before."""
    if parts.gate_up.has_modules:
        return None
    if any(saved.get(name) is None for name in ("gate", "up", "xa_gate_up")):
        return None
    rstd = saved.get("rstd2")
    return None if rstd is None else part_of(rstd, rows)


def _normed(h1: torch.Tensor, parts: LayerParts, run: Pass) -> tuple[Wide, torch.Tensor]:
    """norm(h1) in a scratch buffer with spare columns, and 1 / rms."""
    wide = parts.gate_up.wide("x", h1.shape[0], h1.shape[1], h1)
    _, rstd = normed(h1, parts.norm2, out=wide.main)
    return wide, rstd


def _gate_up(
    wide: Wide,
    buffer: torch.Tensor,
    only: frozenset[int] | None,
    parts: LayerParts,
    run: Pass,
    rows: slice,
) -> torch.Tensor:
    group = parts.gate_up
    out = buffer[:, : group.out_features]
    only, call = group.holding(only), _call(run, "gate_up", rows)
    return group.forward(wide, out, call, only=only, lead=_lead(run, rows))


def _activated(buffer: torch.Tensor, parts: LayerParts, *, is_free: bool) -> Wide:
    """act(gate) * up with down_proj's spare columns beside it; over `up` if the buffer is free."""
    width, spare = parts.down.in_features, parts.down.spare_columns(buffer.device)
    gate, up = halves(buffer, parts)
    if is_free:
        wide = wide_of(buffer[:, width : 2 * width + spare], width)
    else:
        wide = parts.down.wide("m", buffer.shape[0], width, buffer)
    glu_forward(gate, up, activation=parts.activation, out=wide.main)
    return wide


def _restored(
    rows: slice, wide: Wide, parts: LayerParts, run: Pass, saved: SavedTensors
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The buffer [gate | up | spare] of these tokens and the products X sA^T, kept or again.

    Products that were not kept are None where gate and up were.
    """
    products = saved.get("xa_gate_up")
    products = None if products is None else part_of(products, rows)
    kept = [saved.get("gate"), saved.get("up")]
    whole = whole_buffer(kept[0], kept[1], buffer_width(parts, wide.main))
    if whole is not None:
        return part_of(whole, rows), products
    buffer = new_buffer(wide.main, parts)
    missing = frozenset(i for i, tensor in enumerate(kept) if tensor is None)
    if missing:
        products = _gate_up(wide, buffer, missing, parts, run, rows)
    # after the product, which is of both where they are one linear
    for half, tensor in zip(halves(buffer, parts), kept, strict=True):
        if tensor is not None:
            half.copy_(tensor[rows])
    return buffer, products


def _through_down(
    dy: Wide,
    rows: slice,
    buffer: torch.Tensor,
    gate_up_products: torch.Tensor | None,
    parts: LayerParts,
    run: Pass,
    saved: SavedTensors,
    gradients: Gradients,
) -> Known:
    """Gradients of down_proj, and those of gate and up in the places of gate and up.

    Returns:
        Gradients of gate_up's adapters that were found on the way.
    """
    group, call, lead = parts.down, _call(run, "down", rows), _lead(run, rows)
    gate, up = halves(buffer, parts)
    dm = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    group.input_gradient(dy, dm, call)
    products = saved.get("xa_down")
    products = None if products is None else part_of(products, rows)
    known: Known = {}
    factors = _factors(dy, products, gate_up_products, parts)
    if group.has_modules:
        # autograd inside needs the activation before its own gradient is complete
        m = glu_forward(gate, up, activation=parts.activation)
        found = group.parameter_gradients(dy, m, products, call, dx=dm, lead=lead)
        glu_backward(dm, gate, up, activation=parts.activation, d_gate=gate, d_up=up, m=dm)
    elif factors and can_fuse_glu_lora(gate, *factors):
        ds, xg, xu = factors
        d_a, d_gate_b, d_up_b = glu_lora_backward(
            dm, gate, up, ds, xg, xu, activation=parts.activation, d_gate=gate, d_up=up
        )
        assert d_a is not None and d_gate_b is not None and d_up_b is not None
        of_down = {(0, "a"): d_a}
        if len(parts.gate_up.parts) == 1:
            known = {(0, "b"): torch.cat((d_gate_b, d_up_b))}
        else:
            known = {(0, "b"): d_gate_b, (xg.shape[1], "b"): d_up_b}
        found = group.parameter_gradients(dy, dm, products, call, known=of_down)
    else:
        glu_backward(dm, gate, up, activation=parts.activation, d_gate=gate, d_up=up, m=dm)
        found = group.parameter_gradients(dy, dm, products, call)
    gradients.add_all(group.trainable(), found)
    return known


def _factors(
    dy: Wide,
    products: torch.Tensor | None,
    gate_up_products: torch.Tensor | None,
    parts: LayerParts,
) -> tuple[torch.Tensor, ...]:
    """dY sB of down_proj, X sA^T of gate and of up; empty if there are not just these three.

    Where gate and up are one linear, they have one adapter, and its product is that of both.
    """
    if products is None or gate_up_products is None or not parts.mlp_is_plain:
        return ()
    rank = parts.gate_up.blocks[0][2].rank
    ds = dy.spare[:, : parts.down.rank]
    if len(parts.gate_up.parts) == 1:
        return ds, gate_up_products, gate_up_products
    return ds, gate_up_products[:, :rank], gate_up_products[:, rank : parts.gate_up.rank]


def _through_gate_up(
    rows: slice, wide: Wide, buffer: torch.Tensor, parts: LayerParts, run: Pass
) -> tuple[Wide, torch.Tensor]:
    """Gradients of gate and up with their products, and that of the norm's output from them."""
    group = parts.gate_up
    width = group.out_features + group.spare_columns(buffer.device)
    dy = wide_of(buffer if buffer.shape[1] == width else buffer[:, :width], group.out_features)
    x = wide.main
    dn = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    group.input_gradient(dy, dn, _call(run, "gate_up", rows))
    return dy, dn


def _add_gradients(
    rows: slice,
    dy: Wide,
    x: torch.Tensor,
    products: torch.Tensor | None,
    known: Known,
    parts: LayerParts,
    run: Pass,
    gradients: Gradients,
    dn: torch.Tensor,
) -> None:
    group, call, lead = parts.gate_up, _call(run, "gate_up", rows), _lead(run, rows)
    found = group.parameter_gradients(dy, x, products, call, dx=dn, lead=lead, known=known)
    gradients.add_all(group.trainable(), found)


def _lead(run: Pass, rows: slice) -> tuple[int, ...]:
    """Leading shape for modules that are called inside: the batch's, or one row of a chunk."""
    count = rows.stop - rows.start
    return run.lead if count == math.prod(run.lead) else (1, count)


def _call(run: Pass, name: str, rows: slice) -> GroupCall:
    """Every chunk of tokens draws random numbers of its own."""
    return run.call(f"{name}:{rows.start}")
