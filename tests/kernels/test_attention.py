"""Attention against a float64 softmax over all tokens: results, gradients, buffers, memory."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import cancelling, cases, draw, left_padding, make, on, stock, truth
from attention_stand_ins import StandIns
from kernel_helpers import BACKENDS, DEVICE, assert_as_exact_as_stock, relative_error

from colab_qlora.errors import UserError
from colab_qlora.kernels import attention_backends, attention_math
from colab_qlora.kernels.attention import (
    attention,
    attention_backward,
    attention_forward,
    choose_attention,
)
from colab_qlora.kernels.attention_choice import FEATURES, rank_backends
from colab_qlora.kernels.backend import use_backend

CPU_BACKENDS = ["cpu_flash", "math"]
CASES = cases()
NAMES = ("o", "dq", "dk", "dv")


def run(tensors, shape, backend=None, **buffers):
    """(o, dq, dk, dv) by hand, as a decoder layer does it."""
    q, k, v, do = tensors
    o, lse = attention_forward(q, k, v, shape, out=buffers.pop("out", None), backend=backend)
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    return o, *attention_backward(do, q, k, v, o, lse, shape, backend=backend, **buffers)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_float64_is_exact(backend, case):
    tensors = draw(CASES[case], torch.float64)
    for name, got, want in zip(
        NAMES, run(tensors, CASES[case], backend), truth(tensors, CASES[case]), strict=True
    ):
        assert relative_error(got, want) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_torch(backend, case, dtype):
    shape = CASES[case]
    tensors = draw(shape, dtype)
    want, theirs = truth(tensors, shape), stock(tensors, shape)
    # "one token" has gradients of zero
    terms = cancelling(tensors, shape.scale)
    for name, got, other, exact in zip(
        NAMES, run(tensors, shape, backend), theirs, want, strict=True
    ):
        assert got.dtype == dtype
        assert_as_exact_as_stock(got, other, exact, name, terms=terms.get(name))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("lengths", [(20, 20, 1, 22), (63,), (31, 32)])
def test_packed_documents_are_the_separate_ones_bit_for_bit(backend, lengths):
    shape = make(1, 63, lengths=lengths)
    tensors = draw(shape, torch.float32)
    packed = run(tensors, shape, backend)
    for start, end in shape.bounds():
        alone = run([x[start:end] for x in tensors], make(1, end - start), backend)
        for name, got, want in zip(NAMES, packed, alone, strict=True):
            assert torch.equal(got[start:end], want), (name, start)


@pytest.mark.parametrize("most", [1, 2 * 2 * 63 * 2 * 32 * 4])
@pytest.mark.parametrize("case", CASES)
def test_a_few_heads_at_a_time_give_the_same_bits(monkeypatch, case, most):
    shape = CASES[case]
    tensors = draw(shape, torch.float32)
    want = run(tensors, shape, "cpu_flash")
    monkeypatch.setattr(attention_backends, "MOST_REPEATED_BYTES", most)
    parts = attention_backends.head_parts(shape, 4)
    assert sum(few.kv_heads for few, _, _ in parts) == shape.kv_heads
    assert len(parts) == shape.kv_heads or shape.group == 1 or most > 1
    for name, got, expected in zip(NAMES, run(tensors, shape, "cpu_flash"), want, strict=True):
        assert torch.equal(got, expected), name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_documents_by_cu_seqlens_alone(backend):
    starts = torch.tensor([0, 20, 40, 41, 63], dtype=torch.int32)
    tensors = draw(make(1, 63), torch.float32)
    named = run(tensors, make(1, 63, lengths=(20, 20, 1, 22)), backend)
    for got, want in zip(run(tensors, make(1, 63, cu_seqlens=starts), backend), named, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_padding_gives_zeros_and_takes_no_gradient(backend):
    shape = CASES["left padding"]
    tensors = draw(shape, torch.float32)
    padding = torch.cat([torch.arange(21) < count for count in (0, 9, 20)])
    for got in run(tensors, shape, backend):
        assert torch.isfinite(got).all()
        assert not got[padding].any() and got[~padding].any()


@pytest.mark.parametrize("number", [-1e9, -torch.inf])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_masks_written_with_other_large_numbers(backend, number):
    shape = CASES["left padding"]
    added = torch.zeros(shape.mask.shape).masked_fill(~shape.mask, number)
    tensors = draw(shape, torch.float16)
    real = torch.cat([torch.arange(21) >= count for count in (0, 9, 20)])
    tensors[3][~real] = 0
    want = run(tensors, shape, backend)
    for got, expected in zip(run(tensors, make(3, 21, mask=added), backend), want, strict=True):
        assert torch.isfinite(got).all()
        assert torch.equal(got[real], expected[real])


@pytest.mark.parametrize("case", ["dense", "packed", "left padding", "window", "one token"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_columns_of_wider_buffers(backend, case):
    check_columns(CASES[case], backend, torch.float32, "cpu")


def check_columns(shape, backend, dtype, device):
    """q, k, v, o, do and the gradients are columns of buffers whose spare columns hold NaN."""
    tensors = draw(shape, dtype, device)
    want = run(tensors, shape, backend)
    q_end, width = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    starts = (0, q_end, q_end + width, q_end + 2 * width)

    def columns(rows=shape.tokens):
        buffer = torch.full((rows, starts[3] + q_end + 16), torch.nan, dtype=dtype, device=device)
        ends = (*starts[1:], starts[3] + q_end)
        parts = [buffer[:, a:b] for a, b in zip(starts, ends, strict=True)]
        return buffer, [part.unflatten(1, (-1, shape.head_dim)) for part in parts]

    _, views = columns()
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    results, (dq, dk, dv, out) = columns()
    got = run(views, shape, backend, out=out, dq=dq, dk=dk, dv=dv)
    for given, returned, expected in zip((out, dq, dk, dv), got, want, strict=True):
        assert returned.data_ptr() == given.data_ptr()
        assert torch.equal(given, expected) or device != "cpu"
        assert relative_error(given, expected) < 10 * torch.finfo(dtype).eps
    assert results[:, -16:].isnan().all()


@pytest.mark.parametrize("case", ["dense", "longer", "not causal", "window and padding", "packed"])
@pytest.mark.parametrize("scores", [1, 300, 4000])
def test_plain_attention_in_chunks(monkeypatch, case, scores):
    tensors = draw(CASES[case], torch.float64)
    monkeypatch.setattr(attention_math, "_SCORES", scores)
    for got, want in zip(
        run(tensors, CASES[case], "math"), truth(tensors, CASES[case]), strict=True
    ):
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("launch", BACKENDS)
@pytest.mark.parametrize("case", ["packed", "dense"])
def test_the_triton_kernel(case, launch):
    shape = CASES[case]
    tensors = draw(shape, torch.float32, DEVICE)
    want, theirs = truth(tensors, shape), stock(tensors, shape)
    with use_backend(launch):
        results = run(tensors, shape, "triton")
        if case == "packed":
            check_columns(shape, "triton", torch.float32, DEVICE)
    for name, got, other, exact in zip(NAMES, results, theirs, want, strict=True):
        assert_as_exact_as_stock(got, other, exact, name)


@pytest.mark.parametrize("shape", [make(0, 7), make(2, 0), make(1, 0, documents=())], ids=str)
def test_no_tokens(shape):
    tensors = draw(shape, torch.float32)
    for got, x in zip(run(tensors, shape), (*tensors[:1], *tensors[:3]), strict=True):
        assert got.shape == x.shape


def test_what_is_kept_for_the_backward_has_no_expanded_keys():
    shape = make(1, 21, (4, 2, 8))
    q, k, v, do = draw(shape, torch.float32)
    kept = []
    q.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        o = attention(q, k, v, shape)
    assert [tuple(x.shape) for x in kept[:4]] == [(21, 4, 8), (21, 2, 8), (21, 2, 8), (21, 4, 8)]
    assert len(kept) == 5 and kept[4].numel() == 21 * 4
    o.backward(do)


def test_graph_gives_the_gradients_and_no_second_ones():
    shape = CASES["packed"]
    tensors = draw(shape, torch.float64)
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    o = attention(q, k, v, shape, backend="math")
    grads = torch.autograd.grad(o, (q, k, v), tensors[3].requires_grad_(), create_graph=True)
    for got, want in zip((o, *grads), truth(tensors, shape), strict=True):
        assert relative_error(got, want) < 1e-12
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


def test_an_expanded_gradient_of_the_output():
    shape = CASES["dense"]
    q, k, v, do = draw(shape, torch.float64)
    ones = torch.ones((), dtype=do.dtype).expand_as(do)
    want = run((q, k, v, ones.clone()), shape)
    for got, expected in zip(run((q, k, v, ones), shape), want, strict=True):
        assert torch.equal(got, expected)


def test_a_shape_keeps_its_backend_between_forward_and_backward():
    shape = make(2, 37)
    q, k, v, do = draw(shape, torch.float32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert choose_attention(q, shape).name == "math"
        o, lse = attention_forward(q, k, v, shape)
    assert choose_attention(q, shape).name == "cpu_flash"
    got = attention_backward(do, q, k, v, o, lse, shape)
    want = attention_backward(do, q, k, v, o, lse, shape, backend="math")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(9, 4, 24)}, r"q does not fit.*\(9, 4, 24\).*\(10, 4, 24\)"),
        ({"k": torch.zeros(10, 4, 24)}, r"k does not fit.*\(10, 2, 24\)"),
        ({"v": torch.zeros(10, 2, 24).half()}, "v is not of the dtype.*float16.*float32"),
        ({"v": torch.zeros(10, 2, 48)[..., ::2]}, "the last stride of v is not 1"),
        ({"out": torch.zeros(10, 4, 24).double()}, "out is not of the dtype"),
        ({"backend": "fast"}, "backend is not known: got 'fast'; allowed: cudnn"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    shape = make(2, 5)
    q, k, v, _ = draw(shape, torch.float32)
    given = {"q": q, "k": k, "v": v, "shape": shape, **wrong}
    with pytest.raises(UserError, match=message):
        attention_forward(**given)


@pytest.mark.parametrize("backend", sorted(FEATURES))
def test_no_backend_runs_what_it_cannot_compute(backend):
    for case in ("left padding", "window", "packed"):
        shape = CASES[case]
        if shape.features - FEATURES[backend]:
            with pytest.raises(UserError, match="cannot compute this attention exactly"):
                attention_forward(*draw(shape, torch.float32)[:3], shape, backend=backend)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": (5, 2, 8)}, "q_heads is not a multiple of kv_heads: got q_heads=5, kv_heads=2"),
        ({"window": 0}, "window is not understood"),
        ({"window": 3, "causal": False}, "window is not understood.*causal=True"),
        ({"mask": torch.ones(2, 5, 5).bool()}, r"mask has the wrong shape.*\(2, 1, 5, 5\)"),
        ({"mask": torch.ones(2, 1, 5, 5).int()}, "mask has an unknown dtype.*int32"),
        (
            {"mask": torch.ones(2, 1, 5, 5).bool(), "lengths": (10,)},
            "mask cannot be combined with packed documents",
        ),
        ({"lengths": (4, 5)}, "documents do not follow each other"),
        ({"lengths": (4, 0, 6)}, "documents do not follow each other"),
        ({"documents": ((1, 10),)}, "documents do not follow each other"),
        ({"documents": ((0, 4), (5, 10))}, "documents do not follow each other"),
        ({"lengths": (4, 6), "max_seqlen": 5}, "max_seqlen is shorter than a document.*6 or more"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "cu_seqlens has the wrong dtype"),
        (
            {"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32), "lengths": (4, 6)},
            "cu_seqlens and documents differ",
        ),
    ],
)
def test_contradictions_in_a_shape_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        make(2, 5, **fields)


PAIRS = [
    (backend, case)
    for backend in ("cudnn", "flash", "flash_varlen", "efficient", "efficient_varlen")
    for case, shape in CASES.items()
    if shape.features <= FEATURES[backend] and (shape.packed or "varlen" not in backend)
]


@pytest.fixture
def stand_ins(monkeypatch):
    """torch's CUDA operators imitated on the CPU, in float64."""
    found = StandIns()
    monkeypatch.setattr(attention_backends, "_aten", found)
    return found


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_around_the_cuda_kernels(stand_ins, backend, case):
    shape = CASES[case]
    tensors = draw(shape, torch.float64)
    for name, got, want in zip(
        NAMES, run(tensors, shape, backend), truth(tensors, shape), strict=True
    ):
        assert relative_error(got, want) < 1e-12, name
    calls = len(shape.runs()) if backend == "efficient" and shape.packed else 1
    assert set(stand_ins.calls.values()) == {calls} and len(stand_ins.calls) == 2


