"""Rotary embedding: no further from the float64 truth than transformers', in place and strided."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import BACKENDS, DEVICE, DTYPES, assert_as_exact_as_stock, relative_error

from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.rope import rope, rope_

NAN = float("nan")
SPARE = 8
# (tokens, table_tokens, q_heads, kv_heads, head_dim): one sequence, a batch, one token, more heads
# than a program takes, more kv than q heads, a head of one pair, nothing
SHAPES = [
    (21, 21, 4, 2, 64),
    (6, 3, 3, 1, 80),
    (1, 1, 1, 1, 96),
    (5, 5, 33, 17, 128),
    (4, 1, 1, 5, 256),
    (7, 7, 3, 3, 2),
    (0, 7, 2, 2, 64),
]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _backend(backend):
    with use_backend(backend):
        yield


def tables(tokens: int, head_dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as transformers makes them, float64; the angles of random positions."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 4096, (tokens, 1), generator=generator).double()
    angles = positions * 10000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.cat([angles, angles], dim=1).to(DEVICE)
    return angles.cos(), angles.sin()


def stock_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """transformers' rotation of a batch (tokens, heads, head_dim), its tables in x's dtype."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    batch = x.unflatten(0, (-1, len(cos))) if len(x) else x.unflatten(0, (0, 1))
    rows = slice(batch.shape[1])
    cos, sin = (table[rows].to(x.dtype).expand(len(batch), -1, -1) for table in (cos, sin))
    return apply_rotary_pos_emb(batch, batch, cos, sin, unsqueeze_dim=2)[0].flatten(0, 1)


