"""Cross-entropy of a block of logits, and its gradient, written over the logits.

For one row of raw logits z, with label y,

    x = logit_scale * z,  or  softcap * tanh(logit_scale * z / softcap)
    loss = logsumexp(x) - x[y]
    z <- gradient_scale * (softmax(x) - onehot(y)) * slope

where slope = dx / d(logit_scale * z) = 1 - tanh(...)^2, or 1 without a soft cap. The caller, which
multiplies by loss scales and counts anyway, also multiplies by logit_scale / gradient_scale.

Bytes moved: a row is read twice (maximum and sum together, then the gradient) and written once, so
6 bytes a logit in half precision; the loss alone reads it once. Stock reads and writes at least 28:
the float32 copy, log_softmax, its gradient, and the cast back.
"""

from __future__ import annotations

import torch

from colab_qlora.kernels.backend import runs_triton, tl, triton
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase
from colab_qlora.kernels.launch import ReadyLaunches, layout

# 4,096 logits by 8 warps are 16 values a thread: two 16-byte loads in half precision, enough bytes
# in flight to fill the memory bus, and few enough registers that none spills on sm_75
_MAX_BLOCK = 4096

# the reference works on so many logits at once: a float32 block of 1 MiB stays in a core's cache
# between its passes, and only that much of a half-precision chunk is ever held in float32
_REFERENCE_BLOCK_LOGITS = 2**18

# softmax falls below float16's smallest normal number, 6e-5, for almost every token of a large
# vocabulary. A power of two costs no rounding; 256 leaves room for weights up to 127, since the
# entries of a row's gradient add up to at most 2 in magnitude
_FLOAT16_GRADIENT_SCALE = 256.0

_launches = ReadyLaunches()


