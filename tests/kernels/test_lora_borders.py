"""LoRA matrices and zeros beside and under a weight: every value, and nothing else."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import BACKENDS, DEVICE, DTYPES, HALF_DTYPES

from colab_qlora.errors import UserError
from colab_qlora.kernels import lora_borders
from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.lora_borders import Border, lora_borders_

NAN = float("nan")
# more than one tile of 32 x 64 each way; one row; one column; no rows; no columns; nothing at all
SIZES = [(45, 70, 9), (1, 130, 67), (66, 1, 1), (3, 5, 16), (0, 65, 4), (33, 0, 4), (0, 0, 3)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def launches(monkeypatch):
    """The grid of every launch."""
    kernel, grids = lora_borders._borders_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(lora_borders, "_borders_kernel", Recorder())
    return grids


def border(first, column, rows, rank, width, scale=1.7, has_a=True, dtype=torch.float32):
    a = torch.randn(rank, width, device=DEVICE).to(dtype)
    b = torch.randn(rows, rank, device=DEVICE).to(dtype)
    a, b = torch.nn.Parameter(a), torch.nn.Parameter(b)
    return Border(first, column, a, b, scale, has_a, a_scale=0.9 * scale)


def buffer_of(height, width, spare, dtype):
    """Columns of a wider tensor, and that tensor, with NaN in every place."""
    wide = torch.full((height + spare, width + spare + 5), NAN, dtype=dtype, device=DEVICE)
    return wide[:, 2 : 2 + width + spare], wide


def expected_of(wide, height, width, spare, blocks):
    """`wide` after the call: what does not belong to a border is still NaN."""
    exact = torch.float64 if wide.dtype == torch.float64 else torch.float32
    wide = wide.clone()
    wide[:height, 2 + width : 2 + width + spare] = 0
    wide[height:, 2 : 2 + width] = 0
    for first, column, a, b, scale, has_a, a_scale in blocks:
        for i in range(b.shape[1]):
            product = b.detach()[:, i].to(exact) * scale
            wide[first : first + len(b), 2 + width + column + i] = product.to(wide.dtype)
            if has_a:
                product = a.detach()[i].to(exact) * a_scale
                wide[height + column + i, 2 : 2 + width] = product.to(wide.dtype)
    return wide


def check(height, width, spare, blocks, dtype):
    buffer, wide = buffer_of(height, width, spare, dtype)
    expected = expected_of(wide, height, width, spare, blocks)
    lora_borders_(buffer, height, width, blocks)
    torch.testing.assert_close(wide, expected, rtol=0, atol=0, equal_nan=True)
    assert not wide.requires_grad


def three_linears(dtype=torch.float32, width=70):
    """q, k and v of 32, 8 and 5 rows; v's adapter has no A, as with dropout."""
    return [
        border(0, 0, 32, 4, width, 2.0, dtype=dtype),
        border(32, 4, 8, 2, width, 0.3, dtype=dtype),
        border(40, 6, 5, 1, width, has_a=False, dtype=dtype),
    ]


