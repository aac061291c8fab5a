"""Bytes a second between a GPU and page-locked host memory, while GEMMs run beside the copy.

    the GPU          [lead]  gate  [GEMMs, for longer than the copy takes]
    the side stream          gate  | copy |

Both streams are queued while the lead runs, so that nothing of the host's is inside the copy's
time. Copies are repeated, spread over the whole measurement, and the fastest counts: whatever else
the host does can only slow a copy down, and one that is not covered by GEMMs is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from colab_qlora.activations.gpu_timer import GpuLoad, events, seconds_between
from colab_qlora.activations.host_pool import HostMemoryRefused, HostPool

COPY_BYTES = 64 * 2**20
# GEMMs beside the copy, against what a copy alone takes
COVER = 1.5
# the lead, of twice what it took the last time to queue all that waits for it
LEAD_FACTOR, SHORTEST_LEAD_S, LONGEST_LEAD_S = 2.0, 1e-3, 0.02
# copies of a slow link are not repeated for longer
MOST_COPY_S = 0.3


class CopyRates:
    """Times copies, one each way a `round`; none where the host refuses page-locked memory.

    Args:
        load: what runs beside them.
    """

    def __init__(self, load: GpuLoad) -> None:
        self._load = load
        self._lead_s = SHORTEST_LEAD_S
        # the memory that training copies to: it is let go of with the pool
        self._pool = HostPool(COPY_BYTES)
        self._host: torch.Tensor | None = None
        # seconds of each copy, and whether it was queued in time; the first is alone
        self._down: list[tuple[float, bool]] = []
        self._up: list[tuple[float, bool]] = []
        try:
            self._host = self._pool.take(COPY_BYTES)
        except HostMemoryRefused:
            return
        self._there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=load.device)
        self._stream = torch.cuda.Stream(load.device)
        for copy, found in self._ways():
            found.append((self._time(copy, 0.0)[0], False))

    def round(self) -> None:
        """A copy each way."""
        spent_s = sum(seconds for seconds, _ in (*self._down, *self._up))
        if self._host is None or spent_s > MOST_COPY_S:
            return
        for copy, found in self._ways():
            found.append(self._time(copy, COVER * min(found)[0]))

    def rates(self) -> tuple[float, float]:
        """Bytes a second to the host and to the GPU; 0 for none."""
        return _best_rate(self._down), _best_rate(self._up)

    def _ways(self) -> list[tuple[Callable[[], Any], list[tuple[float, bool]]]]:
        host, there = self._host, self._there
        assert host is not None
        return [
            (lambda: host.copy_(there, non_blocking=True), self._down),
            (lambda: there.copy_(host, non_blocking=True), self._up),
        ]

    def _time(self, copy: Callable[[], Any], cover_s: float) -> tuple[float, bool]:
        """Seconds of a copy; and whether all was queued before it began."""
        gate, began, ended = events(3)
        self._load.hold(self._lead_s)
        start = time.perf_counter()
        gate.record()
        self._load.run_gemms(cover_s)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(gate)
            began.record()
            copy()
            ended.record()
        is_queued = not gate.query()
        queued_s = time.perf_counter() - start
        self._lead_s = min(LONGEST_LEAD_S, max(SHORTEST_LEAD_S, LEAD_FACTOR * queued_s))
        seconds = seconds_between(began, ended)
        torch.cuda.synchronize(self._load.device)
        return seconds, is_queued


def _best_rate(copies: list[tuple[float, bool]]) -> float:
    """Of the copies that were queued in time; where none was, of those with GEMMs, or of any."""
    found = [seconds for seconds, is_queued in copies if is_queued]
    found = found or [seconds for seconds, _ in copies[1:] or copies]
    return COPY_BYTES / min(found) if found else 0.0
