"""The loss of an int8 head: as exact as stock with the decoded weight, which never stands whole."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import BACKENDS, DEVICE, DTYPES, assert_as_exact_as_stock, relative_error
from test_linear_cross_entropy import CASES, TINY_BUDGET, Calls, make, stock_loss

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.int8_decode import Int8Weight
from colab_qlora.kernels.linear_cross_entropy import linear_cross_entropy
from colab_qlora.kernels.logits_chunk import head_chunk_rows, logits_chunk_rows
from colab_qlora.quantization.int8_weight import decode_int8, encode_int8


def with_gradients(loss_of, hidden, weight, bias, labels, options):
    """The loss, and its gradients for hidden and bias."""
    leaves = {"hidden": hidden, "bias": bias}
    leaves = {k: v.detach().requires_grad_() for k, v in leaves.items() if v is not None}
    loss = loss_of(leaves["hidden"], weight, labels, bias=leaves.get("bias"), **options)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(backend: str, dtype: torch.dtype, name: str, budget: int | None) -> None:
    (hidden, weight, bias, labels), options = make(name, dtype)
    int8 = Int8Weight(*encode_int8(weight))
    if budget is not None:
        options["memory_budget_bytes"] = budget
    exact, rounded = (decode_int8(int8.codes, int8.absmax, d) for d in (torch.float64, dtype))
    wide = None if bias is None else bias.double()
    truth = with_gradients(stock_loss, hidden.double(), exact, wide, labels, options)
    stock = with_gradients(stock_loss, hidden, rounded, bias, labels, options)
    with use_backend(backend):
        ours = with_gradients(linear_cross_entropy, hidden, int8, bias, labels, options)
    # as in check_gradients of the dense head: sums of `width` products in another order
    roundings = hidden.shape[-1] ** 0.5 if dtype == torch.float32 else None
    assert ours.keys() == truth.keys()
    for key in truth.keys() - {"loss"}:
        assert ours[key].dtype == dtype
        assert_as_exact_as_stock(ours[key], stock[key], truth[key], key, roundings=roundings)


@pytest.mark.parametrize("budget", [None, TINY_BUDGET, 300_000])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_as_exact_as_stock(backend, dtype, name, budget):
    check(backend, dtype, name, budget)


@pytest.mark.parametrize("budget", [None, TINY_BUDGET])
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_gradients_of_the_reference(name, budget):
    check("torch", torch.bfloat16, name, budget)


@pytest.mark.parametrize("budget", [None, TINY_BUDGET])
@pytest.mark.parametrize("name", CASES)
def test_float64_equals_autograd(name, budget):
    (hidden, weight, bias, labels), options = make(name, torch.float64)
    options["memory_budget_bytes"] = budget
    int8 = Int8Weight(*encode_int8(weight))
    exact = decode_int8(int8.codes, int8.absmax, torch.float64)
    truth = with_gradients(stock_loss, hidden, exact, bias, labels, options)
    ours = with_gradients(linear_cross_entropy, hidden, int8, bias, labels, options)
    for key in truth:
        assert ours[key].dtype == torch.float64
        assert relative_error(ours[key], truth[key]) < 1e-12, key


@pytest.mark.parametrize("budget", [None, TINY_BUDGET])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_is_as_exact_as_stock(backend, dtype, budget):
    # eight losses, since the error of a single number is luck
    truth, stock, ours = [], [], []
    for seed in range(8):
        (hidden, weight, _, labels), _ = make("plain", dtype, seed)
        int8 = Int8Weight(*encode_int8(weight))
        exact, rounded = (decode_int8(int8.codes, int8.absmax, d) for d in (torch.float64, dtype))
        truth.append(stock_loss(hidden.double(), exact, labels))
        stock.append(stock_loss(hidden, rounded, labels))
        with use_backend(backend):
            ours.append(linear_cross_entropy(hidden, int8, labels, memory_budget_bytes=budget))
    assert_as_exact_as_stock(torch.stack(ours), torch.stack(stock), torch.stack(truth), "losses")


@pytest.mark.parametrize("name", ["plain", "all"])
def test_many_tiles_give_what_one_gives(name):
    (hidden, weight, bias, labels), options = make(name, torch.float64)
    int8 = Int8Weight(*encode_int8(weight))
    results = []
    for options["memory_budget_bytes"] in (None, TINY_BUDGET):
        given = (hidden, int8, bias, labels, options)
        results.append(with_gradients(linear_cross_entropy, *given))
    for key in results[0]:
        assert relative_error(results[1][key], results[0][key]) < 1e-14, key


@pytest.mark.parametrize("shape", [(2, 9), (0, 9), (2, 0), (0,), (1,)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_label_gives_zero_and_no_nan(backend, shape):
    labels = torch.full(shape, -100, device=DEVICE)
    hidden = torch.randn(*shape, 8, device=DEVICE, requires_grad=True)
    int8 = Int8Weight(*encode_int8(torch.randn(150, 8, device=DEVICE)))
    with use_backend(backend):
        loss = linear_cross_entropy(hidden, int8, labels, memory_budget_bytes=TINY_BUDGET)
    loss.backward()
    assert float(loss.detach()) == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_the_head_never_stands_whole():
    torch.manual_seed(0)
    hidden = torch.randn(24, 96, device=DEVICE, requires_grad=True)
    int8 = Int8Weight(*encode_int8(torch.randn(2001, 96, device=DEVICE)))
    labels = torch.randint(2001, (24,), device=DEVICE)
    with Calls() as calls:
        loss = linear_cross_entropy(hidden, int8, labels, memory_budget_bytes=TINY_BUDGET)
        loss.backward()
    # 16 rows of logits, 2,048 apart, are the most; the decoded head would be 192,096 numbers
    assert calls.largest <= 16 * 2048
    # 32 tiles of 64 rows for each of two chunks; the way back adds in place, which is not counted
    assert calls.products == 2 * 32


def test_nothing_but_the_loss_is_computed_in_evaluation():
    (hidden, weight, _, labels), options = make("chunks", torch.float32)
    int8 = Int8Weight(*encode_int8(weight))
    with Calls() as calls, torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), int8, labels, **options)
    rows = int((labels[:, 1:] != -100).sum())
    assert loss.grad_fn is None and calls.products == -(-rows // 16) * 8


def test_tile_and_sums_are_paid_from_the_budget():
    vocab, width, budget = 128_256, 4096, 256 * 2**20
    int8 = Int8Weight(
        torch.empty(vocab, width, dtype=torch.int8, device="meta"),
        torch.empty(vocab, device="meta"),
    )
    dense = torch.empty(vocab, width, device="meta")
    assert head_chunk_rows(dense, 2) == logits_chunk_rows(vocab, 2) == 1024
    rows = head_chunk_rows(int8, 2)
    assert rows == 640
    assert rows * (vocab * 2 + 8 * width) + budget // 4 <= budget
    for weight in (dense, int8):
        with pytest.raises(ValueError, match="memory_budget_bytes is not positive: got -1"):
            head_chunk_rows(weight, 2, -1)


def test_a_head_of_another_width_or_device_is_named():
    int8 = Int8Weight(*encode_int8(torch.randn(50, 8)))
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(UserError, match="weight does not fit hidden"):
        linear_cross_entropy(torch.zeros(3, 9), int8, labels)
    with pytest.raises(UserError, match="weight and hidden differ in device"):
        linear_cross_entropy(torch.zeros(3, 8, device="meta"), int8, labels)