@pytest.mark.parametrize(("backend", "case"), [x for x in PAIRS if x[1] in ("dense", "packed")])
def test_around_the_cuda_kernels_in_columns(stand_ins, backend, case):
    check_columns(CASES[case], backend, torch.float64, "cpu")


def test_tensors_that_the_cuda_kernels_cannot_read_are_copied():
    buffer = torch.zeros(6, 4 * 24 + 4, dtype=torch.float16, device="meta")
    odd_rows = buffer[:, : 4 * 24].unflatten(1, (4, 24))
    copied = attention_backends.aligned(odd_rows)
    assert odd_rows.stride(0) % 8 and copied.stride() == (96, 24, 1)
    expanded = torch.zeros((), device="meta").expand(6, 4, 24)
    assert attention_backends.aligned(expanded).is_contiguous()
    even_rows = torch.zeros(6, 104, dtype=torch.float16, device="meta")[:, :96].unflatten(
        1, (4, 24)
    )
    assert attention_backends.aligned(even_rows) is even_rows


CUDA_CASES = {
    **CASES,
    "full": make(2, 256, (8, 2, 64)),
    "wide heads": make(1, 128, (4, 1, 128)),
    "long packed": make(1, 507, (8, 2, 64), lengths=(100, 1, 300, 106)),
    "long window": make(2, 333, (4, 2, 64), window=100),
    "long padding": make(2, 333, (4, 2, 64), mask=left_padding(2, 333, (0, 130))),
}


