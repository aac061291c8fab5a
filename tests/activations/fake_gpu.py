"""A GPU and its host with two clocks, for code that measures: torch.cuda as far as that uses it.

The host's clock goes on by what it does, each stream's by what it was given, in order. Tensors "on
the GPU" are torch's meta tensors, so an 8B's sizes cost nothing. What a host does to a measurement
can be had: slow launches, stalls, a queue that is full, a compiler; and what a GPU does: sleeps in
cycles of its own clock, low clocks after a pause, slower copies beside GEMMs, little memory.
"""

from __future__ import annotations

import contextlib
import random
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from colab_qlora.activations import copy_rates, gpu_timer
from colab_qlora.kernels import attention, nf4, swiglu

QUEUE = 1024
# after so long a pause the GPU runs at this share of its clock for so long
PAUSE_S, COLD_SHARE, COLD_S = 0.5, 0.6, 0.2
# copies without anything beside them
ALONE = 1.15
EVENT_S = 0.5e-6


@dataclass(eq=False)
class FakeGpu:
    """Rates of the device, seconds of its host, and what happened so far (`now`, `slept_s`)."""

    name: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)
    gemm: float = 700e12
    forward: float = 450e12
    backward: float = 300e12
    move: float = 2.4e12
    decode: float = 1.9e12
    down: float = 51e9
    up: float = 55e9
    clock_hz: float = 1.8e9
    memory_bytes: int = 140 * 2**30
    kernel_s: float = 2e-6
    launch_s: float = 10e-6
    # of one call of each kernel
    launches: dict[str, int] = field(default_factory=lambda: {"forward": 2, "backward": 5})
    compile_s: float = 0.0
    # one launch in so many takes so much longer
    stall_every: float = 0.0
    stall_s: float = 0.0
    # until then copies are so much slower
    loaded_until_s: float = 0.0
    loaded_share: float = 0.92
    locks_pages: bool = True

    def __post_init__(self) -> None:
        self.now, self.allocated, self.peak = 0.0, 0, 0
        self.slept_s: list[float] = []
        self.held_when_emptied: list[int] = []
        self.copies = 0
        self.locked: set[int] = set()
        self._compiled: set[str] = set()
        self._warm_at, self._last_end = 0.0, -1.0
        self._chance = random.Random(0)
        self._main = _Stream(self)
        self._current = self._main

    def launch(self, seconds: float) -> float:
        """Start work on the current stream; when that begins. Blocks where the queue is full."""
        self.now += self.launch_s
        if self.stall_every and self._chance.random() < 1 / self.stall_every:
            self.now += self.stall_s
        pending = self._current.pending
        while pending and pending[0] <= self.now:
            pending.popleft()
        if len(pending) >= QUEUE:
            self.now = pending.popleft()
        start = max(self._current.free_at, self.now)
        if start - self._last_end > PAUSE_S:
            self._warm_at = start + COLD_S
        end = start + seconds / (COLD_SHARE if start < self._warm_at else 1)
        self._current.free_at = end
        self._last_end = max(self._last_end, end)
        pending.append(end)
        return start

    def kernel(self, name: str, seconds: float) -> None:
        """A call of so many launches, which is compiled at first."""
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cuda")
        if name not in self._compiled:
            self._compiled.add(name)
            self.now += self.compile_s
        count = self.launches.get(name, 1)
        for _ in range(count):
            self.launch(max(seconds, self.kernel_s) / count)

    def copy(self, size: int, rate: float) -> None:
        """Slower while the main stream works, and while the host does something else."""
        start = max(self._current.free_at, self.now + self.launch_s)
        if start < self.loaded_until_s:
            rate *= self.loaded_share
        beside_s = min(max(0.0, self._main.free_at - start), size / rate)
        self.launch(beside_s + (size - beside_s * rate) / (rate * ALONE))
        self.copies += 1

    def sleep(self, cycles: int) -> None:
        assert isinstance(cycles, int)
        self.slept_s.append(cycles / self.clock_hz)
        self.launch(cycles / self.clock_hz)

    def lock(self, address: int, size: int, flags: int) -> int:
        """cudaHostRegister, which returns an error's number."""
        if not self.locks_pages:
            return 801
        self.locked.add(address)
        return 0

    def unlock(self, address: int) -> None:
        self.locked.remove(address)

    def synchronize(self, device: Any = None) -> None:
        self.now = max(self.now, self._last_end)

    def empty_cache(self) -> None:
        self.held_when_emptied.append(self.allocated)

    def allocate(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.allocated + tensor.nbytes > self.memory_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.allocated += tensor.nbytes
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(tensor, self._free, tensor.nbytes)
        return tensor

    def _free(self, size: int) -> None:
        self.allocated -= size

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    @contextlib.contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
        """Torch's GPU is this one."""
        with monkeypatch.context() as patch, _OnTheGpu(self):
            _patch_cuda(patch, self)
            _patch_kernels(patch, self)
            for module in (copy_rates, gpu_timer):
                patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
            yield self


class _Stream:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.free_at, self.pending = gpu, 0.0, deque[float]()

    def wait_event(self, event: _Event) -> None:
        self.free_at = max(self.free_at, event.at)


class _Event:
    def __init__(self, gpu: FakeGpu, enable_timing: bool) -> None:
        self.gpu, self.has_time, self.at = gpu, enable_timing, float("inf")

    def record(self) -> None:
        self.at = self.gpu.launch(0.0)

    def query(self) -> bool:
        return self.gpu.now >= self.at

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, ended: _Event) -> float:
        if not (self.has_time and ended.has_time and self.query() and ended.query()):
            raise RuntimeError("CUDA error: device not ready")
        return round((ended.at - self.at) / EVENT_S) * EVENT_S * 1e3


