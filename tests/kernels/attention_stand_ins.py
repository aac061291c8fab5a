"""Stand-ins for torch's CUDA attention operators: their arguments, layouts and demands, on a CPU.

Each takes its arguments by the operator's own schema, checks what the kernel would check or take
for granted, and computes in plain torch. So the code around the kernels is tested without a GPU;
what the kernels compute is not.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

LSE_ROWS = 32


class StandIns:
    """What `torch.ops.aten` is to `attention_backends`, with the calls counted by name."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str):
        schema = getattr(torch.ops.aten, name).default._schema
        positional = [x.name for x in schema.arguments if not x.kwarg_only]
        by_name = {x.name for x in schema.arguments if x.kwarg_only}
        defaults = {x.name: x.default_value for x in schema.arguments if x.has_default_value()}

        def call(*args, **options):
            assert options.keys() <= by_name, (name, options)
            self.calls[name] = self.calls.get(name, 0) + 1
            given = dict(zip(positional, args, strict=False))
            assert not set(positional) - given.keys() - defaults.keys(), name
            call = SimpleNamespace(**{**defaults, **given, **options})
            assert call.dropout_p == 0
            return globals()[name](call)

        return call


def _attend(q, k, v, seen, bias, scale):
    """o, lse (heads, rows) of one sequence from (heads, rows, d)."""
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _seen(length, causal, left=None):
    place = torch.arange(length)
    behind = place[:, None] - place
    seen = (behind >= 0) if causal else torch.ones_like(behind, dtype=torch.bool)
    return seen if left is None else seen & (behind <= left)


def _forward(q, k, v, parts, causal, scale, bias=None, left=None):
    """o like q and lse a sequence, for q, k, v (sequence, heads, rows, d) and slices of rows."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    o, lse = torch.empty_like(q), {}
    for row, part in parts:
        seen = _seen(part.stop - part.start, causal, left)
        added = None if bias is None else bias[row]
        o[row, :, part], lse[row, part.start] = _attend(
            q[row, :, part], k[row, :, part], v[row, :, part], seen, added, scale
        )
    return o, lse


def _backward(do, q, k, v, o, lse, parts, causal, scale, bias=None, left=None):
    """dq, dk, dv, after o and lse have been found to be the forward's."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again, totals = _forward(*leaves, parts, causal, scale, bias, left)
        # o is read in products with do alone
        torch.testing.assert_close(o * (do != 0), again * (do != 0), rtol=1e-9, atol=1e-9)
        for (row, part), total in zip(parts, totals.values(), strict=True):
            torch.testing.assert_close(lse(row, part), total, rtol=1e-9, atol=1e-9)
        again.backward(do)
    return [x.grad for x in leaves]


def _rows(q):
    """The rows of a dense batch (batch, heads, rows, d) as sequences."""
    return [(row, slice(0, q.shape[2])) for row in range(q.shape[0])]


