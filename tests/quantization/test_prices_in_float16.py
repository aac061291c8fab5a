"""Prices of a model in float16: the loss scale, products in float16, and which GPU takes what."""

from __future__ import annotations

import pytest
import torch
from dynamic_llama import BATCHES, dynamic_llama
from tiny_llama import LINEARS, batch_of, frozen, tiny_llama

from colab_qlora.quantization import dynamic, live_prices, prices
from colab_qlora.quantization.budget import INT8, NF4_64, RUNGS
from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.quantization.first_order import (
    product_dtype,
    shifted_outputs,
    weight_errors,
)
from colab_qlora.quantization.live_prices import measure_live
from colab_qlora.quantization.plain_rungs import plain_quantize
from colab_qlora.quantization.prices import BrokenNumbers, PriceMeter, measure_prices

# a token's gradient is a two-thousandth of what it is alone
MANY = [batch_of((64,) * 32)]


def half_llama():
    """With a head so small that gradients of a mean loss come near the least of float16."""
    model = frozen(tiny_llama(dtype=torch.float16))
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0**-7)
    return model


def float32_prices():
    """Of the same numbers, errors made by the same rounding."""

    def quantize(weight, rung, columns):
        return plain_quantize(weight.half(), rung).float()

    return measure_prices(half_llama().float(), MANY, quantize=quantize)


def worst_error(found, expected):
    return max(
        abs(found[name][rung].price / expected[name][rung].price - 1)
        for name in LINEARS
        for rung in (NF4_64, INT8)
    )


def test_gradients_in_float16_do_not_underflow(monkeypatch):
    expected = float32_prices()
    assert worst_error(measure_prices(half_llama(), MANY), expected) < 5e-3
    # 0.10 without a scale, so that the test could tell
    monkeypatch.setattr(prices, "_FLOAT16_LOSS_SCALES", (1.0,))
    assert worst_error(measure_prices(half_llama(), MANY), expected) > 0.05


def test_a_meter_takes_the_scale_out_of_sums_and_not_of_gradients():
    model = half_llama()
    with PriceMeter(model, loss_scale=2.0**20) as meter:
        loss = model(**MANY[0]).loss.float()
        torch.autograd.grad(loss * 2.0**20, meter.anchors)
    assert worst_error(meter.prices(), float32_prices()) < 5e-3


def test_a_scale_that_overflows_is_followed_by_a_smaller_one(monkeypatch):
    expected, passes = measure_prices(half_llama(), MANY), []
    monkeypatch.setattr(prices, "_FLOAT16_LOSS_SCALES", (2.0**60, 2.0**13))
    model = half_llama()
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    # an iterator can be gone through once only
    assert measure_prices(model, iter(MANY)) == expected
    assert len(passes) == 2

    def broken(weight, rung, columns):
        return weight * float("nan")

    with pytest.raises(BrokenNumbers, match="is infinite or NaN"):
        measure_prices(half_llama(), MANY, quantize=broken)


def test_other_dtypes_have_no_scale(monkeypatch):
    monkeypatch.setattr(prices, "_FLOAT16_LOSS_SCALES", (float("nan"),))
    model = half_llama().float()
    measure_prices(model, MANY)
    # packed weights do not say it, but their modules do
    model.lm_head.compute_dtype = torch.float16
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    measure_prices(model, MANY)
    assert len(passes) == 2


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((7, 0), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_products_are_in_what_the_gpu_has(capability, dtype, monkeypatch):
    # it says True on a T4
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert product_dtype(torch.device("cuda")) == dtype
    assert product_dtype(torch.device("cpu")) is None


@pytest.mark.parametrize("module", [dynamic, live_prices])
def test_calibration_and_training_ask_for_it(module, monkeypatch):
    model = dynamic_llama()
    seen, begin = [], PriceMeter.__init__

    def watched(self, *args, gemm_dtype=None, **options):
        seen.append(gemm_dtype)
        begin(self, *args, gemm_dtype=gemm_dtype, **options)

    monkeypatch.setattr(PriceMeter, "__init__", watched)
    monkeypatch.setattr(module, "product_dtype", lambda device: torch.float16)
    if module is dynamic:
        dynamic_llama()
    else:
        measure_live(model, dynamic_state(model).source, BATCHES)
    assert seen == [torch.float16]


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_products_in_float16_that_overflow_are_made_in_float32(size):
    """x, or E x, beyond 65504."""
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), size * torch.randn(2, 5, 64)
    weight[3] *= 1e5
    small, gradient = torch.randn(2, 3, 64), torch.randn(2, 5, 24)
    errors = dict(weight_errors(weight, RUNGS[:3], plain_quantize, None, gradient))
    assert errors.keys() == set(RUNGS[:3])
    for error in errors.values():
        part = error(slice(0, 24))
        # another use of the weight at the same time does not change it
        found = {low: list(shifted_outputs([small, x], part, low)) for low in (torch.float16, None)}
        for ours, expected, scale in zip(found[torch.float16], found[None], (1, size), strict=True):
            assert torch.isfinite(ours).all() and ours.dtype == torch.float32
            torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2 * scale)
        assert torch.equal(found[None][1], x @ part.T)