@pytest.mark.parametrize("adapter", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_three_linears_in_one_launch(dtype, adapter, backend, launches):
    torch.manual_seed(0)
    check(45, 70, 9, three_linears(adapter), dtype)
    assert len(launches) == (backend == "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, dtype, backend, launches):
    torch.manual_seed(1)
    height, width, spare = size
    rank = max(1, spare // 3)
    # the last columns and rows of the borders, and the first ones
    blocks = [border(0, spare - rank, height, rank, width), border(height, 0, 0, rank, width)]
    check(height, width, spare, blocks, dtype)
    assert len(launches) == (backend == "triton" and height + width > 0)


@pytest.mark.parametrize("blocks", [0, 1, 4])
def test_up_to_four_blocks_in_one_launch(blocks, backend, launches):
    torch.manual_seed(2)
    check(40, 70, 16, [border(10 * i, 3 * i, 10, 2, 70) for i in range(blocks)], torch.float16)
    assert len(launches) == (backend == "triton")


def test_two_adapters_of_one_linear(backend):
    torch.manual_seed(3)
    check(20, 70, 8, [border(4, 0, 16, 3, 70), border(4, 3, 16, 5, 70)], torch.float16)


def test_of_blocks_that_overlap_the_last_one_counts(backend):
    torch.manual_seed(4)
    blocks = [
        border(0, 0, 20, 4, 70),
        border(10, 2, 9, 4, 70),
        border(0, 3, 20, 1, 70, has_a=False),
    ]
    check(20, 70, 8, blocks, torch.float32)


def test_a_linear_that_is_not_in_the_buffer_has_its_a_only(backend, launches):
    torch.manual_seed(5)
    inside, outside = border(0, 0, 12, 3, 70), border(0, 3, 12, 2, 70)
    outside = outside._replace(b=outside.b[:0])
    check(12, 70, 5, [inside, outside, border(0, 5, 12, 0, 70)], torch.float16)
    assert len(launches) == (backend == "triton")


def odd_blocks(which):
    """Blocks that the kernel does not take."""
    blocks = three_linears()
    if which == "five":
        return blocks + [border(0, 7, 45, 1, 70), border(0, 8, 3, 1, 70)]
    if which == "two dtypes":
        return [*blocks[:2], border(40, 6, 5, 1, 70, dtype=torch.float16)]
    if which == "two dtypes of one adapter":
        return [blocks[0]._replace(a=blocks[0].a.half())]
    if which == "float64":
        return three_linears(torch.float64)
    if which == "transposed a":
        return [blocks[0]._replace(a=torch.randn(70, 4, device=DEVICE).t())]
    assert which == "columns of b"
    return [blocks[0]._replace(b=torch.randn(32, 6, device=DEVICE)[:, 1:5])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "which",
    [
        "five",
        "two dtypes",
        "two dtypes of one adapter",
        "float64",
        "transposed a",
        "columns of b",
    ],
)
def test_what_the_kernel_does_not_take_is_left_to_torch(which, dtype, backend, launches):
    torch.manual_seed(6)
    check(45, 70, 9, odd_blocks(which), dtype)
    assert not launches


@pytest.mark.parametrize("adapter", [torch.float32, torch.float64])
def test_float64_keeps_all_digits(adapter, backend, launches):
    torch.manual_seed(7)
    check(45, 70, 9, three_linears(adapter), torch.float64)
    assert not launches


def test_bfloat16_in_torch():
    torch.manual_seed(8)
    with use_backend("torch"):
        check(45, 70, 9, three_linears(torch.bfloat16), torch.bfloat16)
        check(45, 70, 9, three_linears(torch.float16), torch.bfloat16)


def test_no_spare_columns(backend, launches):
    wide = torch.full((4, 6), NAN, device=DEVICE)
    lora_borders_(wide, 4, 6, [])
    assert wide.isnan().all() and not launches


def test_twice_the_same_bits(backend):
    torch.manual_seed(9)
    blocks = three_linears()
    first, second = (buffer_of(45, 70, 9, torch.float16) for _ in range(2))
    for buffer, _ in (first, second):
        lora_borders_(buffer, 45, 70, blocks)
    assert torch.equal(first[1].view(torch.int16), second[1].view(torch.int16))


def test_buffers_that_do_not_fit():
    with pytest.raises(UserError, match=r"buffer does not fit the weight: got \(9, 10\); allowed"):
        lora_borders_(torch.empty(9, 10), 4, 6, [])
    with pytest.raises(UserError, match="buffer does not fit the weight"):
        lora_borders_(torch.empty(3, 5), 4, 6, [])
    with pytest.raises(UserError, match="buffer does not fit the weight"):
        lora_borders_(torch.empty(3, 5), -1, 1, [])
    with pytest.raises(UserError, match="buffer has another dtype: got torch.int32"):
        lora_borders_(torch.empty(6, 8, dtype=torch.int32), 4, 6, [])
    with pytest.raises(UserError, match=r"gaps inside its rows: got strides \(1, 6\)"):
        lora_borders_(torch.empty(8, 6).t(), 4, 6, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_row": 3}, r"blocks\[1\] leaves the borders: got b 2 x 2 at row 3, column 0"),
        ({"first_row": -1}, r"at row -1, column 0; allowed: 4 rows, 3 columns"),
        ({"column": 2}, "at row 0, column 2"),
        ({"column": -1}, "at row 0, column -1"),
        ({"a": torch.ones(2, 5)}, r"no adapter of this width: got a \(2, 5\), b \(2, 2\)"),
        ({"a": torch.ones(3, 6)}, r"allowed: a \(rank, 6\), b \(rows, rank\)"),
        ({"b": torch.ones(2)}, r"got a \(2, 6\), b \(2,\)"),
        ({"a": torch.ones(2, 6).int()}, "does not fit buffer: got torch.int32 on cpu"),
        ({"b": torch.ones(2, 2, device="meta")}, "got torch.float32 on meta"),
    ],
)
def test_blocks_that_do_not_fit(change, message):
    block = Border(0, 0, torch.ones(2, 6), torch.ones(2, 2), 1.0, True)
    buffer = torch.full((7, 9), NAN)
    with pytest.raises(UserError, match=message):
        lora_borders_(buffer, 4, 6, [block, block._replace(**change)])
    assert buffer.isnan().all()
