"""16-bit matrices on the device that works on them: read ahead, and kept where there is room.

Measuring prices asks for all weights once (or once a micro-batch, where memory is short), and
placing asks for them again. A GPU gets each through `pinned_copy`, while it is busy with the one
before; with room for them, they stay until they are placed. Where not even four of a matrix would
fit into what is free, it is given as the source has it, and whoever uses it takes a part at a time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from types import TracebackType

import torch

from colab_qlora.quantization.memory_room import Room, free_bytes
from colab_qlora.quantization.pinned_copy import PIECE_BYTES, Arriving, PinnedCopier

Source = Callable[[str], torch.Tensor]

# the matrix, the next one, and the first in another dtype, with one to spare
LEAST_FREE_MATRICES = 4


class WeightReader:
    """A source of matrices on a device, to be closed (`with`) when all of them are read.

    Args:
        source: gives a matrix by name, on the CPU.
        device: where it is used.
        room: for matrices that are kept until `take` asks for them.
        is_staged: whether matrices are copied to the device; by default if it is a GPU.
        piece_bytes: of a staging buffer.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        room: Room | None = None,
        *,
        is_staged: bool | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._source, self._device, self._room = source, device, room or Room()
        self._is_staged = device.type == "cuda" if is_staged is None else is_staged
        self._piece_bytes = piece_bytes
        self._copier: PinnedCopier | None = None
        self._after: dict[str, str] = {}
        self._kept: dict[str, torch.Tensor] = {}
        self._coming: tuple[str, Arriving | torch.Tensor] | None = None

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._discard()
        finally:
            self._kept.clear()
            if self._copier is not None:
                self._copier.close()
                self._copier = None

    def expect(self, names: Iterable[str]) -> None:
        """The order in which matrices will be asked for; another one costs time only."""
        self._after = dict(itertools.pairwise(names))

    def __call__(self, name: str) -> torch.Tensor:
        """(rows, columns), in the dtype that it is stored in; not to be written into.

        Raises:
            UserError: as the source does.
        """
        if not self._is_staged:
            return self._source(name)
        weight = self._kept.get(name)
        if weight is None:
            weight = self._read(name)
        self._read_ahead(self._after.get(name))
        return weight

    def take(self, name: str) -> torch.Tensor:
        """The same for the last time: it belongs to the caller."""
        weight = self(name)
        if self._kept.pop(name, None) is not None:
            self._room.give_back(weight.nbytes)
        return weight

    def _read(self, name: str) -> torch.Tensor:
        if self._coming is None or self._coming[0] != name:
            self._discard()
            self._coming = name, self._start(name)
        coming, self._coming = self._coming[1], None
        if not isinstance(coming, Arriving):
            return coming
        weight = coming.wait()
        if self._room.claim(weight.nbytes):
            self._kept[name] = weight
        return weight

    def _read_ahead(self, name: str | None) -> None:
        if name is None or name in self._kept or self._coming is not None:
            return
        # an error is raised again if the matrix is asked for
        with contextlib.suppress(Exception):
            self._coming = name, self._start(name)

    def _start(self, name: str) -> Arriving | torch.Tensor:
        weight = self._source(name).detach()
        on_gpu = self._device.type == "cuda"
        if on_gpu and free_bytes(self._device) < LEAST_FREE_MATRICES * weight.nbytes:
            return weight
        if self._copier is None:
            self._copier = PinnedCopier(self._device, self._piece_bytes)
        return self._copier.start(weight.contiguous())

    def _discard(self) -> None:
        """Let go of a matrix that was not asked for, once it is there."""
        coming, self._coming = self._coming, None
        if coming is not None and isinstance(coming[1], Arriving):
            # nobody wants it, so nobody wants to know why it did not come
            with contextlib.suppress(Exception):
                coming[1].wait()
