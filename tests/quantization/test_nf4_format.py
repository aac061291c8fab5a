"""The layout of a 4-bit weight: every byte and every number as bitsandbytes lays it out."""

from __future__ import annotations

import copy

import pytest
import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.nf4 import nf4_dequantize
from colab_qlora.models.quiet_import import import_bitsandbytes
from colab_qlora.quantization.nf4_format import nest_absmax, nf4_weight, pack_codes
from colab_qlora.quantization.scale_search import quantize_nf4

bitsandbytes = import_bitsandbytes()
functional = bitsandbytes.functional

# whole blocks; blocks over the ends of rows; a short last block; an odd number of weights
SHAPES = [(37, 576), (5, 200), (7, 64), (63, 65), (1, 1)]


@pytest.fixture(autouse=True)
def _eager_bitsandbytes():
    """For odd rows bitsandbytes compiles its own torch code on a CPU, once a shape, for seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def draw(shape, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    return (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)


def stock_weight(weight, blocksize=64, nested=True):
    options = {"blocksize": blocksize, "compress_statistics": nested, "quant_type": "nf4"}
    return bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options).to("cpu")


def unpacked(weight):
    packed = weight.data.view(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)
    return codes[: weight.quant_state.shape.numel()]


def assert_the_same_weight(got, stock):
    assert type(got) is type(stock) and got.shape == stock.shape
    assert torch.equal(got.data, stock.data)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
        assert getattr(got, name) == getattr(stock, name), name
    assert got.bnb_quantized is stock.bnb_quantized is True
    assert got.requires_grad is stock.requires_grad is False
    ours, theirs = (weight.quant_state.as_dict(packed=True) for weight in (got, stock))
    assert list(ours) == list(theirs)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key
    if stock.quant_state.nested:
        assert got.quant_state.offset.shape == stock.quant_state.offset.shape
        assert got.quant_state.state2.dtype == stock.quant_state.state2.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocksize", [64, 32])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_stock_codes_and_absmax_become_the_stock_weight(shape, nested, blocksize, dtype):
    weight = draw(shape, dtype)
    stock = stock_weight(weight, blocksize, nested)
    absmax = stock_weight(weight, blocksize, nested=False).quant_state.absmax
    got = nf4_weight(
        unpacked(stock),
        nest_absmax(absmax) if nested else absmax,
        shape=shape,
        dtype=dtype,
        blocksize=blocksize,
    )
    assert_the_same_weight(got, stock)


@pytest.mark.parametrize("blocksize", [64, 32])
@pytest.mark.parametrize("nested", [True, False])
def test_without_a_search_the_weight_is_the_stock_one(nested, blocksize):
    weight = draw((37, 200), torch.bfloat16)
    got = quantize_nf4(weight, blocksize=blocksize, nested=nested, search=False)
    assert_the_same_weight(got, stock_weight(weight, blocksize, nested))


@pytest.mark.parametrize("codes", [1, 2, 5, 8, 1001])
def test_two_codes_a_byte_the_first_in_the_high_half(codes, monkeypatch):
    monkeypatch.setattr("colab_qlora.quantization.nf4_format._CHUNK_CODES", 4)
    torch.manual_seed(codes)
    given = torch.randint(0, 16, (codes,), dtype=torch.uint8)
    digits = "".join(f"{code:x}" for code in given.tolist()) + "7" * (codes % 2)
    packed = pack_codes(given)
    assert packed.shape == (len(digits) // 2, 1)
    assert bytes(packed.view(-1).tolist()).hex() == digits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
def test_any_levels_decode_alike_here_and_in_bitsandbytes(nested, dtype):
    shape = (50, 640)  # 500 blocks: one nested block is short
    codes = torch.randint(0, 16, (shape[0] * shape[1],), dtype=torch.uint8)
    absmax = torch.rand(codes.numel() // 64) + 0.5
    if nested:
        stock = nest_absmax(absmax)
        levels = torch.randint(0, 256, absmax.shape, dtype=torch.uint8)
        weight = nf4_weight(codes, stock.with_levels(levels), shape=shape, dtype=dtype)
        absmax = stock.decode(levels[:, None]).squeeze(1)
    else:
        weight = nf4_weight(codes, absmax, shape=shape, dtype=dtype)
    code = functional.get_4bit_type("nf4", device="cpu")
    expected = (code[codes.int()].view(-1, 64) * absmax[:, None]).view(shape).to(dtype)
    theirs = functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(theirs, expected)
    assert torch.equal(nf4_dequantize(weight), expected)


def test_levels_around_are_the_own_the_nearest_and_its_neighbours():
    absmax = torch.rand(300) + 0.5
    nested = nest_absmax(absmax)
    wanted = torch.rand(300) * 1.5 + 0.2
    levels = nested.levels_around(wanted)
    assert torch.equal(levels[:, 0], nested.levels)
    every = nested.decode(torch.arange(256).expand(300, 256))
    # float64 on both sides, so that ties do not matter
    nearest = (every.double() - wanted.double()[:, None]).abs().amin(1)
    ours = (nested.decode(levels)[:, 1].double() - wanted.double()).abs()
    assert (ours <= nearest + 1e-6).all()
    assert torch.equal(levels[:, 2].int(), (levels[:, 1].int() - 1).clamp(min=0))
    assert torch.equal(levels[:, 3].int(), (levels[:, 1].int() + 1).clamp(max=255))
    assert torch.equal(nested.largest(), every[:, 255])
    assert torch.allclose(every.amax(1), every[:, 255])


def test_a_linear_layer_takes_it_saves_it_and_loads_it(tmp_path):
    from safetensors.torch import load_file, save_file

    weight = draw((96, 128), torch.float16)
    layer = bitsandbytes.nn.Linear4bit(128, 96, bias=False, quant_type="nf4")
    layer.weight = quantize_nf4(weight)
    layer = layer.to("cpu")
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded = load_file(tmp_path / "layer.safetensors")
    assert set(loaded) == set(layer_of_stock(weight).state_dict())
    stats = {key: value for key, value in loaded.items() if key != "weight"}
    back = bitsandbytes.nn.Params4bit.from_prequantized(loaded["weight"], stats, device="cpu")
    assert_the_same_weight(back, quantize_nf4(weight))
    x = torch.randn(3, 128)
    expected = x @ nf4_dequantize(back, dtype=torch.float32).T
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert_the_same_weight(copy.deepcopy(back), back)


def layer_of_stock(weight):
    layer = bitsandbytes.nn.Linear4bit(128, 96, bias=False, quant_type="nf4")
    layer.weight = stock_weight(weight)
    return layer


@pytest.mark.model
def test_transformers_saves_and_loads_a_model_with_it(tiny_model_folder, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    changed = 0
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            before = nf4_dequantize(layer.weight)
            layer.weight = quantize_nf4(plain.get_submodule(name).weight.detach(), name=name)
            changed += not torch.equal(nf4_dequantize(layer.weight), before)
    assert changed == 14
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    compared = 0
    for name, layer in again.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            assert_the_same_weight(layer.weight, model.get_submodule(name).weight)
            compared += 1
    assert compared == 14
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_does_not_fit_is_refused():
    codes = torch.zeros(128, dtype=torch.uint8)
    fits = {"shape": (2, 64), "dtype": torch.float16}
    with pytest.raises(UserError, match="blocksize is not understood: got 48; allowed: 32 or 64"):
        nf4_weight(codes, torch.ones(2), blocksize=48, **fits)
    with pytest.raises(UserError, match=r"codes do not fit a weight \(2, 64\): got torch.int32"):
        nf4_weight(codes.int(), torch.ones(2), **fits)
    with pytest.raises(UserError, match=r"blocks of 32: got torch.float32, shape \(2,\)"):
        nf4_weight(codes, torch.ones(2), blocksize=32, **fits)
    with pytest.raises(UserError, match="absmax does not fit blocks of 64: got torch.float16"):
        nf4_weight(codes, torch.ones(2).half(), **fits)
    with pytest.raises(UserError, match="decodes to no such dtype: got torch.float64"):
        nf4_weight(codes, torch.ones(2), shape=(2, 64), dtype=torch.float64)
