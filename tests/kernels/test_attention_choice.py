"""The rules of the choice: what a T4, an L4, an A100, an H100 and a CPU would take, and why."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import left_padding, make

from colab_qlora.kernels.attention import choose_attention, explain_attention, rank_backends
from colab_qlora.kernels.attention_backends import BACKENDS
from colab_qlora.kernels.attention_choice import ALL_ENABLED, FEATURES, enabled_backends

LLAMA = (32, 8, 128)
DENSE = make(2, 2048, LLAMA)
PACKED = make(1, 4096, LLAMA, lengths=(1000, 3096))
PADDED = make(2, 64, LLAMA, mask=left_padding(2, 64, (0, 9)))
WINDOW = make(2, 2048, LLAMA, window=1024)
HALF, WIDE = torch.float16, torch.bfloat16
T4, A100, L4, H100, B200 = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0)


def names(shape, dtype, capability, **enabled):
    device_type = "cpu" if capability is None else "cuda"
    return [x.name for x in rank_backends(shape, dtype, device_type, capability, enabled)]


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "ranked"),
    [
        (DENSE, HALF, T4, ["efficient", "math"]),
        (DENSE, WIDE, T4, ["math"]),
        (DENSE, torch.float32, T4, ["efficient", "math"]),
        (DENSE, WIDE, A100, ["flash", "cudnn", "efficient", "triton", "math"]),
        (DENSE, WIDE, L4, ["flash", "cudnn", "efficient", "triton", "math"]),
        (DENSE, WIDE, H100, ["cudnn", "triton", "flash", "efficient", "math"]),
        (DENSE, WIDE, B200, ["cudnn", "flash", "efficient", "triton", "math"]),
        (DENSE, torch.float32, H100, ["efficient", "math"]),
        (DENSE, torch.float64, H100, ["math"]),
        (DENSE, torch.float32, None, ["cpu_flash", "math"]),
        (DENSE, torch.float64, None, ["cpu_flash", "math"]),
        (PACKED, HALF, T4, ["efficient_varlen", "efficient", "math"]),
        (PACKED, WIDE, A100, ["triton", "flash_varlen", "efficient_varlen", "efficient", "math"]),
        (PACKED, WIDE, None, ["cpu_flash", "math"]),
        (PADDED, HALF, T4, ["efficient", "math"]),
        (PADDED, WIDE, H100, ["efficient", "math"]),
        (PADDED, WIDE, None, ["cpu_flash", "math"]),
        (WINDOW, HALF, T4, ["efficient", "math"]),
        (WINDOW, WIDE, H100, ["flash", "efficient", "math"]),
        (make(2, 2048, LLAMA, window=2048), WIDE, H100, names(DENSE, WIDE, H100)),
        (make(2, 2000, LLAMA), WIDE, H100, ["triton", "flash", "efficient", "math"]),
        (make(2, 2048, (8, 8, 256)), WIDE, H100, ["flash", "efficient", "triton", "math"]),
        (make(2, 2048, (8, 8, 224)), WIDE, L4, ["efficient", "triton", "math"]),
        (make(2, 2048, (8, 8, 224)), WIDE, A100, ["flash", "efficient", "triton", "math"]),
        (make(2, 2048, (8, 8, 100)), WIDE, H100, ["triton", "math"]),
        (make(2, 2048, (8, 8, 100)), torch.float32, H100, ["efficient", "math"]),
    ],
)
def test_the_order(shape, dtype, capability, ranked):
    assert names(shape, dtype, capability) == ranked


@pytest.mark.parametrize(
    ("shape", "switches", "ranked"),
    [
        (DENSE, {"cudnn": False}, ["triton", "flash", "efficient", "math"]),
        (DENSE, {"deterministic": True}, ["triton", "flash", "efficient", "math"]),
        (DENSE, {"cudnn": False, "triton": False}, ["flash", "efficient", "math"]),
        (DENSE, {"cudnn": False, "flash": False}, ["efficient", "math"]),
        (DENSE, {"cudnn": False, "flash": False, "efficient": False}, ["math"]),
        (PACKED, {"triton": False}, ["flash_varlen", "efficient_varlen", "efficient", "math"]),
        (PACKED, {"flash": False}, ["efficient_varlen", "efficient", "math"]),
    ],
)
def test_switches(shape, switches, ranked):
    assert names(shape, WIDE, H100, **switches) == ranked


def test_the_reason_names_what_was_refused_and_why():
    assert explain_attention(DENSE, HALF, T4) == (
        "efficient: the fastest exact kernel for dense float16 attention on compute capability "
        "7.5, since flash needs compute capability 8.0, this is 7.5; cudnn needs compute "
        "capability 8.0, this is 7.5."
    )
    assert explain_attention(PADDED, WIDE, H100) == (
        "efficient: the fastest exact kernel for masked bfloat16 attention on compute capability "
        "9.0, since cudnn takes no mask; triton takes no mask; flash takes no mask."
    )
    reason = explain_attention(make(2, 2000, LLAMA), WIDE, H100)
    assert "cudnn takes no 2000 tokens (multiples of 128)" in reason
    assert explain_attention(DENSE, WIDE, None).startswith("cpu_flash: the fastest exact kernel")
    switched = explain_attention(DENSE, WIDE, H100, {"cudnn": False})
    assert "cudnn is switched off (torch.backends.cuda.enable_cudnn_sdp)" in switched
    slower = rank_backends(DENSE, WIDE, "cuda", A100)[1]
    assert slower.reason.startswith("slower than flash for dense bfloat16 attention")


def test_another_device_takes_plain_torch():
    assert [x.name for x in rank_backends(PACKED, WIDE, "mps")] == ["math"]


def test_choose_reads_the_device_and_the_switches():
    q = torch.zeros(4, 4, 24)
    shape = make(1, 4)
    assert choose_attention(q, shape).name == "cpu_flash"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        choice = choose_attention(q, shape)
        switches = enabled_backends()
    assert choice.name == "math" and "cpu_flash is switched off" in choice.reason
    assert not switches["flash"] and not switches["cudnn"] and not switches["efficient"]
    assert switches.keys() == ALL_ENABLED.keys()


def test_every_backend_has_its_features_and_every_name_a_backend():
    assert BACKENDS.keys() == FEATURES.keys()


@pytest.mark.gpu
def test_choose_on_this_gpu():
    q = torch.zeros(256, 8, 64, dtype=HALF, device="cuda")
    capability = torch.cuda.get_device_capability()
    shape = make(1, 256, (8, 2, 64))
    choice = choose_attention(q, shape)
    assert choice == rank_backends(shape, HALF, "cuda", capability, enabled_backends())[0]
