"""Rates come out as those of a simulated device, whatever its host does; one test needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_gpu import FakeGpu
from machines import LLAMA_3_8B

from colab_qlora.activations import measure_profile
from colab_qlora.activations.copy_rates import COPY_BYTES
from colab_qlora.activations.costs import attention_flops
from colab_qlora.activations.gpu_profile import GpuProfile
from colab_qlora.activations.measure_profile import Measured, measure, measure_or_recorded
from colab_qlora.activations.model_shape import ModelShape

SHAPE = ModelShape(2, 64, 96, 4, 2, 16, 101)
HAS_GPU = torch.cuda.is_available()
T4: dict[str, Any] = {
    "name": "Tesla T4",
    "capability": (7, 5),
    "gemm": 30e12,
    "forward": 13e12,
    "backward": 9e12,
    "move": 0.26e12,
    "decode": 0.22e12,
    "down": 11e9,
    "up": 12e9,
    "clock_hz": 1.1e9,
    "memory_bytes": int(14.7 * 2**30),
}


def run(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tokens: int = 512, seq_length: int = 512
) -> Measured:
    with gpu.installed(monkeypatch):
        found = measure(LLAMA_3_8B, tokens, seq_length)
        assert not gpu.locked
        assert not gpu.allocated
        return found


def check(found: GpuProfile, gpu: FakeGpu, rel: float = 0.01, tokens: int = 512) -> None:
    """The rates are those of the device, whose kernels have a shortest time."""
    flops = 2 * tokens * tokens * LLAMA_3_8B.query
    wanted = {
        "gemm_flops_per_s": gpu.gemm,
        "attention_flops_per_s": min(gpu.forward, flops / gpu.kernel_s),
        "attention_backward_flops_per_s": min(gpu.backward, 2.5 * flops / gpu.kernel_s),
        "move_bytes_per_s": gpu.move,
        "decode_bytes_per_s": gpu.decode,
        "copy_down_bytes_per_s": gpu.down,
        "copy_up_bytes_per_s": gpu.up,
    }
    assert {name: getattr(found, name) for name in wanted} == pytest.approx(wanted, rel=rel)


@pytest.mark.parametrize("launch_s", [4e-6, 30e-6, 200e-6])
@pytest.mark.parametrize("tokens", [128, 512, 8192])
@pytest.mark.parametrize("machine", [{}, T4], ids=["H200", "T4"])
def test_rates_are_the_gpus_however_slow_its_host(
    monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], tokens: int, launch_s: float
) -> None:
    gpu = FakeGpu(**machine, launch_s=launch_s)
    found = run(gpu, monkeypatch, tokens, tokens)
    assert found.is_sound
    check(found.profile, gpu, tokens=tokens)
    assert found.profile.layer_launch_s == pytest.approx(450 * launch_s, rel=1e-6)
    assert found.profile.step_launch_s == pytest.approx(449 * launch_s, rel=1e-6)
    assert (found.profile.name, found.profile.capability) == (gpu.name, gpu.capability)
    assert found.profile.memory_bytes == gpu.memory_bytes
    assert found.profile.attention == "fake"
    # where the GPU is slower there is no lead, but those of copies
    assert max(gpu.slept_s) <= (0.003 if tokens == 8192 and launch_s < 200e-6 else 0.101)
    # "about 2 s", on hosts that one meets
    assert gpu.now < 2.6 or launch_s == 200e-6


@pytest.mark.parametrize("clock_hz", [0.5e9, 3.2e9])
def test_sleeps_are_seconds_at_any_clock(monkeypatch: pytest.MonkeyPatch, clock_hz: float) -> None:
    gpu = FakeGpu(clock_hz=clock_hz, launch_s=30e-6)
    found = run(gpu, monkeypatch, 128, 128)
    assert found.is_sound
    usual = FakeGpu(launch_s=30e-6)
    run(usual, monkeypatch, 128, 128)
    assert gpu.slept_s[2:] == pytest.approx(usual.slept_s[2:], rel=0.05)


def test_a_full_queue_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """99 calls of 40 launches do not fit into it, and the host waits inside what is timed."""
    gpu = FakeGpu(launch_s=20e-6, launches={"forward": 25, "backward": 40})
    found = run(gpu, monkeypatch)
    assert found.is_sound
    check(found.profile, gpu)


def test_stalls_of_the_host_are_in_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in ({}, T4):
        gpu = FakeGpu(**machine, stall_every=700, stall_s=4e-3)
        check(run(gpu, monkeypatch).profile, gpu, rel=0.02)


def test_a_copy_that_came_after_its_gemms_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the fastest one."""
    gpu = FakeGpu(stall_every=60, stall_s=0.03)
    found = run(gpu, monkeypatch).profile
    assert found.copy_down_bytes_per_s == pytest.approx(gpu.down, rel=0.01)
    assert found.copy_up_bytes_per_s == pytest.approx(gpu.up, rel=0.01)


