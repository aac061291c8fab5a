"""The attention half of a decoder layer: h1 = h0 + o_proj(attention(rope(qkv(norm(h0))))).

Gemma 2 and 3 norm o_proj's output before it is added; that output is then kept under the name h1,
and h1 is one pass away from it.

Plain functions over tensors (tokens, features). Forward hands every tensor of the save-set to the
store; backward takes what the store kept and rebuilds the rest in the order of dependence:
n1 -> q, k, v -> o -> h1.
"""

from __future__ import annotations

import torch

from colab_qlora.kernels.attention import (
    attention_backward,
    attention_forward,
    choose_attention,
)
from colab_qlora.kernels.copy_rows import copy_rows
from colab_qlora.kernels.qkv_gradients import place_qkv_gradients
from colab_qlora.kernels.rope import rope_
from colab_qlora.layers.gradients import Gradients
from colab_qlora.layers.layer_parts import LayerParts, Pass
from colab_qlora.layers.linear_group import LinearGroup
from colab_qlora.layers.norm import norm_backward, normed
from colab_qlora.layers.saved import RebuiltTensors, SavedTensors
from colab_qlora.layers.scratch import Wide, new_rows, wide_of

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# of this half, and the layer's input
_SAVE_SET = ("h0", "rstd1", "q", "k", "v", "o", "lse", "h1", "xa_qkv", "xa_o")


def attention_half(
    h0: torch.Tensor, parts: LayerParts, run: Pass, saved: SavedTensors
) -> torch.Tensor:
    """Return h1 (tokens, width)."""
    q, k, v = _projected(h0, parts, run, saved, None)
    o = _attended(q, k, v, parts, run, saved)
    # the store is only written to on the way forward: to read it would bring back what it sent away
    h1 = _joined(h0, o, None, parts, run, saved)
    if parts.branch_norms is None:
        return h1
    return normed(h1, parts.branch_norms[0], added=h0)[0]


def rebuild_attention(parts: LayerParts, run: Pass, saved: SavedTensors) -> dict[str, torch.Tensor]:
    """q, k, v, o, lse, h1 and the rest of the half's save-set, kept or computed again."""
    again = RebuiltTensors(saved, _SAVE_SET)
    h0 = again.need("h0")
    missing = frozenset(i for i, name in enumerate(("q", "k", "v")) if again.get(name) is None)
    if missing or again.get("xa_qkv") is None:
        _projected(h0, parts, run, again, missing)
    if again.get("o") is None or again.get("lse") is None:
        _attended(again.need("q"), again.need("k"), again.need("v"), parts, run, again)
    if again.get("h1") is None or again.get("xa_o") is None:
        _joined(h0, again.need("o"), again.get("h1"), parts, run, again)
    return again.tensors


def mlp_input(have: dict[str, torch.Tensor], parts: LayerParts) -> torch.Tensor:
    """h1, from what `rebuild_attention` returned, which lets it go."""
    if parts.branch_norms is None:
        return have.pop("h1")
    h1, have["rstd_branch"] = normed(have["h1"], parts.branch_norms[0], added=have["h0"])
    return h1


def attention_half_backward(
    dh1: Wide,
    have: dict[str, torch.Tensor],
    parts: LayerParts,
    run: Pass,
    gradients: Gradients,
    *,
    needs_dx: bool,
) -> torch.Tensor | None:
    """Gradient of h0 from that of h1, which has o_proj's spare columns beside it.

    The parameters' gradients go into `gradients`.
    """
    d_branch = dh1
    if parts.branch_norms is not None:
        branch, rstd = have.pop("h1"), have.pop("rstd_branch")
        d_branch = parts.o.wide("d_branch", branch.shape[0], branch.shape[1], branch)
        norm = parts.branch_norms[0]
        norm_backward(dh1.main, branch, norm, rstd, gradients, out=d_branch.main)
        del branch
    do = _through_o(d_branch, have, parts, run, gradients)
    tokens = dh1.main.shape[0]
    heads = (tokens, parts.q_heads, parts.head_dim)
    found = attention_backward(
        do.view(heads),
        *_rotated(have["q"], have["k"], parts, run),
        have["v"],
        have["o"].view(heads),
        have["lse"],
        run.attention,
        backend=run.backend,
    )
    width = parts.qkv.out_features
    dy = wide_of(new_rows(do, (tokens, width + parts.qkv.spare_columns(do.device))), width)
    d_heads = _heads(dy.main, parts)
    _place(found, d_heads, parts, run)
    del found  # as large as what it was placed into
    _through_head_norms(d_heads, have, parts, gradients)
    return _through_qkv(dy, dh1.main, have, parts, run, gradients, needs_dx=needs_dx)


