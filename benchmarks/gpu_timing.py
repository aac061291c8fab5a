"""Time a function on the GPU: by events, with a cold cache, the host out of the way.

A run is: the GPU sleeps until the host has queued what follows, then the L2 cache is overwritten,
then come an event, the function, another event. The median over many runs is reported. Without the
sleep a small kernel would be timed as long as Python takes to launch it; without the overwriting it
would be timed over a cache that a training step has long filled with something else. A function
that waits for the GPU by itself is timed with that wait.

On a CPU the same calls time by the clock: enough to prove a script, not to compare anything.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

# several times the L2 cache of any GPU: 50 MB on an H100, 60 on an H200
FLUSH_BYTES = 256 * 2**20
# no GPU clocks much higher, so the sleep is never shorter than asked for
CYCLES_PER_MS = 2_000_000
LONGEST_SLEEP_MS = 100
# runs of one function take this long together, if that makes a number within the limits
BUDGET_MS = 300
FEWEST_RUNS, MOST_RUNS, WARM_UPS = 10, 100, 3
RUNS_ON_CPU = 2

COPY_BYTES = 2**30
COPY_BYTES_ON_CPU = 2**22


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of all runs, the fastest, and how many there were."""

    ms: float
    fastest_ms: float
    runs: int


@dataclass(frozen=True)
class Profile:
    """What the GPU did in one call.

    Attributes:
        launches: kernels, copies and fills not counted.
        copies: copies and fills.
        device_ms: time of all of them together.
        kernels: (ms, count, name), the longest first.
    """

    launches: int
    copies: int
    device_ms: float
    kernels: list[tuple[float, int, str]]


def pick_device(command: str, *, is_dry: bool) -> torch.device:
    """The CPU for a dry run, else the GPU; ends the program if there is none."""
    if is_dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit(
            f"{command} times work on a CUDA GPU, and torch finds none on this machine.\n"
            f"To prove the script without one, at tiny sizes: python -m {command} --dry"
        )
    return torch.device("cuda", torch.cuda.current_device())


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Times functions on one device; holds the memory that is overwritten between the runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self._flush = None
        self._copies: dict[int, float] = {}
        if self.is_gpu:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time(self, function: Callable[[], Any]) -> Timing:
        """Milliseconds of one call of `function`, which must bear being called again and again."""
        if not self.is_gpu:
            walls = [self.host_and_wall_ms(function)[1] for _ in range(RUNS_ON_CPU)]
            return Timing(statistics.median(walls), min(walls), RUNS_ON_CPU)
        for _ in range(WARM_UPS):
            function()
        host_ms, wall_ms = self.host_and_wall_ms(function)
        runs = max(FEWEST_RUNS, min(MOST_RUNS, int(BUDGET_MS / max(wall_ms, 1e-3))))
        sleep_ms = min(2 * host_ms, LONGEST_SLEEP_MS)
        found = [self._event_ms(function, sleep_ms) for _ in range(runs)]
        return Timing(statistics.median(found), min(found), runs)

    def host_and_wall_ms(self, function: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds until one call returns, and until the device has done its work."""
        synchronize(self.device)
        began = time.perf_counter()
        function()
        returned = time.perf_counter()
        synchronize(self.device)
        return (returned - began) * 1e3, (time.perf_counter() - began) * 1e3

    def copy_gb_s(self) -> float:
        """GB/s of a large copy on the device, read and written bytes counted."""
        size = COPY_BYTES if self.is_gpu else COPY_BYTES_ON_CPU
        return 2 * size / self.copy_ms(2 * size) / 1e6

    def copy_ms(self, bytes_moved: int) -> float:
        """Milliseconds of a copy on the device that moves so many bytes, half of them read."""
        if bytes_moved not in self._copies:
            source = torch.ones(bytes_moved // 2, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._copies[bytes_moved] = self.time(lambda: target.copy_(source)).ms
        return self._copies[bytes_moved]

    def _event_ms(self, function: Callable[[], Any], sleep_ms: float) -> float:
        assert self._flush is not None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(sleep_ms * CYCLES_PER_MS))
        self._flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def profile_call(function: Callable[[], Any], device: torch.device) -> Profile | None:
    """Run once under torch's profiler; None on a CPU, which launches nothing."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize(device)
    return summarise(recorded.events() or [])


def summarise(events: Iterable[Any]) -> Profile:
    """Count and add up the device's events of a profile."""
    counts: Counter[str] = Counter()
    times_us: Counter[str] = Counter()
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        # ranges that an optimiser or a user names are drawn over the kernels inside them
        if not on_device or getattr(event, "is_user_annotation", False):
            continue
        counts[event.name] += 1
        times_us[event.name] += event.time_range.elapsed_us()
    copies = sum(n for name, n in counts.items() if name.startswith(("Memcpy", "Memset")))
    kernels = [(us / 1e3, counts[name], name) for name, us in times_us.most_common()]
    return Profile(counts.total() - copies, copies, sum(times_us.values()) / 1e3, kernels)
