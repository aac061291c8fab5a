"""From seconds to rates, and what is kept on disk; the seconds themselves need a GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from machines import LARGE

from colab_qlora.activations import measure_profile
from colab_qlora.activations.costs import attention_flops
from colab_qlora.activations.gpu_profile import profile_of_this_machine
from colab_qlora.activations.measure_profile import (
    cached_profile,
    measure,
    read_profile,
    write_profile,
)
from colab_qlora.activations.model_shape import ModelShape
from colab_qlora.errors import UserError

SHAPE = ModelShape(2, 64, 96, 4, 2, 16, 101)
HAS_GPU = torch.cuda.is_available()


def test_rates_are_work_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_profile, "host_call_s", lambda device: 2.0)
    times: list[float] = []

    def timer(call) -> float:
        call()
        times.append(0.5)
        return 0.5

    before = torch.get_rng_state()
    found = measure(SHAPE, 32, 16, device=torch.device("cpu"), timer=timer)
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


def test_a_profile_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    assert read_profile(path) is None
    write_profile(path, LARGE)
    assert read_profile(path) == LARGE
    fields = json.loads(path.read_text("utf-8"))
    for broken in (
        "{",
        "[]",
        json.dumps({**fields, "gemm_flops_per_s": 0}),
        json.dumps({**fields, "move_bytes_per_s": "fast"}),
        json.dumps({**fields, "layer_launch_s": None}),
        json.dumps({**fields, "another": 1}),
        json.dumps({name: value for name, value in fields.items() if name != "source"}),
    ):
        path.write_text(broken, "utf-8")
        assert read_profile(path) is None
    (tmp_path / "file").write_text("", "utf-8")
    write_profile(tmp_path / "file" / "x.json", LARGE)  # no folder can be made there


def test_it_is_measured_once_for_all_sizes_of_a_power_of_two(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Properties:
        name = "a GPU"

    calls = []

    def measured(shape: ModelShape, tokens: int, seq_length: int):
        calls.append((tokens, seq_length))
        return dataclasses.replace(LARGE, name=f"{len(calls)}")

    monkeypatch.setenv("COLAB_QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(measure_profile, "measure_or_recorded", measured)
    first = cached_profile(SHAPE, 3000, 1500)
    assert calls == [(4096, 2048)]
    assert cached_profile(SHAPE, 4096, 2048) == first
    assert len(calls) == 1
    cached_profile(SHAPE, 100_000, 50_000)
    assert calls[1] == (8192, 8192)
    cached_profile(dataclasses.replace(SHAPE, hidden=128), 3000, 1500)
    Properties.name = "another"
    cached_profile(SHAPE, 3000, 1500)
    assert len(calls) == 4


def test_too_little_memory_measures_less_and_then_takes_the_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def full(shape: ModelShape, tokens: int, seq_length: int):
        tried.append((tokens, seq_length))
        if tokens > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return LARGE

    class Properties:
        total_memory = 7

    monkeypatch.setattr(measure_profile, "measure", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    room = 600
    assert measure_profile.measure_or_recorded(SHAPE, 8192, 2048) is LARGE
    assert tried == [(8192, 2048), (2048, 2048), (512, 512)]
    room = 0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert measure_profile.measure_or_recorded(SHAPE, 512, 512).name == "T4"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Voodoo 2")
    found = measure_profile.measure_or_recorded(SHAPE, 512, 512)
    assert (found.name, found.memory_bytes, found.is_measured) == ("Voodoo 2", 7, False)


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_to_name_one() -> None:
    with pytest.raises(UserError, match='Name one: gpu="T4"'):
        profile_of_this_machine(SHAPE, 8, 8)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU; this machine has none")
def test_a_gpus_rates_are_plausible() -> None:
    shape = ModelShape(32, 4096, 14336, 32, 8, 128, 128_256)
    state = torch.cuda.get_rng_state()
    found = measure(shape, 2048, 2048)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert found.is_measured
    assert 5e12 < found.attention_backward_flops_per_s < found.gemm_flops_per_s < 2e15
    assert 1e11 < found.decode_bytes_per_s < 1e13
    assert 1e11 < found.move_bytes_per_s < 1e13
    assert 2e9 < found.copy_down_bytes_per_s < 5e11
    assert 2e9 < found.copy_up_bytes_per_s < 5e11