class _OnTheGpu(TorchFunctionMode):
    """Tensors of the GPU are meta tensors, and what torch does with them takes its time."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs, gpu = dict(kwargs or {}), self.gpu
        if function is torch.Tensor.copy_:
            target, source = args[:2]
            host = target if target.device.type == "cpu" else source
            assert host.data_ptr() in gpu.locked
            gpu.copy(source.nbytes, gpu.down if host is target else gpu.up)
            return target
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return gpu.allocate(function(*args, **{**kwargs, "device": "meta"}))
        found = function(*args, **kwargs)
        if function is torch.empty_like and found.is_meta:
            gpu.allocate(found)
        if function is torch.Tensor.normal_:
            gpu.kernel("normal", found.nbytes / gpu.move)
        if function is torch.mm:
            (rows, inner), columns = args[0].shape, args[1].shape[1]
            gpu.kernel("mm", 2 * rows * inner * columns / gpu.gemm)
        return found


def _patch_cuda(patch: pytest.MonkeyPatch, gpu: FakeGpu) -> None:
    runtime = SimpleNamespace(cudaHostRegister=gpu.lock, cudaHostUnregister=gpu.unlock)
    properties = SimpleNamespace(name=gpu.name, total_memory=gpu.memory_bytes)
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "cudart": lambda: runtime,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: gpu.name,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_properties": lambda device: properties,
        "get_rng_state": lambda device: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": lambda state, device: None,
        "Event": lambda enable_timing=False: _Event(gpu, enable_timing),
        "Stream": lambda device: _Stream(gpu),
        "stream": gpu.stream,
        "synchronize": gpu.synchronize,
        "empty_cache": gpu.empty_cache,
        "_sleep": gpu.sleep,
    }.items():
        patch.setattr(torch.cuda, name, value)


def _patch_kernels(patch: pytest.MonkeyPatch, gpu: FakeGpu) -> None:
    def flops(shape: Any) -> float:
        # half of all pairs, two products
        return 2 * shape.tokens * shape.seq_length * shape.q_heads * shape.head_dim

    def attention_forward(q: Any, k: Any, v: Any, shape: Any) -> tuple[Any, Any]:
        gpu.kernel("forward", flops(shape) / gpu.forward)
        o = torch.empty(q.shape, dtype=q.dtype, device="cuda")
        return o, torch.empty(q.shape[:2], device="cuda")

    def attention_backward(*tensors_and_shape: Any) -> None:
        gpu.kernel("backward", 2.5 * flops(tensors_and_shape[-1]) / gpu.backward)

    def glu_forward(gate: Any, up: Any, *, activation: str, out: Any) -> None:
        gpu.kernel("glu", 3 * gate.nbytes / gpu.move)

    def decode(state: Any, out: Any) -> None:
        small = state.packed.nbytes + state.absmax.nbytes + state.nested_absmax.nbytes
        gpu.kernel("decode", (small + out.nbytes) / gpu.decode)

    patch.setattr(attention, "attention_forward", attention_forward)
    patch.setattr(attention, "attention_backward", attention_backward)
    patch.setattr(attention, "choose_attention", lambda q, shape: SimpleNamespace(name="fake"))
    patch.setattr(swiglu, "glu_forward", glu_forward)
    patch.setattr(nf4, "decode", decode)
