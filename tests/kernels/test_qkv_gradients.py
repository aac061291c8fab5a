"""dq, dk and dv in the columns of one buffer: turned back as `rope_` does it, and nothing else."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import BACKENDS, DEVICE, DTYPES, ON_GPU, relative_error

from colab_qlora.errors import UserError
from colab_qlora.kernels import qkv_gradients as module
from colab_qlora.kernels.backend import HAS_TRITON, use_backend
from colab_qlora.kernels.qkv_gradients import place_qkv_gradients
from colab_qlora.kernels.rope import rope_

NAN = float("nan")
SPARE = 8
NAMES = ("dq", "dk", "dv")
# (tokens, table_tokens, q_heads, kv_heads, head_dim): a head of three pairs; a batch of two rows;
# one token; more heads than a tile takes; more kv than q heads; a head of one pair; nothing
SHAPES = [
    (21, 21, 4, 2, 6),
    (6, 3, 3, 1, 80),
    (1, 1, 1, 1, 96),
    (5, 5, 33, 17, 128),
    (4, 1, 1, 5, 256),
    (7, 7, 3, 3, 2),
    (0, 7, 2, 2, 64),
]


def tables(tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of random positions, float64; NaN in the second half, which nobody reads."""
    positions = torch.randint(0, 4096, (tokens, 1), generator=torch.Generator().manual_seed(0))
    angles = positions.double() * 10000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    unread = torch.full_like(angles, NAN)
    return tuple(torch.cat([x, unread], 1).to(DEVICE) for x in (angles.cos(), angles.sin()))


def sizes_of(shape):
    tokens, _, q_heads, kv_heads, head_dim = shape
    return [(tokens, heads, head_dim) for heads in (q_heads, kv_heads, kv_heads)]


def gradients(shape, dtype):
    """dq with its heads before its tokens, dk amid NaN, dv contiguous."""
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes_of(shape)]
    dq, dk, dv = values
    dq = dq.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((*dk.shape[:2], dk.shape[2] + SPARE), NAN, dtype=dtype, device=DEVICE)
    wide[..., : dk.shape[2]] = dk
    return dq, wide[..., : dk.shape[2]], dv


def outputs(shape, dtype):
    """(buffer, its spare columns, q's, k's and v's columns): all NaN."""
    sizes = sizes_of(shape)
    widths = [heads * head_dim for _, heads, head_dim in sizes]
    wide = torch.full((shape[0], sum(widths) + 4 * SPARE), NAN, dtype=dtype, device=DEVICE)
    spare, parts, start = [wide[:, :SPARE]], [], SPARE
    for (_, heads, head_dim), width in zip(sizes, widths, strict=True):
        parts.append(wide[:, start : start + width].unflatten(1, (heads, head_dim)))
        spare.append(wide[:, start + width : start + width + SPARE])
        start += width + SPARE
    return wide, spare, parts


def turned_back(backend, dq, dk, dv, cos, sin):
    """What has to stand in the outputs, by `rope_` on copies."""
    dq, dk = dq.clone(), dk.clone()
    if cos is not None:
        with use_backend(backend):
            rope_(dq, dk, cos, sin, inverse=True)
    return dq, dk, dv.clone()


def assert_same(got, expected, name):
    # a GPU's compiler chooses which of the two products it fuses with the sum
    if ON_GPU and name != "dv":
        assert relative_error(got, expected) <= torch.finfo(got.dtype).eps, name
    else:
        assert torch.equal(got, expected), name


