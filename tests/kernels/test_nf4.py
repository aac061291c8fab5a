"""Decoding real 4-bit weights of bitsandbytes: every bit as bitsandbytes decodes it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from kernel_helpers import BACKENDS, DEVICE, HALF_DTYPES, ON_GPU

from colab_qlora.errors import UserError
from colab_qlora.kernels import nf4
from colab_qlora.kernels.backend import HAS_TRITON, use_backend
from colab_qlora.kernels.nf4 import nf4_dequantize, nf4_reference, nf4_state
from colab_qlora.models.quiet_import import import_bitsandbytes

bitsandbytes = import_bitsandbytes()

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# whole blocks in a row, several programs; rows that share blocks; odd rows; one row; a byte or less
SHAPES = [(37, 576), (5, 200), (63, 65), (1, 64), (1, 63), (3, 1), (1, 1)]
SPARE = 8


@pytest.fixture(autouse=True)
def _eager_bitsandbytes():
    """For odd rows bitsandbytes compiles its own torch code on a CPU, once a shape, for seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def quantise(shape, blocksize=64, nested=True, dtype=torch.float32, storage=torch.uint8, **options):
    torch.manual_seed(sum(shape) + blocksize)
    weight = torch.randn(shape) * torch.rand(shape[0], 1)  # absmax values that differ
    options = {"quant_type": "nf4"} | options
    return bitsandbytes.nn.Params4bit(
        weight.to(dtype),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_storage=storage,
        **options,
    ).to(DEVICE)


def stock(weight, dtype=None):
    """What bitsandbytes decodes, in the weight's shape.

    Its CPU kernel for AVX-512 starts a block with every row (0.50), so that a weight whose rows do
    not hold whole blocks is decoded as one row.
    """
    state = copy.copy(weight.quant_state)
    state.dtype = dtype or state.dtype
    shape = state.shape
    if not ON_GPU and shape[1] % state.blocksize:
        state.shape = torch.Size([1, shape.numel()])
    decoded = bitsandbytes.functional.dequantize_4bit(weight.data, state)
    # of one or two weights bitsandbytes returns the transpose
    return decoded.reshape(shape)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_is_that_of_bitsandbytes(shape, nested, dtype, backend):
    weight = quantise(shape, nested=nested, dtype=dtype)
    got = nf4_dequantize(weight)
    assert got.shape == shape and got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, stock(weight))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
def test_every_block_size(blocksize, nested, backend):
    # from 128 up blocks run over the ends of rows, and from 512 up the last one is short
    weight = quantise((36, 576), blocksize, nested)
    assert torch.equal(nf4_dequantize(weight), stock(weight))


def test_a_tall_weight_with_many_nested_blocks(backend):
    # 507 * 576 / 64 absmax values fill 17 nested blocks and start an 18th; the reference: 2 chunks
    weight = quantise((507, 576), dtype=torch.float16)
    assert weight.quant_state.state2.absmax.numel() == 18
    assert torch.equal(nf4_dequantize(weight), stock(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 576), (9, 200), (63, 65)])
def test_the_reference_in_chunks_of_rows(shape, dtype, monkeypatch):
    monkeypatch.setattr(nf4, "CHUNK_CODES", 7 * shape[1])
    weight = quantise(shape)
    out = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    nf4_reference(nf4_state(weight), out)
    assert torch.equal(out, stock(weight, dtype))


@pytest.mark.parametrize("columns", [576, 65])
@pytest.mark.parametrize("spare", [SPARE, 3])
def test_columns_of_a_wider_buffer(columns, spare, backend):
    weight = quantise((20, columns), dtype=torch.float16)
    wide = torch.full((20, columns + spare), float("nan"), dtype=torch.float16, device=DEVICE)
    for first in (0, spare):
        wide.fill_(float("nan"))
        out = wide[:, first : first + columns]
        assert nf4_dequantize(weight, out=out) is out
        assert torch.equal(out, stock(weight))
        assert wide[:, :first].isnan().all() and wide[:, first + columns :].isnan().all()
        assert wide.isnan().sum() == 20 * spare


def test_dtypes_that_are_asked_for(backend):
    weight = quantise((12, 64), dtype=torch.float16)
    exact = stock(weight, torch.float32)
    assert torch.equal(nf4_dequantize(weight, dtype=torch.float32), exact)
    assert torch.equal(nf4_dequantize(weight, dtype=torch.float64), exact.double())
    out = torch.empty(12, 64, dtype=torch.float16, device=DEVICE)
    assert torch.equal(nf4_dequantize(weight, out=out, dtype=torch.float16), exact.half())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_other_storage_dtypes_hold_the_same_bytes(storage, backend):
    weight = quantise((24, 64), storage=storage)
    assert weight.dtype == storage
    assert torch.equal(nf4_dequantize(weight), stock(quantise((24, 64))))


def test_packed_bytes_at_any_address(backend):
    weight = quantise((8, 64))
    shifted = torch.zeros(8 * 32 + 1, dtype=torch.uint8, device=DEVICE)[1:].view(-1, 1)
    expected = stock(weight)
    weight.data = shifted.copy_(weight.data)
    assert weight.data.data_ptr() % 4
    assert torch.equal(nf4_dequantize(weight), expected)


