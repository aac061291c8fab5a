"""int8 weights against bitsandbytes', against NF4's error, and at the edges."""

from __future__ import annotations

import pytest
import torch

from colab_qlora.errors import UserError
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.quantization.int8_weight import decode_int8, encode_int8


def mean_square(error):
    return error.double().square().mean()


@pytest.mark.parametrize("shape", [(128, 320), (507, 123), (1, 64), (63, 1), (0, 8), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_weight_is_off_by_more_than_half_a_step(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    codes, absmax = encode_int8(weight)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert absmax.dtype == torch.float32 and absmax.shape == weight.shape[:1]
    error = (decode_int8(codes, absmax, torch.float64) - weight.double()).abs()
    # a part in a million for float32's rounding
    assert (error <= (absmax.double() / 254 * (1 + 1e-6) + absmax * 2**-23)[:, None]).all()


def test_codes_and_scales_are_those_of_bitsandbytes():
    torch.manual_seed(0)
    weight = torch.randn(64, 96, dtype=torch.float16)
    codes, absmax = encode_int8(weight)
    functional = import_bitsandbytes().functional
    theirs, stats, _ = functional.int8_vectorwise_quant(weight)
    assert torch.equal(absmax, stats)
    # theirs divides in float16, so a weight near the middle of two codes may go to the other one
    assert (codes.int() - theirs.int()).abs().max() <= 1
    ours = decode_int8(codes, absmax)
    truth = weight.float()
    plain = mean_square(functional.int8_vectorwise_dequant(theirs, stats) - truth)
    assert mean_square(ours - truth) <= plain * (1 + 1e-5)
    torch.testing.assert_close(ours, functional.int8_vectorwise_dequant(codes, absmax))


def test_the_error_is_a_hundredth_of_nf4s():
    torch.manual_seed(0)
    weight = torch.randn(576, 1536)
    functional = import_bitsandbytes().functional
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    nf4 = mean_square(functional.dequantize_4bit(packed, state) - weight)
    int8 = mean_square(decode_int8(*encode_int8(weight)) - weight)
    # theory: (absmax / 127)^2 / 12 with absmax about 3.3 to 3.5 sigma, against 0.0083 sigma^2
    assert 0.005 < int8 / nf4 < 0.012


def test_rows_do_not_touch_each_other():
    weight = torch.tensor([[1e-30, -5e-31], [0.0, 0.0], [3e4, 1.0]])
    codes, absmax = encode_int8(weight)
    assert codes.tolist() == [[127, -64], [0, 0], [127, 0]]
    decoded = decode_int8(codes, absmax)
    torch.testing.assert_close(decoded[0, 0], weight[0, 0], atol=0, rtol=1e-6)
    assert torch.equal(decoded[1], torch.zeros(2))


def test_encoding_twice_changes_nothing():
    torch.manual_seed(0)
    codes, absmax = encode_int8(torch.randn(63, 123))
    again, _ = encode_int8(decode_int8(codes, absmax, torch.float64))
    assert torch.equal(again, codes)


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)])
def test_what_is_no_matrix_of_numbers_is_refused(weight):
    with pytest.raises(UserError, match="int8 weights are made from a matrix of floating-point"):
        encode_int8(weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_broken_numbers_are_refused(bad):
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    with pytest.raises(UserError, match="infinite or NaN: got 1 such rows"):
        encode_int8(weight)