CUDA_PAIRS = [
    (backend, case)
    for backend in FEATURES
    for case, shape in CUDA_CASES.items()
    if backend in {x.name for x in rank_backends(shape, torch.float16, "cuda", (9, 0))}
]


def skip_where_refused(backend, shape, dtype):
    ranked = rank_backends(shape, dtype, "cuda", torch.cuda.get_device_capability())
    if backend not in {x.name for x in ranked}:
        pytest.skip(f"this GPU has no {backend} attention for {dtype}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("backend", "case"), CUDA_PAIRS)
def test_cuda_kernels(backend, case, dtype):
    shape = on(CUDA_CASES[case], "cuda")
    skip_where_refused(backend, shape, dtype)
    tensors = draw(shape, dtype, "cuda")
    want, theirs = truth(tensors, shape), stock(tensors, shape, "cuda")
    terms = cancelling(tensors, shape.scale)
    for name, got, other, exact in zip(
        NAMES, run(tensors, shape, backend), theirs, want, strict=True
    ):
        assert_as_exact_as_stock(got, other, exact, name, terms=terms.get(name))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "case"), [x for x in CUDA_PAIRS if x[1] in ("full", "long packed", "long window")]
)
def test_cuda_kernels_in_columns_of_wider_buffers(backend, case):
    shape = on(CUDA_CASES[case], "cuda")
    skip_where_refused(backend, shape, torch.float16)
    check_columns(shape, backend, torch.float16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["efficient", "efficient_varlen"])
def test_memory_between_forward_and_backward(backend):
    lengths = (1024, 1024) if backend == "efficient_varlen" else ()
    shape = make(1, 2048, (32, 4, 64), lengths=lengths)
    q, k, v, do = draw(shape, torch.float16, "cuda")
    q.requires_grad_()
    attention(q, k, v, shape, backend=backend)
    before = torch.cuda.memory_allocated()
    o = attention(q, k, v, shape, backend=backend)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= o.nbytes + 2048 * 32 * 4 + 4096
    o.backward(do)