def exact_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same rotation as a product of complex numbers, in float64."""
    half = x.shape[-1] // 2
    turn = torch.complex(cos.double(), sin.double())[:, None, :half]
    turned = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = turned * turn.repeat(len(x) // max(len(cos), 1), 1, 1)
    return torch.cat([turned.real, turned.imag], dim=-1)


def projected(tokens, q_heads, kv_heads, head_dim, dtype):
    """(wide buffer, q, k): normal q and k side by side amid NaN, as one GEMM writes q, k and v."""
    q_columns, k_columns = q_heads * head_dim, kv_heads * head_dim
    columns = q_columns + k_columns + 2 * SPARE
    wide = torch.full((tokens, columns), NAN, dtype=dtype, device=DEVICE)
    values = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(5)) * 2
    wide[:, SPARE:-SPARE] = values[:, SPARE:-SPARE].to(DEVICE, dtype)
    q, k = wide[:, SPARE:-SPARE].split([q_columns, k_columns], dim=1)
    return wide, q.unflatten(1, (q_heads, head_dim)), k.unflatten(1, (kv_heads, head_dim))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("table_dtype", ["float32", "model"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_as_exact_as_stock_in_one_wide_buffer(shape, dtype, table_dtype, inverse):
    tokens, table_tokens, q_heads, kv_heads, head_dim = shape
    exact_cos, exact_sin = tables(table_tokens, head_dim)
    kept = dtype if table_dtype == "model" else torch.float32
    cos, sin = exact_cos.to(kept), exact_sin.to(kept)
    wide, q, k = projected(tokens, q_heads, kv_heads, head_dim, dtype)
    way = -1 if inverse else 1
    truth = [exact_rope(x, exact_cos, way * exact_sin) for x in (q, k)]
    stock = [stock_rope(x, cos, way * sin) for x in (q, k)]
    assert rope_(q, k, cos, sin, inverse=inverse) is None
    assert_as_exact_as_stock(q, stock[0], truth[0], "q")
    assert_as_exact_as_stock(k, stock[1], truth[1], "k")
    if kept != dtype:
        # rounded once: the nearest half to the truth, save for a few near ties
        assert relative_error(q, truth[0]) <= 1.01 * relative_error(truth[0].to(dtype), truth[0])
    assert wide[:, :SPARE].isnan().all() and wide[:, -SPARE:].isnan().all()


def test_only_the_first_half_of_the_tables_is_read():
    cos, sin = (table.float() for table in tables(5, 64))
    _, q, k = projected(5, 3, 2, 64, torch.float32)
    expected = [stock_rope(x, cos, sin) for x in (q, k)]
    wide_cos, wide_sin = (torch.full((5, 70), NAN, device=DEVICE) for _ in range(2))
    wide_cos[:, :32], wide_sin[:, :32] = cos[:, :32], sin[:, :32]
    rope_(q, k, wide_cos[:, :64], wide_sin[:, :64])
    for ours, theirs in zip((q, k), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_alone_leave_the_keys(dtype):
    cos, sin = (table.float() for table in tables(5, 96))
    wide, q, k = projected(5, 3, 2, 96, dtype)
    both = projected(5, 3, 2, 96, dtype)
    rope_(*both[1:], cos, sin)
    keys = k.clone()
    rope_(q, None, cos, sin)
    assert torch.equal(q, both[1]) and torch.equal(k, keys)
    # keys on their own, as when only they are rebuilt
    rope_(k, None, cos, sin)
    assert torch.equal(k, both[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_before_tokens_in_memory(dtype):
    cos, sin = (table.float() for table in tables(7, 64))
    _, q, k = projected(14, 3, 2, 64, dtype)
    swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]
    rope_(q, k, cos, sin)
    rope_(*swapped, cos, sin)
    assert torch.equal(swapped[0], q) and torch.equal(swapped[1], k)


def test_float64_is_exact():
    cos, sin = tables(5, 80)
    _, q, k = projected(10, 3, 2, 80, torch.float64)
    truth = [exact_rope(x, cos, sin) for x in (q, k)]
    before = [x.clone() for x in (q, k)]
    rope_(q, k, cos, sin)
    for ours, exact in zip((q, k), truth, strict=True):
        assert relative_error(ours, exact) < 1e-15
    rope_(q, k, cos, sin, inverse=True)
    for ours, exact in zip((q, k), before, strict=True):
        assert relative_error(ours, exact) < 1e-15


def test_reference_allocates_half_of_a_float32_tensor(backend):
    if backend == "triton" or DEVICE == "cuda":
        pytest.skip("counts what the reference allocates on a CPU")
    cos, sin = (table.float() for table in tables(64, 64))
    _, q, k = projected(64, 8, 2, 64, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        rope_(q, k, cos, sin)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest == q.numel() * 4 // 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_autograd_returns_new_tensors_and_both_gradients(needs, dtype):
    exact_tables = tables(5, 96)
    cos, sin = (table.float() for table in exact_tables)
    _, *inputs = projected(10, 3, 2, 96, dtype)
    weights = [x.flip(0) for x in inputs]
    leaves = [x.detach().requires_grad_(flag) for x, flag in zip(inputs, needs, strict=True)]
    before = [x.detach().clone() for x in leaves]
    got = rope(*leaves, cos, sin)
    for x, ours, original in zip(leaves, got, before, strict=True):
        assert torch.equal(x, original) and ours.is_contiguous()
        assert_as_exact_as_stock(
            ours, stock_rope(x, cos, sin), exact_rope(x, *exact_tables), "output"
        )
    sum((y * w).sum() for y, w in zip(got, weights, strict=True)).backward()
    for x, w, needed in zip(leaves, weights, needs, strict=True):
        if not needed:
            assert x.grad is None
            continue
        other = x.detach().clone().requires_grad_()
        stock = torch.autograd.grad(stock_rope(other, cos, sin), other, w)[0]
        other = x.detach().double().requires_grad_()
        truth = torch.autograd.grad(exact_rope(other, *exact_tables), other, w.double())[0]
        assert_as_exact_as_stock(x.grad, stock, truth, "gradient")


def test_autograd_takes_expanded_gradients_and_an_unused_output():
    cos, sin = (table.float() for table in tables(5, 64))
    _, q, k = projected(5, 3, 2, 64, torch.float32)
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    rope(q, k, cos, sin)[0].sum().backward()
    expected = exact_rope(torch.ones_like(q), cos, -sin)
    assert relative_error(q.grad, expected) < 1e-6
    assert not k.grad.any()


def test_second_derivative():
    cos, sin = tables(3, 4)
    inputs = [torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    cos, sin = cos.cpu(), sin.cpu()
    assert torch.autograd.gradgradcheck(lambda q, k: rope(q, k, cos, sin), inputs)


def test_what_does_not_fit_is_refused_by_name():
    cos, sin = (table.float() for table in tables(4, 8))
    q, k = torch.zeros(4, 3, 8, device=DEVICE), torch.zeros(4, 2, 8, device=DEVICE)
    wanting = q.clone().requires_grad_()
    for changes, message in (
        ({"q": q[..., :7]}, "q cannot be rotated.*even head_dim"),
        ({"q": q.flatten(1)}, "q cannot be rotated"),
        ({"q": q.long()}, "q cannot be rotated.*int64"),
        ({"q": q[..., ::2]}, "q cannot be rotated"),
        ({"q": wanting}, "q needs a gradient"),
        ({"k": k[:3]}, "k does not fit q"),
        ({"k": k[..., :6]}, "k does not fit q"),
        ({"k": k.half()}, "k does not fit q.*float16"),
        ({"k": wanting}, "k needs a gradient"),
        ({"cos": cos[:, :4], "sin": sin[:, :4]}, "cos does not fit q"),
        ({"cos": cos.long()}, "cos does not fit q.*int64"),
        ({"cos": cos[None]}, "cos does not fit q"),
        ({"sin": sin[:2]}, "sin does not fit cos"),
        ({"sin": sin.half()}, "sin does not fit cos"),
        ({"cos": cos[:3], "sin": sin[:3]}, "cos does not cover the tokens of q"),
        ({"cos": cos[:0], "sin": sin[:0]}, "cos does not cover the tokens of q"),
        ({"cos": cos.repeat(2, 1), "sin": sin.repeat(2, 1)}, "cos does not cover"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_(**({"q": q, "k": k, "cos": cos, "sin": sin} | changes))
