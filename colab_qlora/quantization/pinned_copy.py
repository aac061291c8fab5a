"""Copy a matrix from a memory-mapped file to a GPU through two buffers of pinned memory.

    file's pages -> buffer A or B, by the CPU -> GPU, by its copy engine

While one buffer is on its way the CPU fills the other, all of it in a thread of its own: the first
touch of a page and the copies hide behind whatever the GPU computes. A copy straight from pages
that are not pinned would have the thread that starts the GPU's work wait for every piece.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

PIECE_BYTES = 2**25


class PinnedCopier:
    """Copies matrices one after the other in one thread.

    Args:
        device: where they go. On a CPU the same is done without streams.
        piece_bytes: of each of the two buffers.
    """

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        self._device, on_gpu = device, device.type == "cuda"
        self._buffers = [
            torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)
        ]
        self._stream: Any = torch.cuda.Stream(device) if on_gpu else None
        # when the GPU has what was in a buffer
        self._sent: list[Any] = [torch.cuda.Event() if on_gpu else None for _ in range(2)]
        self._thread, self._turn = ThreadPoolExecutor(1, "weights"), 0

    def start(self, host: torch.Tensor) -> Arriving:
        """Begin to copy a contiguous matrix.

        The memory is of the present stream, which has to be the one that the matrix is used on.
        """
        into = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        if self._stream is not None:
            # should nobody come to wait for it, its memory is let go when the copy is over
            into.record_stream(self._stream)
        # what used that memory before may still be at work
        ready = torch.cuda.current_stream(self._device).record_event() if self._stream else None
        return Arriving(into, self._thread.submit(self._copy, host, into, ready))

    def close(self) -> None:
        self._thread.shutdown()
        if self._stream is not None:
            self._stream.synchronize()

    def _copy(self, host: torch.Tensor, into: torch.Tensor, ready: Any) -> Any:
        source, target = _bytes_of(host), _bytes_of(into)
        on_gpu = self._stream is not None
        with torch.cuda.stream(self._stream) if on_gpu else contextlib.nullcontext():
            if on_gpu:
                self._stream.wait_event(ready)
            for first in range(0, source.numel(), self._buffers[0].numel()):
                self._send(source[first:], target[first:])
            return self._stream.record_event() if on_gpu else None

    def _send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """As much of the source as a buffer holds."""
        buffer, sent = self._buffers[self._turn], self._sent[self._turn]
        self._turn = 1 - self._turn
        if sent is not None:
            sent.synchronize()
        piece = buffer[: source.numel()]
        piece.copy_(source[: piece.numel()])
        target[: piece.numel()].copy_(piece, non_blocking=True)
        if sent is not None:
            sent.record(self._stream)


class Arriving:
    """A matrix on its way; what is not waited for must not be let go of.

    Args:
        matrix: where it will be.
        copying: gives the event after which it is there, or None on a CPU.
    """

    def __init__(self, matrix: torch.Tensor, copying: Future[Any]) -> None:
        self._matrix, self._copying = matrix, copying

    def wait(self) -> torch.Tensor:
        """The matrix; the present stream goes on when it is there."""
        event = self._copying.result()
        if event is not None:
            torch.cuda.current_stream(self._matrix.device).wait_event(event)
        return self._matrix


def _bytes_of(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.view(-1).view(torch.uint8)
