"""Rounding and pricing by a few rows: the same bits as of the whole, and no large temporary."""

from __future__ import annotations

import pytest
import torch
from dynamic_llama import BATCHES, nf4_llama
from largest_tensor import LargestTensor

from colab_qlora.errors import UserError
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.quantization import row_chunks
from colab_qlora.quantization.activation_statistics import weight_items
from colab_qlora.quantization.budget import (
    BLOCK_SIZES,
    INT8,
    NF4_32,
    NF4_64,
    RUNGS,
    SIXTEEN_BIT,
    Budget,
)
from colab_qlora.quantization.dynamic import prices_without_data, quantize_dynamically
from colab_qlora.quantization.int8_weight import decode_int8, encode_int8
from colab_qlora.quantization.plain_rungs import plain_quantize, rounded_rows
from colab_qlora.quantization.prices import PriceMeter
from colab_qlora.quantization.row_chunks import row_slices

SHAPES = [(507, 128), (61, 32), (122, 63), (64, 48), (1, 64), (3, 1)]


def stock_nf4(weight, blocksize):
    """bitsandbytes' of the whole weight, decoded as one row (see `kernels.nf4`)."""
    functional = import_bitsandbytes().functional
    options = {"blocksize": blocksize, "compress_statistics": True, "quant_type": "nf4"}
    codes, state = functional.quantize_4bit(weight, **options)
    if weight.shape[1] % blocksize:
        state.shape = torch.Size([1, weight.numel()])
    return functional.dequantize_4bit(codes, state).reshape(weight.shape)


def whole_int8(weight):
    wide = weight.float()
    absmax = wide.abs().amax(1)
    codes = torch.round(wide / absmax.masked_fill(absmax == 0, 1.0)[:, None] * 127)
    return codes.to(torch.int8), absmax


