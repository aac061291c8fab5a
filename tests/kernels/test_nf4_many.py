"""Decoding up to three 4-bit weights at once: every bit as one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from kernel_helpers import BACKENDS, DEVICE, HALF_DTYPES

from colab_qlora.errors import UserError
from colab_qlora.kernels import nf4, nf4_many
from colab_qlora.kernels.backend import HAS_TRITON, use_backend
from colab_qlora.kernels.nf4 import nf4_dequantize
from colab_qlora.kernels.nf4_many import nf4_dequantize_many
from colab_qlora.models.quiet_import import import_bitsandbytes

bitsandbytes = import_bitsandbytes()

NAN = float("nan")
SPARE = 8
# rows of q, k and v with 32, 8 and 8 heads, of gate and up, and odd ones
ROWS = [(128, 32, 32), (37, 37), (5, 1, 21)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


class Recorder:
    """Stands before a kernel and counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]


@pytest.fixture
def single(monkeypatch):
    recorder = Recorder(nf4._dequantize_kernel)
    monkeypatch.setattr(nf4, "_dequantize_kernel", recorder)
    return recorder


@pytest.fixture
def many(monkeypatch):
    recorder = Recorder(nf4_many._dequantize_many_kernel)
    monkeypatch.setattr(nf4_many, "_dequantize_many_kernel", recorder)
    return recorder


def quantise(rows, columns, blocksize=64, nested=True, seed=0):
    torch.manual_seed(1000 * seed + rows)
    return bitsandbytes.nn.Params4bit(
        torch.randn(rows, columns) * torch.rand(rows, 1),  # absmax values that differ
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type="nf4",
    ).to(DEVICE)


def group(rows, columns, **options):
    return [quantise(r, columns, seed=seed, **options) for seed, r in enumerate(rows)]


def no_rows(columns, nested):
    weight = quantise(2, columns, nested=nested)
    weight.data = weight.data[:0]
    state = weight.quant_state
    state.shape, state.absmax = torch.Size([0, columns]), state.absmax[:0]
    return weight


def check(weights, dtype=torch.float16, spare=SPARE):
    """Decode into rows of one buffer, and compare with a call each."""
    expected = [nf4_dequantize(weight, dtype=dtype) for weight in weights]
    rows = [len(e) for e in expected]
    columns = expected[0].shape[1]
    buffer = torch.full((sum(rows) + 1, columns + spare), NAN, dtype=dtype, device=DEVICE)
    outs = buffer[: sum(rows), :columns].split(rows)
    nf4_dequantize_many(weights, outs)
    for out, one in zip(outs, expected, strict=True):
        assert torch.equal(out, one)
    assert buffer[:, columns:].isnan().all() and buffer[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("columns", [320, 200, 65])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_one_buffer(rows, columns, nested, dtype, backend, many):
    check(group(rows, columns, nested=nested), dtype)
    assert many.count == (backend == "triton")


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("spare", [0, 3])
def test_other_block_sizes_and_strides(blocksize, spare, backend, many):
    check(group((40, 9, 8), 192, blocksize=blocksize), spare=spare)
    assert many.count == (backend == "triton")


def test_float64_and_bfloat16_in_torch():
    with use_backend("torch"):
        check(group((20, 4), 64), torch.float64)
        check(group((20, 4), 64), torch.bfloat16)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_one_without_rows(empty, backend, many):
    weights = group((40, 9, 8), 64, nested=False)
    weights[empty] = no_rows(64, nested=False)
    check(weights)
    assert many.count == (backend == "triton")


def test_none_with_rows(backend, many, single):
    check([no_rows(64, True), no_rows(64, True)])
    nf4_dequantize_many([], [])
    assert many.count == single.count == 0


def test_packed_bytes_at_any_address(backend, many):
    def shifted(weight):
        place = torch.zeros(weight.data.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:]
        weight.data = place.view(-1, 1).copy_(weight.data)
        return weight

    weights = group((40, 9, 8), 64)
    check([shifted(weight) for weight in weights])
    assert many.count == (backend == "triton")
    check([*group((40, 9), 64), shifted(quantise(8, 64))])
    assert many.count == (backend == "triton")


def odd_groups(which):
    """Weights and buffers that differ in what one launch cannot have twice."""
    weights = group((20, 9), 64)
    outs = [torch.full((rows, 64), NAN, dtype=torch.float16, device=DEVICE) for rows in (20, 9)]
    if which == "columns":
        return [weights[0], quantise(9, 128)], [outs[0], torch.cat([outs[1]] * 2, 1)]
    if which == "blocksize":
        return [weights[0], quantise(9, 64, 128)], outs
    if which == "nested":
        return [weights[0], quantise(9, 64, nested=False)], outs
    if which == "dtype":
        return weights, [outs[0], outs[1].float()]
    if which == "row stride":
        return weights, [outs[0], outs[1].repeat(1, 2)[:, :64]]
    if which == "one":
        return weights[:1], outs[:1]
    assert which == "four"
    return weights * 2, outs + [out.clone() for out in outs]


@pytest.mark.parametrize(
    "which", ["columns", "blocksize", "nested", "dtype", "row stride", "one", "four"]
)
def test_others_take_a_launch_each(which, backend, many, single):
    weights, outs = odd_groups(which)
    nf4_dequantize_many(weights, outs)
    assert (many.count, single.count) == (0, len(weights) * (backend == "triton"))
    for weight, out in zip(weights, outs, strict=True):
        assert torch.equal(out, nf4_dequantize(weight, dtype=out.dtype))


def test_nothing_is_written_if_one_does_not_fit(backend):
    weights = group((20, 9), 64)
    outs = [torch.full((rows, 64), NAN, device=DEVICE) for rows in (20, 9)]
    with pytest.raises(UserError, match="outs do not fit the weights: got 1; allowed: 2"):
        nf4_dequantize_many(weights, outs[:1])
    with pytest.raises(UserError, match=r"out does not fit the weight: got \(8, 64\) on"):
        nf4_dequantize_many(weights, [outs[0], outs[1][1:]])
    with pytest.raises(UserError, match="not a 4-bit weight of bitsandbytes"):
        nf4_dequantize_many([weights[0], torch.zeros(9, 64)], outs)
    assert all(out.isnan().all() for out in outs)


COUNT_FUSED = """
import json
from colab_qlora.kernels.compile_check import compile_kernel
from colab_qlora.kernels.nf4_many import compile_cases

case = compile_cases()[0]
own = {c: compile_kernel(case, c)[0].asm["sass"].count("FFMA") for c in (75, 90)}
fused = compile_kernel(case, 90, enable_fp_fusion=True)[0].asm["sass"].count("FFMA")
print(json.dumps([own, fused]))
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
    own, fused = json.loads(result.stdout.splitlines()[-1])
    # the same count sees them where they are allowed
    assert fused > 0
    assert own == {"75": 0, "90": 0}