def test_copies_are_timed_beside_gemms_and_the_fastest_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet = FakeGpu()
    run(quiet, monkeypatch)
    assert quiet.copies >= 16
    loaded = FakeGpu(loaded_until_s=0.8 * quiet.now)
    found = run(loaded, monkeypatch).profile
    assert found.copy_down_bytes_per_s == pytest.approx(loaded.down, rel=0.01)
    assert found.copy_up_bytes_per_s == pytest.approx(loaded.up, rel=0.01)


@pytest.mark.parametrize(("rate", "copies"), [(0.8e9, 4), (0.3e9, 2)])
def test_a_slow_link_is_not_measured_for_longer(
    monkeypatch: pytest.MonkeyPatch, rate: float, copies: int
) -> None:
    gpu = FakeGpu(down=rate, up=rate)
    found = run(gpu, monkeypatch).profile
    assert found.copy_up_bytes_per_s == pytest.approx(rate, rel=0.16)
    assert gpu.copies == copies
    assert gpu.now < 2.6


def test_a_host_that_locks_no_pages_has_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(locks_pages=False)
    found = run(gpu, monkeypatch)
    assert (found.profile.copy_down_bytes_per_s, found.profile.copy_up_bytes_per_s) == (0, 0)
    assert found.profile.is_measured
    assert not found.is_sound


def test_a_torch_without_sleeps_has_gemms_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(launch_s=30e-6)
    with gpu.installed(monkeypatch):
        monkeypatch.delattr(torch.cuda, "_sleep")
        found = measure(LLAMA_3_8B, 128, 128)
    assert found.is_sound
    assert not gpu.slept_s
    check(found.profile, gpu, tokens=128)


def test_a_gpu_that_could_not_be_held_up_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(launch_s=20e-6)
    with gpu.installed(monkeypatch):
        # as if every sleep were over at once
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.launch(cycles / 1e12))
        found = measure(LLAMA_3_8B, 128, 128)
    assert not found.is_sound
    assert "some calls waited for the host" in found.profile.source
    # what comes out is the host's rate, and no better than the GPU's
    assert 0 < found.profile.gemm_flops_per_s < gpu.gemm


def test_a_gpu_that_waited_for_a_compiler_is_warmed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(compile_s=3.0)
    check(run(gpu, monkeypatch, 4096, 2048).profile, gpu)


def test_a_plan_may_be_made_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    with gpu.installed(monkeypatch):
        torch.set_autocast_enabled("cuda", True)
        try:
            check(measure(LLAMA_3_8B, 512, 512).profile, gpu)
            assert torch.is_autocast_enabled("cuda")
        finally:
            torch.set_autocast_enabled("cuda", False)


