"""Attention whose scores are bounded by a tanh (Gemma 2), against a float64 softmax."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_oracle import cases, differentiate, draw, make, truth
from kernel_helpers import CAN_RUN_TRITON, DEVICE, assert_as_exact_as_stock, relative_error

from colab_qlora.errors import UserError
from colab_qlora.kernels import attention_math
from colab_qlora.kernels.attention import attention_backward, attention_forward
from colab_qlora.kernels.attention_choice import explain_attention, rank_backends
from colab_qlora.kernels.backend import use_backend

CASES = {name: dataclasses.replace(shape, cap=0.8) for name, shape in cases().items()}
NAMES = ("o", "dq", "dk", "dv")


def run(tensors, shape):
    q, k, v, do = tensors
    o, lse = attention_forward(q, k, v, shape)
    return o, *attention_backward(do, q, k, v, o, lse, shape)


def eager(tensors, shape):
    """As transformers' eager attention for Gemma 2: products and results in the tensors' dtype."""

    def attend(q, k, v, added):
        scores = (q @ k.transpose(-1, -2)) * shape.scale
        scores = torch.tanh(scores / shape.cap) * shape.cap + added.to(q.dtype)
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    return differentiate(attend, tensors, shape, tensors[0].dtype, "cpu")


@pytest.mark.parametrize("scores", [1, 300, 2**24])
@pytest.mark.parametrize("case", CASES)
def test_float64_is_exact(monkeypatch, case, scores):
    monkeypatch.setattr(attention_math, "_SCORES", scores)
    tensors = draw(CASES[case], torch.float64)
    for name, got, want in zip(
        NAMES, run(tensors, CASES[case]), truth(tensors, CASES[case]), strict=True
    ):
        assert relative_error(got, want) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["dense", "packed", "left padding", "packed window"])
def test_as_exact_as_the_models_own_code(case, dtype):
    shape = CASES[case]
    tensors = draw(shape, dtype, DEVICE)
    theirs, want = eager(tensors, shape), truth(tensors, shape)
    for name, got, other, exact in zip(NAMES, run(tensors, shape), theirs, want, strict=True):
        assert got.dtype == dtype
        assert_as_exact_as_stock(got, other, exact, name)


def test_a_cap_far_above_all_scores_changes_next_to_nothing():
    tensors = draw(make(2, 37), torch.float64)
    plain, capped = run(tensors, make(2, 37)), run(tensors, make(2, 37, cap=1e6))
    for got, want in zip(capped, plain, strict=True):
        assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("case", ["dense", "packed"])
@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ((7, 5), ["math"]),
        ((8, 0), ["triton", "math"]),
        ((9, 0), ["triton", "math"]),
        (None, ["math"]),
    ],
)
def test_tritons_kernel_alone_takes_a_cap_beside_plain_products(case, capability, names):
    device = "cpu" if capability is None else "cuda"
    ranked = rank_backends(CASES[case], torch.float16, device, capability)
    assert [choice.name for choice in ranked] == names
    assert "capped" in ranked[0].reason
    if names == ["math"]:
        assert "takes no cap" in explain_attention(CASES[case], torch.float16, capability)


def test_tritons_tanh_is_not_exact_enough_for_a_huge_cap():
    shape = dataclasses.replace(CASES["dense"], cap=1001.0)
    ranked = rank_backends(shape, torch.float16, "cuda", (9, 0))
    assert [choice.name for choice in ranked] == ["math"]
    assert "triton takes no cap of 1001.0 (up to 1000)" in ranked[0].reason


def test_no_fast_kernel_takes_a_cap_and_a_window():
    ranked = rank_backends(CASES["packed window"], torch.float16, "cuda", (9, 0))
    assert [choice.name for choice in ranked] == ["math"]


@pytest.mark.skipif(not CAN_RUN_TRITON, reason="needs Triton with a GPU or the interpreter")
@pytest.mark.parametrize("case", ["dense", "packed"])
def test_tritons_kernel_by_the_shape(case):
    shape = CASES[case]
    tensors = draw(shape, torch.float16, DEVICE)
    q, k, v, do = tensors
    with use_backend("triton"):
        o, lse = attention_forward(q, k, v, shape, backend="triton")
        got = (o, *attention_backward(do, q, k, v, o, lse, shape, backend="triton"))
    theirs, want = eager(tensors, shape), truth(tensors, shape)
    for name, mine, other, exact in zip(NAMES, got, theirs, want, strict=True):
        assert_as_exact_as_stock(mine, other, exact, name)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_that_bounds_nothing_is_refused(cap):
    with pytest.raises(UserError, match="cap is not a positive, finite number"):
        make(2, 5, cap=cap)
