"""Decoding int8 weights, whole and a tile at a time: every bit of `decode_int8`, and products."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import BACKENDS, CAN_RUN_TRITON, DEVICE, DTYPES, assert_as_exact_as_stock

from colab_qlora.errors import UserError
from colab_qlora.kernels import int8_decode
from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.int8_decode import Int8Weight, int8_decode_
from colab_qlora.kernels.weight_products import DenseProducts, Int8Products, tile_rows
from colab_qlora.quantization.int8_weight import decode_int8, encode_int8

# whole words and not; one row; one column; several programs; rows that end inside a program
SHAPES = [(37, 64), (507, 123), (1, 63), (63, 1), (1, 8), (100, 200), (700, 16)]


def encoded(rows: int, columns: int, seed: int = 0) -> Int8Weight:
    """Rows of very different sizes, one of them all zeros."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * torch.logspace(-4, 2, rows)[:, None]
    weight[rows // 2] = 0 if rows > 1 else weight[rows // 2]
    return Int8Weight(*(tensor.to(DEVICE) for tensor in encode_int8(weight)))


def columns_of_nan(rows: int, columns: int, dtype: torch.dtype, beside: int) -> torch.Tensor:
    return torch.full((rows, columns + beside), torch.nan, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("beside", [0, 8, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bit_is_that_of_the_formula(backend, shape, dtype, beside):
    weight = encoded(*shape)
    wide = columns_of_nan(*shape, dtype, beside)
    with use_backend(backend):
        int8_decode_(weight, wide[:, : shape[1]])
    assert torch.equal(wide[:, : shape[1]], decode_int8(weight.codes, weight.absmax, dtype))
    assert wide[:, shape[1] :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_the_reference_alone(dtype):
    weight = encoded(507, 123)
    wide = columns_of_nan(507, 123, dtype, 5)
    with use_backend("torch"):
        int8_decode_(weight, wide[:, :123])
    assert torch.equal(wide[:, :123], decode_int8(weight.codes, weight.absmax, dtype))


def test_float64_goes_round_the_kernel():
    weight = encoded(20, 64)
    out = columns_of_nan(20, 64, torch.float64, 0)
    int8_decode_(weight, out)
    assert torch.equal(out, decode_int8(weight.codes, weight.absmax, torch.float64))


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_some_of_the_rows_that_begin_at_any_byte(backend, first):
    whole = encoded(40, 20)  # 20 bytes a row: words begin at every second one
    part = whole.rows(slice(first, 33))
    out = columns_of_nan(33 - first, 20, torch.float32, 4)
    with use_backend(backend):
        int8_decode_(part, out[:, :20])
    assert torch.equal(out[:, :20], decode_int8(whole.codes, whole.absmax)[first:33])


def test_chunks_of_the_reference(monkeypatch):
    monkeypatch.setattr(int8_decode, "CHUNK_CODES", 700)
    weight = encoded(37, 64)
    out = columns_of_nan(37, 64, torch.float16, 2)
    with use_backend("torch"):
        int8_decode_(weight, out[:, :64])
    assert torch.equal(out[:, :64], decode_int8(weight.codes, weight.absmax, torch.float16))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_decoded_to_nothing(backend, shape):
    weight = Int8Weight(
        torch.zeros(shape, dtype=torch.int8, device=DEVICE), torch.zeros(shape[0], device=DEVICE)
    )
    with use_backend(backend):
        assert int8_decode_(weight, torch.empty(shape, device=DEVICE)) is None


@pytest.mark.skipif(not CAN_RUN_TRITON, reason="needs Triton with a GPU or interpreter")
def test_the_largest_codes_and_the_smallest_scales():
    codes = torch.tensor([[-127, 127, 0, 1, -1, -128, 64, -64]] * 3, dtype=torch.int8)
    weight = Int8Weight(codes.to(DEVICE), torch.tensor([1e-38, 3e38, 0.1]).to(DEVICE))
    outs = []
    for backend in ("triton", "torch"):
        outs.append(torch.empty(3, 8, device=DEVICE))
        with use_backend(backend):
            int8_decode_(weight, outs[-1])
    assert torch.equal(outs[0], outs[1]) and outs[0].isfinite().all()


def test_what_does_not_fit_is_named_before_anything_is_written():
    weight = encoded(4, 8)
    for out, words in (
        (torch.zeros(4, 9, device=DEVICE), "out does not fit the weight"),
        (torch.zeros(4, 8, dtype=torch.int8, device=DEVICE), "out has another dtype"),
        (torch.zeros(4, 16, device=DEVICE)[:, ::2], "out has gaps inside its rows"),
    ):
        with pytest.raises(UserError, match=words):
            int8_decode_(weight, out)
        assert not out.any()


@pytest.mark.parametrize(
    "codes, absmax",
    [
        (torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4)),
        (torch.zeros(4, 8, dtype=torch.int8), torch.zeros(8)),
        (torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4).half()),
        (torch.zeros(8, 4, dtype=torch.int8).T, torch.zeros(4)),
        (torch.zeros(8, dtype=torch.int8), torch.zeros(8)),
    ],
    ids=["uint8", "other rows", "half scales", "transposed", "a vector"],
)
def test_tensors_of_another_kind_are_no_weight(codes, absmax):
    with pytest.raises(UserError, match="codes and absmax are no int8 weight"):
        Int8Weight(codes, absmax)


@pytest.mark.gpu
def test_what_it_returns_does_it_again():
    weight = encoded(100, 200)
    out = columns_of_nan(100, 200, torch.bfloat16, 8)
    launch = int8_decode_(weight, out[:, :200])
    expected = out.clone()
    out.fill_(torch.nan)
    launch()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_every_case_is_of_this_kernel():
    assert {case.kernel for case in int8_decode.compile_cases()} == {int8_decode._decode_kernel}


@pytest.mark.parametrize(
    "rows, row_bytes, most_bytes, expected",
    [
        (128_256, 8192, 64 * 2**20, 8064),  # 16 tiles, the last one 7,296 rows
        (49_152, 1152, 64 * 2**20, 49_152),  # fits as a whole
        (507, 126, 1, 64),
        (65, 126, 1, 64),
        (64, 126, 1, 64),
        (5, 126, 1, 5),
        (0, 126, 1, 1),
    ],
)
def test_rows_of_a_tile(rows, row_bytes, most_bytes, expected):
    step = tile_rows(rows, row_bytes, most_bytes)
    assert step == expected
    assert step in (max(rows, 1), 64) or (step % 64 == 0 and step * row_bytes <= most_bytes)


@pytest.mark.parametrize("tokens", [1, 21, 0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_of_tiles_are_as_exact_as_one_gemm(backend, dtype, tokens):
    weight = encoded(507, 63)
    torch.manual_seed(1)
    x, dy = (torch.randn(tokens, size).to(DEVICE, dtype) for size in (63, 507))
    bias = torch.randn(507).to(DEVICE, dtype)
    exact = decode_int8(weight.codes, weight.absmax, torch.float64)
    stock = DenseProducts(decode_int8(weight.codes, weight.absmax, dtype))
    wide = torch.full((tokens, 520), torch.nan, dtype=dtype, device=DEVICE)
    ours, dx = wide[:, :507], torch.full_like(x, torch.nan)
    theirs, stock_dx = torch.empty_like(dy), torch.empty_like(x)
    products = Int8Products(weight, dtype, 1)
    assert len(products.tiles) == 8
    with use_backend(backend):
        for given in (None, bias):
            products.products_(x, given, ours)
            stock.products_(x, given, theirs)
            truth = x.double() @ exact.T + (0 if given is None else given.double())
            # each element is a sum of 63 products, which may be added in another order
            assert_as_exact_as_stock(ours, theirs, truth, "products", roundings=63**0.5)
        products.input_gradient_(dy, dx)
        stock.input_gradient_(dy, stock_dx)
    roundings = 507**0.5 if dtype != torch.float16 else None
    assert_as_exact_as_stock(dx, stock_dx, dy.double() @ exact, "gradient", roundings=roundings)
    assert wide[:, 507:].isnan().all()


def test_a_tile_in_the_buffer_serves_twice(monkeypatch):
    from colab_qlora.kernels import weight_products

    decoded = []

    def counted(weight, out):
        decoded.append(weight.shape[0])
        launch = int8_decode_(weight, out)
        # Triton's launch, which stands for the call from then on
        return launch and (lambda: (decoded.append(weight.shape[0]), launch()))

    monkeypatch.setattr(weight_products, "int8_decode_", counted)
    products = Int8Products(encoded(150, 16), torch.float32, 1)
    x, y = torch.randn(3, 16, device=DEVICE), torch.empty(3, 150, device=DEVICE)
    for _ in range(2):
        products.products_(x, None, y)
        products.input_gradient_(y, x)
    # 64, 64, 22 ahead; back without the last; ahead again without the first; back
    assert decoded == [64, 64, 22, 64, 64, 64, 22, 64, 64]
    decoded.clear()
    small = Int8Products(encoded(50, 16), torch.float32, 1)
    for _ in range(2):
        small.products_(x, None, y[:, :50])
        small.input_gradient_(y[:, :50], x)
    assert decoded == [50]