@pytest.mark.parametrize("table_dtype", ["float32", "model", "none"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_of_one_buffer(backend, shape, dtype, table_dtype):
    inputs = gradients(shape, dtype)
    kept = dtype if table_dtype == "model" else torch.float32
    cos, sin = (x.to(kept) for x in tables(shape[1], shape[4]))
    if table_dtype == "none":
        cos = sin = None
    expected = turned_back(backend, *inputs, cos, sin)
    before = [x.clone() for x in inputs]
    _, spare, parts = outputs(shape, dtype)
    with use_backend(backend):
        assert place_qkv_gradients(*inputs, cos, sin, *parts) is None
    for name, got, wanted in zip(NAMES, parts, expected, strict=True):
        assert_same(got, wanted, name)
    assert all(x.isnan().all() for x in spare)
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounded_once_from_the_truth(backend, dtype):
    shape = (6, 3, 3, 2, 80)
    inputs = gradients(shape, dtype)
    cos, sin = tables(3, 80)
    turn = torch.complex(cos, -sin)[:, None, :40].repeat(2, 1, 1)
    _, _, parts = outputs(shape, dtype)
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with use_backend(backend):
        place_qkv_gradients(*inputs, cos.to(table_dtype), sin.to(table_dtype), *parts)
    for name, x, got in zip(NAMES, inputs[:2], parts, strict=False):
        truth = torch.complex(x[..., :40].double(), x[..., 40:].double()) * turn
        truth = torch.cat([truth.real, truth.imag], -1)
        error = relative_error(got, truth)
        if dtype in (torch.float32, torch.float64):
            # two products, a sum and the table's own rounding
            assert error < torch.finfo(dtype).eps, name
        else:
            assert error <= 1.01 * relative_error(truth.to(dtype), truth), name


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("in_place", [(True,) * 3, (True, False, True), (False, True, False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place(backend, in_place, dtype):
    shape = (6, 3, 5, 2, 64)
    cos, sin = (x.float() for x in tables(3, 64))
    _, spare, parts = outputs(shape, dtype)
    inputs = list(gradients(shape, dtype))
    expected = turned_back(backend, *inputs, cos, sin)
    for i, same in enumerate(in_place):
        if same:
            inputs[i] = parts[i].copy_(inputs[i])
    with use_backend(backend):
        place_qkv_gradients(*inputs, cos, sin, *parts)
    for name, got, wanted in zip(NAMES, parts, expected, strict=True):
        assert_same(got, wanted, name)
    assert all(x.isnan().all() for x in spare)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_layout_is_checked_once_and_then_launched_by_addresses(monkeypatch):
    ready, repeated, grids = {}, [], []

    class Launches:
        get = ready.get

        def start(self, key, kernel, grid, tensors, constants, **options):
            assert len(tensors) + len(constants) == len(kernel.arg_names)
            grids.append(grid)
            ready[key] = lambda *addresses: repeated.append(addresses)

    monkeypatch.setattr(module, "_launches", Launches())
    monkeypatch.setattr(module, "_check", lambda *_: None)
    shape = (5, 5, 4, 2, 64)
    cos, sin = (x.float() for x in tables(5, 64))
    first = gradients(shape, torch.float16)
    _, _, parts = outputs(shape, torch.float16)
    with use_backend("triton"):
        place_qkv_gradients(*first, cos, sin, *parts)
        assert grids == [(5,)] and not repeated
        monkeypatch.setattr(module, "_check", None)
        # kept beside the first, so that the allocator cannot give the same addresses
        second = gradients(shape, torch.float16)
        place_qkv_gradients(*second, cos, sin, *parts)
        tensors = (*second, cos, sin, *parts)
        assert repeated == [tuple(x.data_ptr() for x in tensors)] and len(grids) == 1
        monkeypatch.setattr(module, "_check", lambda *_: None)
        place_qkv_gradients(*first, None, None, *parts)
        place_qkv_gradients(*second, None, None, *parts)
        assert len(grids) == 2 and repeated[1][3:5] == (None, None)
        # one layout, once in place and once not
        place_qkv_gradients(*parts, cos, sin, *parts)
        place_qkv_gradients(*outputs(shape, torch.float16)[2], cos, sin, *parts)
    assert len(grids) == len(ready) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused_by_name(backend):
    shape = (4, 4, 3, 2, 8)
    q, k, v = (torch.zeros(size, device=DEVICE) for size in sizes_of(shape))
    cos, sin = (x.float() for x in tables(4, 8))
    given = {"dq": q, "dk": k, "dv": v, "cos": cos, "sin": sin}
    given |= {"out_q": q.clone(), "out_k": k.clone(), "out_v": v.clone()}
    wider = torch.zeros(4, 3, 16, device=DEVICE)
    for changes, message in (
        ({"dq": q[..., :7]}, "dq cannot be rotated.*even head_dim"),
        ({"dq": q.flatten(1)}, "dq cannot be rotated"),
        ({"dq": q.long()}, "dq cannot be rotated.*int64"),
        ({"dq": q[:, :0]}, "dq cannot be rotated"),
        ({"dq": wider[..., ::2]}, "dq has gaps"),
        ({"dk": k[:3]}, "dk does not fit dq"),
        ({"dk": k[..., :6]}, "dk does not fit dq"),
        ({"dk": k.half()}, "dk does not fit dq.*float16"),
        ({"dk": wider[:, :2, ::2]}, "dk has gaps"),
        ({"dv": v[:, :1]}, "dv does not fit dk"),
        ({"dv": v.flatten(1)}, "dv cannot be rotated"),
        ({"dv": v.double()}, "dv does not fit dk.*float64"),
        ({"out_q": q[:, :2]}, "out_q does not fit dq"),
        ({"out_q": wider[..., ::2]}, "out_q has gaps"),
        ({"out_k": k.half()}, "out_k does not fit dk.*float16"),
        ({"out_v": v[:3]}, "out_v does not fit dv"),
        ({"sin": None}, "cos is given without sin"),
        ({"cos": None}, "sin is given without cos"),
        ({"cos": cos[:, :4], "sin": sin[:, :4]}, "cos does not fit dq"),
        ({"cos": cos.long()}, "cos does not fit dq.*int64"),
        ({"cos": cos[None]}, "cos does not fit dq"),
        ({"sin": sin[:2]}, "sin does not fit cos"),
        ({"sin": sin.half()}, "sin does not fit cos"),
        ({"cos": cos[:3], "sin": sin[:3]}, "cos does not cover the tokens of dq"),
        ({"cos": cos[:0], "sin": sin[:0]}, "cos does not cover the tokens of dq"),
    ):
        with use_backend(backend), pytest.raises(UserError, match=message):
            place_qkv_gradients(**(given | changes))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_compile_cases_name_every_argument():
    cases = module.compile_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert sorted([*case.signature, *case.constexprs]) == sorted(case.kernel.arg_names)
        assert set(case.divisible_by_16) <= set(case.signature)