def _through_o(
    d_branch: Wide,
    have: dict[str, torch.Tensor],
    parts: LayerParts,
    run: Pass,
    gradients: Gradients,
) -> torch.Tensor:
    """Gradient of the attention's output."""
    group, call = parts.o, run.call("o")
    do = torch.empty_like(have["o"])
    group.input_gradient(d_branch, do, call)
    found = group.parameter_gradients(d_branch, have["o"], have["xa_o"], call, dx=do, lead=run.lead)
    gradients.add_all(group.trainable(), found)
    return do


def _through_qkv(
    dy: Wide,
    dh1: torch.Tensor,
    have: dict[str, torch.Tensor],
    parts: LayerParts,
    run: Pass,
    gradients: Gradients,
    *,
    needs_dx: bool,
) -> torch.Tensor | None:
    """Gradient of h0, from that of q, k and v and over the residual."""
    group, call, norm = parts.qkv, run.call("qkv"), parts.norm1
    h0 = have["h0"]
    x = run.scratch.get("x", h0.shape, h0.dtype, h0.device)
    needs_weight = norm.weight.requires_grad
    dn = torch.empty_like(h0) if needs_dx or needs_weight else None
    group.input_gradient(dy, dn, call)
    # the norm's backward pass writes the norm's output on its way, unless it is wanted before
    comes_late = dn is not None and not group.has_modules and "rstd1" in have
    if comes_late:
        rstd = have["rstd1"]
    else:
        _, rstd = normed(h0, norm, out=x)
        _add_gradients(group, dy, x, have["xa_qkv"], run, dn, gradients)
    if dn is None:
        return None
    below = run.scratch.offer(dn, parts.down.spare_columns(dn.device))
    again = x if comes_late else None
    norm_backward(dn, h0, norm, rstd, gradients, residual_grad=dh1, out=below, written=again)
    if comes_late:
        _add_gradients(group, dy, x, have["xa_qkv"], run, dn, gradients)
    return below


def _add_gradients(
    group: LinearGroup,
    dy: Wide,
    x: torch.Tensor,
    products: torch.Tensor,
    run: Pass,
    dn: torch.Tensor | None,
    gradients: Gradients,
) -> None:
    found = group.parameter_gradients(dy, x, products, run.call("qkv"), dx=dn, lead=run.lead)
    gradients.add_all(group.trainable(), found)


def _projected(
    h0: torch.Tensor,
    parts: LayerParts,
    run: Pass,
    saved: SavedTensors | RebuiltTensors,
    only: frozenset[int] | None,
) -> Heads:
    """norm -> one GEMM -> rotation, or some of q, k, v alone; head norms put the rotation off."""
    group = parts.qkv
    wide = group.wide("x", h0.shape[0], group.in_features, h0)
    _, rstd = normed(h0, parts.norm1, out=wide.main)
    saved.put("rstd1", rstd)
    y = h0.new_empty((h0.shape[0], group.out_features))
    wanted = group.holding(only)
    products = group.forward(wide, y, run.call("qkv"), only=wanted, lead=run.lead)
    saved.put("xa_qkv", products, is_scratch=True)
    heads = _heads(y, parts)
    computed = frozenset(range(3)) if only is None else only
    turning = [heads[index] for index in (0, 1) if index in computed]
    if parts.q_norm is None and turning:
        _turn_(turning[0], turning[1] if len(turning) == 2 else None, parts, run)
    for index, name in enumerate(("q", "k", "v")):
        if index in computed:
            saved.put(name, heads[index])
    return heads


