"""Expandable segments: on where there is a GPU and nobody chose, with the user's other settings."""

import pytest
import torch

from colab_qlora.models import growing_segments
from colab_qlora.models.growing_segments import VARIABLES, let_segments_grow


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """What the allocator is told, on a machine that seems to have a GPU and no settings."""
    heard: list[str] = []
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", heard.append)
    return heard


def test_segments_grow_by_default(told):
    assert let_segments_grow()
    assert told == ["expandable_segments:True"]


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["expandable_segments:False", "expandable_segments:True"])
def test_who_has_chosen_keeps_the_choice(told, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not let_segments_grow()
    assert told == []


def test_other_settings_stay(told, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert let_segments_grow()
    assert told == ["max_split_size_mb:64,expandable_segments:True"]


def test_another_allocator_is_left_alone(told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert not let_segments_grow()
    assert told == []


def test_nothing_happens_without_a_gpu(told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not let_segments_grow()
    assert told == []


def test_torch_takes_the_setting():
    """The name is private to torch: this fails with a release that no longer has it."""
    torch._C._accelerator_setAllocatorSettings(growing_segments.SETTING)
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


@pytest.mark.gpu
def test_memory_asked_for_afterwards_can_grow(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    torch.cuda.empty_cache()
    assert let_segments_grow()
    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    segments = torch.cuda.memory_snapshot()
    inside = [
        segment
        for segment in segments
        if segment["address"] <= held.data_ptr() < segment["address"] + segment["total_size"]
    ]
    assert [segment["is_expandable"] for segment in inside] == [True]