def test_the_high_half_of_a_byte_comes_first(backend):
    weight = quantise((1, 64), nested=False)
    weight.data[0] = 0xF0  # the largest level, then the smallest
    absmax = weight.quant_state.absmax[0]
    assert torch.equal(nf4_dequantize(weight)[0, :2], torch.stack((absmax, -absmax)))


def test_a_weight_loaded_from_a_checkpoint(backend):
    saved = quantise((16, 128), dtype=torch.float16)
    layer = bitsandbytes.nn.Linear4bit(128, 16, bias=False)
    layer.weight = saved
    tensors = layer.state_dict()
    stats = {key: value for key, value in tensors.items() if key != "weight"}
    weight = bitsandbytes.nn.Params4bit.from_prequantized(tensors["weight"], stats, device=DEVICE)
    assert torch.equal(nf4_dequantize(weight), stock(saved))


def test_no_rows(backend):
    weight = quantise((2, 64), nested=False)
    weight.data = weight.data[:0]
    state = weight.quant_state
    state.shape, state.absmax = torch.Size([0, 64]), state.absmax[:0]
    assert nf4_dequantize(weight).shape == (0, 64)


def test_the_state_holds_views_and_reads_no_number_from_the_device():
    weight = quantise((16, 64))
    state = nf4_state(weight)
    assert state.packed.data_ptr() == weight.data.data_ptr() and state.packed.dtype == torch.uint8
    assert state.absmax is weight.quant_state.absmax and state.offset is weight.quant_state.offset
    assert isinstance(state.offset, torch.Tensor) and state.offset.ndim == 0
    assert (state.shape, state.blocksize, state.nested_blocksize) == ((16, 64), 64, 256)
    plain = nf4_state(quantise((16, 64), nested=False))
    assert plain.offset is plain.nested_code is plain.nested_absmax is None
    assert plain.nested_blocksize == 0


def test_weights_that_cannot_be_decoded():
    with pytest.raises(UserError, match="not a 4-bit weight of bitsandbytes: got Parameter, torch"):
        nf4_state(torch.nn.Parameter(torch.zeros(2, 64)))
    with pytest.raises(UserError, match="not a 4-bit weight of bitsandbytes: got Linear4bit"):
        nf4_state(bitsandbytes.nn.Linear4bit(64, 2))
    fresh = bitsandbytes.nn.Params4bit(torch.zeros(2, 64, dtype=torch.float16), quant_type="nf4")
    with pytest.raises(UserError, match="not quantised yet: got Params4bit, torch.float16"):
        nf4_state(fresh)
    with pytest.raises(UserError, match="got quant_type 'fp4'; allowed: 'nf4'"):
        nf4_state(quantise((2, 64), quant_type="fp4"))
    part = quantise((4, 64))
    part.data = part.data[:64]
    with pytest.raises(UserError, match=r"does not fit its quant_state: got 64 bytes, 4 absmax"):
        nf4_state(part)


def test_a_weight_repacked_for_the_cpu_is_refused():
    weight = quantise((32, 64)).cpu()
    functional = bitsandbytes.functional
    if not hasattr(functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this bitsandbytes does not repack")
    repacked = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    weight.data, weight.quant_state = repacked
    with pytest.raises(UserError, match="repacked the weight for inference on this CPU"):
        nf4_state(weight)


def test_buffers_that_do_not_fit():
    weight = quantise((4, 64))
    wide = torch.empty(4, 128, device=DEVICE)
    with pytest.raises(UserError, match=r"out does not fit the weight: got \(4, 128\) on"):
        nf4_dequantize(weight, out=wide)
    with pytest.raises(UserError, match=r"out has gaps inside its rows: got strides \(128, 2\)"):
        nf4_dequantize(weight, out=wide[:, ::2])
    with pytest.raises(UserError, match="another dtype: got torch.int64"):
        nf4_dequantize(weight, out=torch.empty(4, 64, dtype=torch.int64, device=DEVICE))
    with pytest.raises(UserError, match="got torch.float32; allowed: torch.float16"):
        nf4_dequantize(weight, out=wide[:, :64], dtype=torch.float16)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_launch_forbids_fused_multiply_adds(monkeypatch):
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((grid, options))

    monkeypatch.setattr(nf4, "_dequantize_kernel", Recorder())
    with use_backend("triton"):
        nf4_dequantize(quantise((8, 1025)))
    ((grid, options),) = launches
    assert grid == (3,) and options["enable_fp_fusion"] is False


COUNT_FUSED = """
import json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from colab_qlora.kernels.nf4 import compile_cases

case = compile_cases()[0]
names = case.kernel.arg_names
kinds = {name: case.signature.get(name, "constexpr") for name in names}
values = {(names.index(name),): value for name, value in case.constexprs.items()}
aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16}
counts = {}
for capability, fuses in ((75, False), (80, False), (90, False), (90, True)):
    source = ASTSource(case.kernel, kinds, constexprs=values, attrs=aligned)
    options = {"enable_fp_fusion": fuses, "num_warps": case.num_warps}
    target = GPUTarget("cuda", capability, 32)
    counts[f"{capability} {fuses}"] = compile(source, target, options).asm["sass"].count("FFMA")
print(json.dumps(counts))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_machine_code_has_no_fused_multiply_add(tmp_path):
    # a kernel can be compiled only where Triton was imported without its interpreter
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", COUNT_FUSED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    # the same count sees them where they are allowed
    assert counts.pop("90 True") > 0
    assert counts == {"75 False": 0, "80 False": 0, "90 False": 0}