def test_little_memory_measures_less_and_frees_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(**T4)
    gpu.memory_bytes = 700 * 2**20
    with gpu.installed(monkeypatch):
        found = measure_or_recorded(LLAMA_3_8B, 8192, 4096)
    assert "2048 tokens" in found.profile.source
    assert not found.is_sound
    check(found.profile, gpu)
    assert gpu.peak > 300 * 2**20
    assert gpu.held_when_emptied == [0, 0]


def test_no_memory_takes_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peer in (("NVIDIA H100 80GB HBM3", "H100"), ("Voodoo 2", "T4")):
        gpu = FakeGpu(name=name, memory_bytes=10 * 2**20)
        with gpu.installed(monkeypatch):
            found = measure_or_recorded(LLAMA_3_8B, 512, 512)
        profile = found.profile
        assert not found.is_sound
        assert (profile.name, profile.memory_bytes, profile.is_measured) == (
            name,
            10 * 2**20,
            False,
        )
        assert f"too little memory to measure; a recorded {peer}'s" in profile.source
        assert gpu.held_when_emptied == [0, 0]


def test_words_that_mean_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured_with(words: str) -> GpuProfile:
        def fail(*arguments: Any) -> None:
            raise RuntimeError(words)

        monkeypatch.setattr(measure_profile, "measure", fail)
        return measure_or_recorded(LLAMA_3_8B, 512, 512).profile

    with FakeGpu(name="Tesla T4").installed(monkeypatch):
        assert not measured_with("Triton Error [CUDA]: out of memory").is_measured
        assert not measured_with("CUDA error: CUBLAS_STATUS_ALLOC_FAILED").is_measured
        with pytest.raises(RuntimeError, match="illegal memory access"):
            measured_with("an illegal memory access was encountered")


def test_rates_are_work_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls themselves, by the kernels' references on a CPU."""
    monkeypatch.setattr(measure_profile, "host_call_s", lambda device: 2.0)
    times: list[float] = []

    def timer(call) -> float:
        call()
        times.append(0.5)
        return 0.5

    before = torch.get_rng_state()
    found = measure(SHAPE, 32, 16, device=torch.device("cpu"), timer=timer).profile
    numbers = (64 + 64) * 128 + (64 + 64) * 64 + (64 + 64) * 192 + (96 + 64) * 64
    assert found.gemm_flops_per_s == pytest.approx(4 * 32 * numbers / (8 * 0.5))
    flops = attention_flops(SHAPE, 32, 16)
    assert found.attention_flops_per_s == pytest.approx(flops / 0.5)
    assert found.attention_backward_flops_per_s == pytest.approx(2.5 * flops / 0.5)
    assert found.move_bytes_per_s == pytest.approx(3 * 32 * 96 * 4 / 0.5)
    assert found.decode_bytes_per_s == pytest.approx(96 * 64 * (0.515869140625 + 4) / 0.5)
    assert (found.layer_launch_s, found.step_launch_s) == (2 * 450, 2 * 449)
    assert found.attention == "cpu_flash"
    assert len(times) == 8 + 2 + 1 + 1
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU; this machine has none")
def test_a_gpus_rates_are_plausible() -> None:
    shape = ModelShape(32, 4096, 14336, 32, 8, 128, 128_256)
    state = torch.cuda.get_rng_state()
    allocated = torch.cuda.memory_allocated()
    for tokens in (2048, 256):
        measured = measure(shape, tokens, tokens)
        found = measured.profile
        assert measured.is_sound
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert found.is_measured
        assert found.attention_backward_flops_per_s > 5e12 or tokens < 2048
        assert found.attention_backward_flops_per_s < found.gemm_flops_per_s < 2e15
        assert 1e11 < found.decode_bytes_per_s < 1e13
        assert 1e11 < found.move_bytes_per_s < 1e13
        assert 2e9 < found.copy_down_bytes_per_s < 5e11
        assert 2e9 < found.copy_up_bytes_per_s < 5e11
    # cuBLAS keeps a workspace
    assert torch.cuda.memory_allocated() - allocated < COPY_BYTES