@pytest.mark.parametrize("chunk", [1, 1000, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_is_that_of_the_whole_weight(shape, dtype, chunk, monkeypatch):
    monkeypatch.setattr(row_chunks, "CHUNK", chunk)
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    for rung, blocksize in BLOCK_SIZES.items():
        assert torch.equal(plain_quantize(weight, rung), stock_nf4(weight, blocksize))
        # a matrix that is not contiguous, and one in float64
        transposed = weight.T.contiguous().T
        assert torch.equal(plain_quantize(transposed, rung), plain_quantize(weight, rung))
        double = plain_quantize(weight.double(), rung)
        assert torch.equal(double, stock_nf4(weight.float(), blocksize).double())
    (codes, absmax), (theirs, scales) = encode_int8(weight), whole_int8(weight)
    assert torch.equal(codes, theirs) and torch.equal(absmax, scales)
    decoded = (theirs.float() * (scales / 127)[:, None]).to(dtype)
    assert torch.equal(decode_int8(codes, absmax, dtype), decoded)
    assert torch.equal(plain_quantize(weight, INT8), decoded)
    assert plain_quantize(weight, SIXTEEN_BIT) is weight


def test_slices_cover_the_rows(monkeypatch):
    monkeypatch.setattr(row_chunks, "CHUNK", 100)
    assert [(p.start, p.stop) for p in row_slices(7, 30)] == [(0, 3), (3, 6), (6, 7)]
    assert [(p.start, p.stop) for p in row_slices(7, 30, 2)] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert [(p.start, p.stop) for p in row_slices(5, 1000, 4)] == [(0, 4), (4, 5)]
    assert [(p.start, p.stop) for p in row_slices(2, 0)] == [(0, 2)]
    assert not list(row_slices(0, 8))


# memory -----------------------------------------------------------------------------------------

ROWS, COLUMNS, CHUNK = 4096, 64, 2**11
WEIGHTS = ROWS * COLUMNS


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(row_chunks, "CHUNK", CHUNK)


def test_int8_makes_nothing_large_but_its_result(small_chunks):
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    with LargestTensor(WEIGHTS) as largest:
        codes, absmax = encode_int8(weight)
    # absmax and divisors are float32 numbers of all rows
    assert largest.nbytes <= max(4 * CHUNK, 4 * ROWS)
    with LargestTensor(2 * WEIGHTS) as largest:
        decode_int8(codes, absmax, torch.bfloat16)
    assert largest.nbytes <= max(4 * CHUNK, 4 * ROWS)


@pytest.mark.parametrize("rung", [NF4_64, NF4_32, INT8])
def test_rounded_rows_hold_no_more_than_scales_beside_a_chunk(rung, small_chunks):
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    with LargestTensor() as largest:
        for _ in rounded_rows(weight, rung, torch.float32):
            pass
    # codes, or absmax, of all blocks
    assert largest.nbytes <= max(4 * CHUNK, _held(rung))
    with LargestTensor(2 * WEIGHTS) as largest:
        plain_quantize(weight, rung)
    assert largest.nbytes <= max(4 * CHUNK, _held(rung))


def _held(rung):
    return 0 if rung == INT8 else WEIGHTS // 2


class OneLayer(torch.nn.Module):
    """A head (or a table) alone, whose input may be anything."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.to(torch.bfloat16).requires_grad_(False)

    def get_output_embeddings(self):
        return self.layer

    def forward(self, x):
        return self.layer(x)


def test_pricing_a_head_copies_neither_it_nor_its_gradient(small_chunks):
    torch.manual_seed(0)
    model = OneLayer(torch.nn.Linear(COLUMNS, ROWS, bias=False))
    x = torch.randn(1, 4, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(1, 4, ROWS).bfloat16()
    with PriceMeter(model) as meter:
        output = model(x)
        with LargestTensor() as largest:
            torch.autograd.grad(output, x, gradient)
    # float64 sums of a chunk are the largest
    assert largest.nbytes <= 8 * CHUNK < gradient.nbytes
    price = meter.prices()["layer"][INT8]
    weight = model.layer.weight
    error = plain_quantize(weight, INT8).double() - weight.double()
    moved, steep = x.detach().double() @ error.T, gradient.double().square().mean(-1)
    assert price.loss_changes[0] == pytest.approx(float((moved * gradient).sum()), rel=1e-4)
    assert price.output_error == pytest.approx(float(moved.square().sum() / 4), rel=1e-5)
    expected = float((steep * moved.square().sum(-1)).sum())
    assert price.guard == pytest.approx(expected, rel=1e-5)


def test_pricing_a_table_rounds_only_rows_that_are_looked_up(small_chunks):
    torch.manual_seed(0)
    model, rounded = OneLayer(torch.nn.Embedding(ROWS, COLUMNS)), []

    def quantize(weight, rung, columns):
        rounded.append(weight)
        return plain_quantize(weight, rung)

    with PriceMeter(model, quantize=quantize) as meter:
        output = model(torch.tensor([[7, 4000, 7, 12]]))
        gradient = torch.randn(output.shape).bfloat16()
        with LargestTensor() as largest:
            torch.autograd.grad(output, meter.anchors, gradient)
    assert largest.nbytes <= 8 * CHUNK
    (rows,) = rounded
    assert torch.equal(rows, model.layer.weight[[7, 12, 4000]])
    error = plain_quantize(model.layer.weight, INT8).double() - model.layer.weight.double()
    change = float((error[[7, 4000, 7, 12]] * gradient[0]).sum())
    assert meter.prices()["layer"][INT8].loss_changes[0] == pytest.approx(change, rel=1e-5)


# without data, and with too small a budget ------------------------------------------------------


def test_without_data_a_price_is_the_error_of_the_numbers(small_chunks):
    model, source = nf4_llama()
    items = weight_items(model)
    found = prices_without_data(model, items, source)
    for item in items:
        weight = source(item.name)
        for rung in found[item.name]:
            error = (plain_quantize(weight, rung) - weight).double().square()
            price = found[item.name][rung]
            assert price.price == pytest.approx(float(error.mean()), rel=1e-6)
            assert price.output_error == pytest.approx(float(error.sum(1).mean()), rel=1e-6)
    assert set(found["model.layers.0.mlp.up_proj"]) == set(RUNGS)


class _Elsewhere:
    """A matrix of the source that says where it is asked to go."""

    def __init__(self, weight, asked):
        self.weight, self.asked = weight, asked

    def detach(self):
        return self

    def to(self, device):
        self.asked.append(device)
        return self.weight


def test_without_data_the_work_is_done_where_the_weight_is(monkeypatch):
    monkeypatch.setattr(row_chunks, "CHUNK", 2**9)
    model, source = nf4_llama()
    items, asked = weight_items(model), []
    # the largest have 8192 numbers, 4096 bytes of codes
    half = {name: weight.bfloat16() for name, weight in source.items()}
    with LargestTensor() as largest:
        prices_without_data(model, items, lambda name: _Elsewhere(half[name], asked))
    assert asked == [item.weight.device for item in items]
    assert largest.nbytes <= 8192 // 2


def test_too_small_a_budget_is_refused_before_anything_is_read():
    model, source = nf4_llama()
    source.gone.update(source)
    said = []
    for batches in (BATCHES[:1], []):
        with pytest.raises(UserError, match="quantization_budget is below what plain NF4 needs"):
            quantize_dynamically(
                model, source, batches, Budget(gib=1e-6), torch.float32, say=said.append
            )
    assert not said