@triton.jit
def _tanh(x):
    # 2 sigmoid(2x) - 1 is off by 6e-8 whatever x, too much for the small x of a soft cap; there
    # Lambert's continued fraction, cut after seven steps, is exact to 2e-12 of tanh(x)
    square = x * x
    over = 135135.0 + square * (17325.0 + square * (378.0 + square))
    under = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    return tl.where(square < 1.0, x * over / under, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _transformed(raw, inner_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    value = raw.to(tl.float32) * inner_scale
    if HAS_SOFTCAP:
        value = softcap * _tanh(value)
    return value


@triton.jit
def _cross_entropy_rows_kernel(
    logits_pointer,
    targets_pointer,
    losses_pointer,
    row_stride,
    vocab,
    inner_scale,
    softcap,
    gradient_scale,
    HAS_SOFTCAP: tl.constexpr,
    WRITES_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_pointer = logits_pointer + row * row_stride
    target = tl.load(targets_pointer + row)
    # read before the second pass overwrites it
    target_raw = tl.load(row_pointer + target)
    target_value = _transformed(target_raw, inner_scale, softcap, HAS_SOFTCAP)
    columns = tl.arange(0, BLOCK)

    # finite, so that a block of -inf (a masked part of the vocabulary) gives exp(-inf), not NaN
    highest = -3.0e38
    total = 0.0
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        raw = tl.load(row_pointer + start + columns, mask=inside, other=0.0)
        value = _transformed(raw, inner_scale, softcap, HAS_SOFTCAP)
        value = tl.where(inside, value, float("-inf"))
        raised = tl.maximum(highest, tl.max(value, axis=0))
        total = total * tl.exp(highest - raised) + tl.sum(tl.exp(value - raised), axis=0)
        highest = raised
    tl.store(losses_pointer + row, tl.log(total) + (highest - target_value))

    if WRITES_GRADIENT:
        inverse_total = 1.0 / total
        for start in range(0, vocab, BLOCK):
            inside = start + columns < vocab
            raw = tl.load(row_pointer + start + columns, mask=inside, other=0.0)
            value = _transformed(raw, inner_scale, softcap, HAS_SOFTCAP)
            onehot = tl.where(start + columns == target, 1.0, 0.0)
            gradient = (tl.exp(value - highest) * inverse_total - onehot) * gradient_scale
            if HAS_SOFTCAP:
                tanh = value / softcap
                gradient *= 1.0 - tanh * tanh
            tl.store(
                row_pointer + start + columns,
                gradient.to(logits_pointer.dtype.element_ty),
                mask=inside,
            )


def _block_and_warps(vocab: int) -> tuple[int, int]:
    block = min(_MAX_BLOCK, max(128, triton.next_power_of_2(vocab)))
    return block, max(1, min(8, block // 512))


def _launch(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    writes_gradient: bool,
) -> None:
    tensors = (logits, targets, losses)
    key = (softcap, logit_scale, writes_gradient, *map(layout, tensors))
    ready = _launches.get(key)
    # Triton launches on the current device, which is not the tensor's in a model over two GPUs
    with torch.cuda.device_of(logits):
        if ready is not None:
            ready(*map(torch.Tensor.data_ptr, tensors))
            return
        rows, vocab = logits.shape
        block, num_warps = _block_and_warps(vocab)
        inner_scale = float(logit_scale / softcap if softcap else logit_scale)
        scales = (inner_scale, float(softcap or 1.0), gradient_scale(logits.dtype))
        _launches.start(
            *(key, _cross_entropy_rows_kernel, (rows,), tensors),
            (logits.stride(0), vocab, *scales, softcap is not None, writes_gradient, block),
            num_warps=num_warps,
            num_stages=1,
        )


def _reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    writes_gradient: bool,
) -> None:
    rows, vocab = logits.shape
    block = max(1, _REFERENCE_BLOCK_LOGITS // vocab)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        labels = targets[part].unsqueeze(1)
        _reference_block(logits[part], labels, losses[part], softcap, logit_scale, writes_gradient)


def _reference_block(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    writes_gradient: bool,
) -> None:
    # a copy in half precision, the logits themselves otherwise: they are scratch from here on
    values = logits.to(losses.dtype)
    if logit_scale != 1.0:
        values.mul_(logit_scale)
    slope = None
    if softcap is not None:
        values.div_(softcap).tanh_()
        slope = 1.0 - values.square() if writes_gradient else None
        values.mul_(softcap)
    picked = values.gather(1, labels)
    highest = values.amax(dim=1, keepdim=True)
    total = values.sub_(highest).exp_().sum(dim=1, keepdim=True)
    losses.copy_((total.log() + (highest - picked)).squeeze(1))
    if not writes_gradient:
        return
    values.div_(total)
    values.scatter_(1, labels, values.gather(1, labels) - 1.0)
    if slope is not None:
        values.mul_(slope)
    if (scale := gradient_scale(logits.dtype)) != 1.0:
        values.mul_(scale)
    if values is not logits:
        logits.copy_(values)


def gradient_scale(dtype: torch.dtype) -> float:
    """What the gradient written over logits of `dtype` is multiplied by: 256 in float16, else 1."""
    return _FLOAT16_GRADIENT_SCALE if dtype == torch.float16 else 1.0


def cross_entropy_rows_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    writes_gradient: bool = True,
) -> None:
    """Write every row's loss to `losses`, and its gradient over the logits.

    Args:
        logits: raw logits, shape (rows, vocab), any float dtype; rows may be any distance apart,
            the entries of a row are neighbours. Overwritten by `gradient_scale(logits.dtype)` times
            the gradient with respect to logit_scale * logits of the sum of the losses; without
            `writes_gradient` what they hold afterwards is undefined.
        targets: int64, shape (rows,), contiguous, every one in [0, vocab): not checked here.
        losses: output, shape (rows,), contiguous, float64 for float64 logits and else float32.
        softcap: bound the scaled logits to (-softcap, softcap) by a tanh.
        logit_scale: multiplies the logits first.
        writes_gradient: False for the losses alone.
    """
    if not logits.shape[0]:
        return
    run = _launch if runs_triton(logits) else _reference
    run(logits, targets, losses, softcap, logit_scale, writes_gradient)


def compile_cases() -> list[CompileCase]:
    """The kernel for Llama 3 and, soft-capped, for Gemma 2, with and without its gradient."""
    return [
        _compile_case(vocab, has_softcap, writes_gradient)
        for vocab, has_softcap in ((128_256, False), (256_000, True))
        for writes_gradient in (True, False)
    ]


def _compile_case(vocab: int, has_softcap: bool, writes_gradient: bool) -> CompileCase:
    block, num_warps = _block_and_warps(vocab)
    result = "losses and gradient" if writes_gradient else "losses"
    return CompileCase(
        name=f"cross_entropy_rows {result}{' softcap' if has_softcap else ''} {vocab}",
        kernel=_cross_entropy_rows_kernel,
        signature={
            "logits_pointer": HALF,
            "targets_pointer": "*i64",
            "losses_pointer": FLOAT,
            "row_stride": "i32",
            "vocab": "i32",
            "inner_scale": "fp32",
            "softcap": "fp32",
            "gradient_scale": "fp32",
        },
        constexprs={
            "HAS_SOFTCAP": has_softcap,
            "WRITES_GRADIENT": writes_gradient,
            "BLOCK": block,
        },
        num_warps=num_warps,
        divisible_by_16=("logits_pointer", "row_stride", "vocab"),
    )