def _rotated(
    q: torch.Tensor, k: torch.Tensor, parts: LayerParts, run: Pass
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k as the attention sees them; a copy where they are kept before a norm per head."""
    if parts.q_norm is None or parts.k_norm is None:
        return q, k
    (q, _), (k, _) = normed(q, parts.q_norm), normed(k, parts.k_norm)
    _turn_(q, k, parts, run)
    return q, k


def _turn_(
    q: torch.Tensor, k: torch.Tensor | None, parts: LayerParts, run: Pass, *, inverse: bool = False
) -> None:
    """Rotate the columns of heads that the tables have: in Phi-4-mini a part of each."""
    if not parts.uses_rope:
        return
    turning = run.cos.shape[-1]
    if turning < parts.head_dim:
        q, k = q[..., :turning], None if k is None else k[..., :turning]
    rope_(q, k, run.cos, run.sin, inverse=inverse)


def _place(found: Heads, d_heads: Heads, parts: LayerParts, run: Pass) -> None:
    """Gradients of q, k and v before the rotation, into the columns of one buffer."""
    is_whole = run.cos.shape[-1] == parts.head_dim
    cos, sin = (run.cos, run.sin) if parts.uses_rope and is_whole else (None, None)
    place_qkv_gradients(*found, cos, sin, *d_heads)
    if not is_whole:
        _turn_(d_heads[0], d_heads[1], parts, run, inverse=True)


def _through_head_norms(
    d_heads: Heads, have: dict[str, torch.Tensor], parts: LayerParts, gradients: Gradients
) -> None:
    """Turn the gradients of normed q and k into those of the projections, in place."""
    if parts.q_norm is None or parts.k_norm is None:
        return
    for gradient, name, norm in (
        (d_heads[0], "q", parts.q_norm),
        (d_heads[1], "k", parts.k_norm),
    ):
        _, rstd = normed(have[name], norm)
        norm_backward(gradient, have[name], norm, rstd, gradients, out=gradient)


def _attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    parts: LayerParts,
    run: Pass,
    saved: SavedTensors | RebuiltTensors,
) -> torch.Tensor:
    q, k = _rotated(q, k, parts, run)
    if run.backend is None:
        run.backend = choose_attention(q, run.attention).name
    o, lse = attention_forward(q, k, v, run.attention, backend=run.backend)
    o = o.view(o.shape[0], parts.o.in_features)
    saved.put("o", o)
    saved.put("lse", lse)
    return o


def _joined(
    h0: torch.Tensor,
    o: torch.Tensor,
    h1: torch.Tensor | None,
    parts: LayerParts,
    run: Pass,
    saved: SavedTensors | RebuiltTensors,
) -> torch.Tensor:
    wide = wide_of(o, parts.o.in_features)
    if parts.o.spare_columns(o.device):
        wide = parts.o.wide("x", o.shape[0], parts.o.in_features, o)
        copy_rows(o, wide.main)
    only: frozenset[int] | None = frozenset()
    if h1 is None:
        h1, only = torch.empty_like(h0), None
    beside = h0 if parts.branch_norms is None else None
    products = parts.o.forward(wide, h1, run.call("o"), residual=beside, only=only, lead=run.lead)
    saved.put("xa_o", products, is_scratch=True)
    saved.put("h1", h1)
    return h1


def _heads(y: torch.Tensor, parts: LayerParts) -> Heads:
    """Views of q, k and v in the columns of one buffer, (tokens, heads, head_dim) each."""
    heads = parts.q_heads + 2 * parts.kv_heads
    row, width = y.stride(0), parts.head_dim
    whole = y.as_strided((y.shape[0], heads, width), (row, width, 1))
    q, k, v = whole.split((parts.q_heads, parts.kv_heads, parts.kv_heads), 1)
    return q, k, v