def _documents(starts, longest):
    assert starts.dtype == torch.int32
    ends = starts.tolist()
    assert longest == max(b - a for a, b in zip(ends[:-1], ends[1:], strict=True))
    return [(0, slice(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _bhtd(x):
    """(batch, rows, heads, d) or (rows, heads, d) as (batch, heads, rows, d)."""
    return (x if x.dim() == 4 else x[None]).transpose(1, 2)


def _contiguous_by_token(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _scaled_dot_product_cudnn_attention(call):
    assert call.attn_bias is None and call.compute_log_sumexp
    q, k, v = call.query, call.key, call.value
    o, lse = _forward(q, k, v, _rows(q), call.is_causal, call.scale)
    lse = torch.stack(list(lse.values()))[..., None]
    return _contiguous_by_token(o), lse, None, None, q.shape[2], q.shape[2], None, None, None


def _scaled_dot_product_cudnn_attention_backward(call):
    q, k, v = call.query, call.key, call.value
    assert call.attn_bias is None and call.cum_seq_q is None and call.cum_seq_k is None
    assert call.max_q == call.max_k == q.shape[2]
    assert call.logsumexp.shape == (*q.shape[:3], 1)
    return _backward(
        call.grad_out, q, k, v, call.out, lambda row, part: call.logsumexp[row, ..., 0],
        _rows(q), call.is_causal, call.scale,
    )  # fmt: skip


def _flash(call):
    q, k, v = (_bhtd(x) for x in (call.query, call.key, call.value))
    assert call.cum_seq_q is call.cum_seq_k and call.max_q == call.max_k
    if call.cum_seq_q is None:
        assert call.query.dim() == 4 and call.max_q == q.shape[2]
        return q, k, v, _rows(q)
    assert call.query.dim() == 3
    return q, k, v, _documents(call.cum_seq_q, call.max_q)


def _flash_attention_forward(call):
    q, k, v, parts = _flash(call)
    left = call.window_size_left
    assert not call.return_debug_mask and (left is None) == (call.window_size_right is None)
    o, lse = _forward(q, k, v, parts, call.is_causal, call.scale, left=left)
    o = o.transpose(1, 2).contiguous()
    if call.cum_seq_q is None:
        return o, torch.stack(list(lse.values())), None, None, None
    return o[0], torch.cat(list(lse.values()), -1), None, None, None


def _flash_attention_backward(call):
    q, k, v, parts = _flash(call)
    packed = call.cum_seq_q is not None

    def lse(row, part):
        return call.logsumexp[:, part] if packed else call.logsumexp[row]

    grads = _backward(
        _bhtd(call.grad_out), q, k, v, _bhtd(call.out), lse, parts, call.is_causal, call.scale,
        left=call.window_size_left,
    )  # fmt: skip
    return [x.transpose(1, 2)[0] if packed else x.transpose(1, 2) for x in grads]


def _padded(lse, rows):
    """(heads, n) with rows of `rows` entries, filled with inf as the kernel does."""
    return torch.nn.functional.pad(lse, (0, rows - lse.shape[-1]), value=torch.inf)


def _check_bias(bias, q):
    assert bias is None or (
        bias.dtype == q.dtype
        and bias.shape == (*q.shape[:3], q.shape[2])
        and bias.stride(3) == 1
        and not any(stride % 16 for stride in bias.stride()[:3])
    )


def _scaled_dot_product_efficient_attention(call):
    q, k, v, bias = call.query, call.key, call.value, call.attn_bias
    assert q.shape == k.shape == v.shape and call.compute_log_sumexp
    _check_bias(bias, q)
    o, lse = _forward(q, k, v, _rows(q), call.is_causal, call.scale, bias)
    rows = -(-q.shape[2] // LSE_ROWS) * LSE_ROWS
    lse = torch.stack([_padded(x, rows) for x in lse.values()])
    return _contiguous_by_token(o), lse, None, None


def _scaled_dot_product_efficient_attention_backward(call):
    q, k, v, bias = call.query, call.key, call.value, call.attn_bias
    assert q.shape == k.shape == v.shape and call.grad_input_mask == [True, True, True, False]
    assert call.out.transpose(1, 2).is_contiguous()
    _check_bias(bias, q)
    rows = -(-q.shape[2] // LSE_ROWS) * LSE_ROWS
    assert call.logsumexp.shape == (*q.shape[:2], rows) and call.logsumexp.stride(2) == 1
    assert call.logsumexp[..., q.shape[2] :].isinf().all()
    return *_backward(
        call.grad_out_, q, k, v, call.out, lambda row, part: call.logsumexp[row, :, part],
        _rows(q), call.is_causal, call.scale, bias,
    ), None  # fmt: skip


def _efficient(call):
    q, k, v = (_bhtd(x) for x in (call.query, call.key, call.value))
    assert q.shape == k.shape == v.shape and call.query.shape[0] == 1 and call.bias is None
    assert call.cu_seqlens_q is call.cu_seqlens_k and call.max_seqlen_q == call.max_seqlen_k
    rows = -(-call.max_seqlen_q // LSE_ROWS) * LSE_ROWS
    return q, k, v, _documents(call.cu_seqlens_q, call.max_seqlen_q), rows


def _efficient_attention_forward(call):
    q, k, v, parts, rows = _efficient(call)
    assert call.compute_log_sumexp and call.window_size is None
    o, lse = _forward(q, k, v, parts, call.custom_mask_type == 1, call.scale)
    lse = torch.stack([_padded(x, rows) for x in lse.values()])
    return o.transpose(1, 2).contiguous(), lse, None, None, None, None


def _efficient_attention_backward(call):
    q, k, v, parts, rows = _efficient(call)
    assert call.out.is_contiguous() and not call.bias_requires_grad
    lse = call.logsumexp
    assert lse.shape == (len(parts), q.shape[1], rows) and lse.is_contiguous()
    number = {part.start: index for index, (_, part) in enumerate(parts)}
    for index, (_, part) in enumerate(parts):
        assert lse[index, :, part.stop - part.start :].isinf().all()
    grads = _backward(
        _bhtd(call.grad_out_), q, k, v, _bhtd(call.out),
        lambda row, part: lse[number[part.start], :, : part.stop - part.start],
        parts, call.custom_mask_type == 1, call.scale,
    )  # fmt: skip
    return *(x.transpose(1, 2) for x in grads), None
