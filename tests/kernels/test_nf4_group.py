"""Weights and the LoRA around them in one launch: every bit as in two."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import CAN_RUN_TRITON, DEVICE, HALF_DTYPES

from colab_qlora.kernels import nf4_group
from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.lora_borders import Border, lora_borders_
from colab_qlora.kernels.nf4_group import nf4_group_
from colab_qlora.kernels.nf4_many import nf4_dequantize_many
from colab_qlora.models.quiet_import import import_bitsandbytes

bitsandbytes = import_bitsandbytes()

pytestmark = pytest.mark.skipif(
    not CAN_RUN_TRITON, reason="needs Triton with a GPU or the interpreter"
)
WIDTH = 128


def quantise(rows, nested, seed):
    torch.manual_seed(seed)
    weight = torch.randn(rows, WIDTH, dtype=torch.float16)
    parameter = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    return parameter.to(DEVICE)


def case(rows, nested=True, spare=16, dtype=torch.float16, adapters=torch.float32):
    """Weights, their places in a buffer of NaN, the buffer, and an adapter for each."""
    weights = [quantise(count, nested, seed) for seed, count in enumerate(rows)]
    height = sum(rows)
    buffer = torch.full((height + spare, WIDTH + spare), torch.nan, dtype=dtype, device=DEVICE)
    outs, blocks, first = [], [], 0
    for index, count in enumerate(rows):
        outs.append(buffer[first : first + count, :WIDTH])
        a = torch.randn(3, WIDTH, device=DEVICE).to(adapters)
        b = torch.randn(count, 3, device=DEVICE).to(adapters)
        blocks.append(Border(first, 3 * index, a, b, 1.7, index != 1, 0.6))
        first += count
    return weights, outs, buffer, height, blocks


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("rows", [(64,), (37, 37), (64, 16, 21)])
def test_as_in_two_launches(rows, nested, dtype):
    weights, outs, buffer, height, blocks = case(rows, nested, dtype=dtype)
    with use_backend("triton"):
        is_done, _ = nf4_group_(weights, outs, buffer, height, WIDTH, blocks)
        found = buffer.clone()
        buffer.fill_(torch.nan)
        nf4_dequantize_many(weights, outs)
        lora_borders_(buffer, height, WIDTH, blocks)
    assert is_done
    # the corner belongs to nobody
    torch.testing.assert_close(found, buffer, rtol=0, atol=0, equal_nan=True)
    assert found[height:, WIDTH:].isnan().all()
    assert not found[:height].isnan().any()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": (8, 8, 8, 8)},
        {"rows": (16, 8), "spare": 0},
        {"rows": (16, 8), "adapters": torch.float64},
        {"rows": (16, 8), "dtype": torch.float64},
    ],
    ids=["four weights", "no borders", "float64 adapters", "float64 buffer"],
)
def test_what_one_launch_cannot_do_is_left_alone(change):
    weights, outs, buffer, height, blocks = case(**change)
    blocks = blocks if buffer.shape[1] > WIDTH else []
    with use_backend("triton"):
        assert nf4_group_(weights, outs, buffer, height, WIDTH, blocks) == (False, None)
    assert buffer.isnan().all()


def test_torch_leaves_it_to_others():
    weights, outs, buffer, height, blocks = case((16, 8))
    with use_backend("torch"):
        assert nf4_group_(weights, outs, buffer, height, WIDTH, blocks) == (False, None)
    assert buffer.isnan().all()


@pytest.mark.gpu
def test_what_it_returns_does_it_again():
    weights, outs, buffer, height, blocks = case((64, 16, 21))
    _, launch = nf4_group_(weights, outs, buffer, height, WIDTH, blocks)
    expected = buffer.clone()
    buffer.fill_(torch.nan)
    launch()
    torch.testing.assert_close(buffer, expected, rtol=0, atol=0, equal_nan=True)


def test_a_block_that_does_not_fit_is_named_before_anything_is_written():
    weights, outs, buffer, height, blocks = case((16, 8))
    wrong = [blocks[0]._replace(first_row=20), blocks[1]]
    with use_backend("triton"), pytest.raises(ValueError, match=r"blocks\[0\] leaves the borders"):
        nf4_group_(weights, outs, buffer, height, WIDTH, wrong)
    assert buffer.isnan().all()


def test_every_case_is_of_this_kernel():
    assert {case.kernel for case in nf4_group.compile_cases()} == {nf4_group._group_kernel}
