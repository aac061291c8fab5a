"""Seconds of calls on a GPU, by events, whatever the host does meanwhile.

    marks              0         1         2         3
    the GPU    [lead]  | a third | a third | a third |
    the host   [ queues all of it ]

A rate is that of a GPU which never waits. Where the host starts calls more slowly than the GPU runs
them, the GPU is held up first (the lead) until all of them are queued; whether that was so is seen
by the first mark, which the GPU must not have reached by then. A host that stalls, or whose queue
of about 1,024 launches is full, is found out that way, and fewer calls are tried. Of three thirds
the median counts, since a stall that meets calls without a lead falls into one of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# a large GEMM: 5 ms of a T4, 0.2 ms of an H200
LOAD_SIZE, LOAD_CALLS = 4096, 20
WARM_UP_S = 0.3
# a GPU that idled for so long, while something was compiled, may have clocked down
IDLE_S = 0.5
# each rate is measured for about so long, of so many calls
BUSY_S, FEWEST_CALLS, MOST_CALLS = 0.06, 2, 300
PARTS = 3
# calls with a lead: of up to ten launches each they fit into the GPU's queue
MOST_QUEUED_CALLS = 99
# from this share of the host in a single call's time (half of what the GPU needs) there is a lead.
# Longer calls follow one another without one, since a GPU that has slept clocks higher
HOST_BOUND_SHARE = 1 / 3
# against what the host needed for one call; a lead that is too short is found out
LEAD_FACTOR, LONGEST_LEAD_S, TRIES = 2.0, 0.1, 4
# sleeps are in cycles of the multiprocessors' clock, 0.6 to 3 GHz, which one of so many measures
CLOCK_CYCLES = 1_000_000
HOST_CALLS = 200


class GpuLoad:
    """What keeps a GPU busy: large GEMMs, which bring it to the clock of training, and sleeps.

    Args:
        device: the current GPU.
        dtype: what it computes in.

    Attributes:
        gemm_s: seconds of one.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        size = (LOAD_SIZE, LOAD_SIZE)
        self._square = torch.empty(size, dtype=dtype, device=device).normal_()
        self._product = torch.empty_like(self._square)
        self.gemm_s = math.inf
        self.warm_up()
        self._cycles_per_s = _cycles_per_s()

    def warm_up(self) -> None:
        """Load the GPU for some tenths of a second, which is what its clock needs to settle."""
        # the first of all loads cuBLAS, which may take longer than the rest
        self._start(1)
        torch.cuda.synchronize(self.device)
        began, ended = events(2)
        start = time.perf_counter()
        while time.perf_counter() - start < WARM_UP_S:
            began.record()
            self._start(LOAD_CALLS)
            ended.record()
            # the fastest: a host that stalls makes them longer
            found_s = seconds_between(began, ended) / LOAD_CALLS
            self.gemm_s = min(self.gemm_s, max(found_s, 1e-6))

    def run_gemms(self, seconds: float) -> None:
        """Queue GEMMs of at least so long on the current stream."""
        self._start(math.ceil(seconds / self.gemm_s))

    def hold(self, seconds: float) -> None:
        """Queue one launch that holds the current stream up for so long; GEMMs, if torch has no
        such thing."""
        if self._cycles_per_s:
            torch.cuda._sleep(math.ceil(seconds * self._cycles_per_s))
        else:
            self.run_gemms(seconds)

    def _start(self, count: int) -> None:
        for _ in range(count):
            torch.mm(self._square, self._square, out=self._product)


class EventTimer:
    """Seconds of one call on the current stream of a GPU that `load` has warmed.

    Attributes:
        has_waited: whether a GPU had to wait for its host in spite of everything: the seconds of
            that call are those of the host.
    """

    def __init__(self, load: GpuLoad) -> None:
        self._load = load
        self.has_waited = False

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds of `call`, which must bear being called again and again."""
        start = time.perf_counter()
        call()
        if time.perf_counter() - start > IDLE_S:
            self._load.warm_up()
        host_s, whole_s = _one_call(call)
        count = min(MOST_CALLS, max(FEWEST_CALLS, math.ceil(BUSY_S / max(whole_s, 1e-6))))
        if host_s <= HOST_BOUND_SHARE * whole_s:
            return whole_s if whole_s > BUSY_S else _timed(call, count)[0]
        count = min(count, MOST_QUEUED_CALLS)
        lead_s = min(LONGEST_LEAD_S, LEAD_FACTOR * count * host_s)
        found = []
        for _ in range(TRIES):
            self._load.hold(lead_s)
            seconds, is_queued = _timed(call, count)
            if is_queued:
                return seconds
            found.append(seconds)
            count = max(1, count // 2)
        self.has_waited = True
        return min(found)


def events(count: int) -> list[torch.cuda.Event]:
    """So many events that have a time."""
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def seconds_between(began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
    """Seconds between two recorded events, once the GPU has reached the later one."""
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def host_call_s(device: torch.device) -> float:
    """Seconds that the host needs to start one small kernel through torch."""
    x = torch.ones(16, 16, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    torch.mm(x, x, out=y)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        torch.mm(x, x, out=y)
    return (time.perf_counter() - start) / HOST_CALLS


def _cycles_per_s() -> float:
    """The clock that sleeps are counted in; 0 where torch, whose own affair they are, has none."""
    if not hasattr(torch.cuda, "_sleep"):
        return 0.0
    # the first launch of a kernel loads it
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    began, ended = events(2)
    began.record()
    torch.cuda._sleep(CLOCK_CYCLES)
    ended.record()
    return CLOCK_CYCLES / max(seconds_between(began, ended), 1e-6)


def _one_call(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until a call has returned, and until an idle GPU has done it."""
    began, ended = events(2)
    torch.cuda.synchronize()
    began.record()
    start = time.perf_counter()
    call()
    host_s = time.perf_counter() - start
    ended.record()
    return host_s, seconds_between(began, ended)


def _timed(call: Callable[[], Any], count: int) -> tuple[float, bool]:
    """Seconds of one of about so many calls in a row; and whether the host was through with all
    of them before the GPU began."""
    parts = min(PARTS, count)
    each = -(-count // parts)
    marks = events(parts + 1)
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(each):
            call()
        mark.record()
    is_queued = not marks[0].query()
    marks[-1].synchronize()
    found = [seconds_between(a, b) / each for a, b in zip(marks, marks[1:], strict=False)]
    return statistics.median(found), is_queued
