"""Record GPU work once and start it again with a single call: CUDA graphs, and a stand-in for CPUs.

A layer's pass starts 60 to 110 kernels. Each costs the host 5 to 15 us, so that batches of few
tokens, or a slow host, leave the GPU waiting. A recorded pass costs the host one call.

What is recorded reads and writes fixed addresses. Its memory comes from a pool of its own: what is
freed while recording may be used again by what is recorded later, never by anything else. So
recordings of one recorder have to run in the order in which they were made, and those of two
batches never at the same time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Work = Callable[[], Sequence[torch.Tensor | None]]


class Recording(Protocol):
    """Recorded work; what it returned is in `results`, at the same addresses after each call."""

    results: tuple[torch.Tensor | None, ...]

    def __call__(self) -> None:
        """Queue all of it on the current stream."""


class GraphRecorder:
    """Makes CUDA graphs that share one pool of memory.

    Args:
        device: a CUDA device.
    """

    # what was recorded does not ask Python again: tensors that only it reads need no owner
    runs_again = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = recording_stream(device)
        # a pool ends with its last graph, and nothing could be recorded in it any more
        nothing = torch.zeros(1, device=device)
        self._anchor = self.record(lambda: (nothing.add_(0),))

    def record(self, work: Work) -> Recording:
        """Record what `work` queues; nothing of it runs yet.

        Raises:
            RuntimeError: it waits for the GPU, or memory ran out (torch.OutOfMemoryError).
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # relaxed: other threads, and the loading of a kernel, may do as they please meanwhile
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
                results = tuple(work())
                graph.capture_end()
            except BaseException:
                # the stream has to leave its recording state, which says again what went wrong
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                after_failed_capture(self._device, self._pool)
                raise
        return _Graph(graph, results)

    def pool_bytes(self) -> tuple[int, int]:
        """Memory of the pool that no tensor owns, which recordings alone can use; and the rest."""
        whole = owned = 0
        for segment in torch.cuda.memory_snapshot():
            if tuple(segment["segment_pool_id"]) == tuple(self._pool):
                whole += segment["total_size"]
                owned += segment["allocated_size"]
        return whole - owned, owned


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream to record on: torch keeps a workspace of cuBLAS for each for good."""
    return torch.cuda.Stream(device)


def after_failed_capture(device: torch.device, pool: Any) -> None:
    """Mend what torch leaves undone where a capture fails, the current stream aside."""
    index = torch.cuda.current_device() if device.index is None else device.index
    # the allocator waits for the capture's end, and would free nothing until then
    with contextlib.suppress(RuntimeError):  # it has ended in newer releases
        torch._C._cuda_endAllocateToPool(index, pool)
    # the random numbers wait for it too: the same seed and offset, in no capture
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


class _Graph:
    def __init__(self, graph: Any, results: tuple[torch.Tensor | None, ...]) -> None:
        self._graph, self.results = graph, results

    def __call__(self) -> None:
        self._graph.replay()


class Rerun:
    """Does the work anew at each call, into the results of the first time: the same, on a CPU.

    A pass may write over what it reads, so the first call, right after the recording, does nothing.
    """

    runs_again = True

    def record(self, work: Work) -> Recording:
        """Run `work` once for the places of its results."""
        return _Again(work, tuple(work()))

    def pool_bytes(self) -> tuple[int, int]:
        return 0, 0


class _Again:
    def __init__(self, work: Work, results: tuple[torch.Tensor | None, ...]) -> None:
        self._work, self.results = work, results
        self._is_new = True

    def __call__(self) -> None:
        if self._is_new:
            self._is_new = False
            return
        for place, found in zip(self.results, self._work(), strict=True):
            if place is not None and found is not None and place.data_ptr() != found.data_ptr():
                place.copy_(found)


Recorder = GraphRecorder | Rerun
