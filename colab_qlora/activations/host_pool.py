"""Page-locked host memory for offloaded tensors, in blocks that are used again.

torch's own pinned allocator rounds every request up to a power of two, up to twice of what is
wanted. Here plain memory is allocated by its exact size and registered with CUDA, which locks its
pages in place; it stays so until the pool goes.
"""

from __future__ import annotations

import bisect
import contextlib
import weakref
from typing import Any

import torch

from colab_qlora.errors import UserError

_GIB = 2**30


class HostMemoryRefused(UserError):
    """The host gave no page-locked memory, or the pool has given all that it may."""


class HostPool:
    """Blocks of host memory, page-locked where there is a GPU.

    Args:
        cap_bytes: most bytes of all blocks together.
        is_locked: None: lock pages where there is a CUDA GPU.
    """

    def __init__(self, cap_bytes: int, *, is_locked: bool | None = None) -> None:
        self.cap_bytes = cap_bytes
        self._is_locked = torch.cuda.is_available() if is_locked is None else is_locked
        self._free: list[torch.Tensor] = []  # the smallest first
        self._held_bytes = 0
        self._registered: list[torch.Tensor] = []
        self._finalizer = weakref.finalize(self, _unlock, self._registered)

    def bytes_held(self) -> int:
        """Bytes of all blocks, whether in use or not."""
        return self._held_bytes

    def take(self, size_bytes: int) -> torch.Tensor:
        """A block of this size, uint8, contents unspecified: a part of the smallest that has it.

        Raises:
            HostMemoryRefused: over the cap, or the host locks no more pages.
        """
        place = bisect.bisect_left(self._free, size_bytes, key=torch.Tensor.numel)
        return self._free.pop(place) if place < len(self._free) else self._new_block(size_bytes)

    def give_back(self, block: torch.Tensor) -> None:
        """Let a block be taken again. Copies that are under way are the caller's affair."""
        bisect.insort(self._free, block, key=torch.Tensor.numel)

    def reserve(self, sizes_bytes: list[int]) -> None:
        """Have free blocks of these sizes, so that taking that many, or smaller, cannot fail.

        Raises:
            HostMemoryRefused: as `take`; what was made by then stays in the pool.
        """
        taken = []
        try:
            for size_bytes in sorted(sizes_bytes, reverse=True):
                taken.append(self.take(size_bytes))
        finally:
            for block in taken:
                self.give_back(block)

    def free(self) -> None:
        """Give all blocks that are not in use back to the host."""
        blocks = list(self._free)
        self._free.clear()
        self._held_bytes -= sum(block.numel() for block in blocks)
        if self._is_locked:
            addresses = {block.data_ptr() for block in blocks}
            self._registered[:] = [b for b in self._registered if b.data_ptr() not in addresses]
            _unlock(blocks)

    def _new_block(self, size_bytes: int) -> torch.Tensor:
        if self._held_bytes + size_bytes > self.cap_bytes:
            self.free()  # blocks of other sizes, of an earlier plan
        if self._held_bytes + size_bytes > self.cap_bytes:
            raise HostMemoryRefused(
                "the pinned host memory is used up",
                got=f"{(self._held_bytes + size_bytes) / _GIB:.2f} GiB",
                allowed=f"{self.cap_bytes / _GIB:.2f} GiB",
            )
        try:
            block = torch.empty(size_bytes, dtype=torch.uint8)
            if self._is_locked and size_bytes:
                _lock(block)
                self._registered.append(block)
        except (RuntimeError, MemoryError) as error:
            raise HostMemoryRefused(
                "the host gives no more page-locked memory",
                got=f"{str(error).splitlines()[0]}, with {self._held_bytes / _GIB:.2f} GiB in use",
                do="Lower host_budget_gib, or raise the limit of locked memory (ulimit -l)",
            ) from error
        self._held_bytes += size_bytes
        return block

    def __getstate__(self) -> dict[str, Any]:
        return {"cap_bytes": self.cap_bytes, "is_locked": self._is_locked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["cap_bytes"], is_locked=state["is_locked"])  # type: ignore[misc]


def _lock(block: torch.Tensor) -> None:
    runtime: Any = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(block.data_ptr(), block.numel(), 0))
    if code != 0:
        raise RuntimeError(f"cudaHostRegister failed with code {code}")


def _unlock(blocks: list[torch.Tensor]) -> None:
    if not blocks or not torch.cuda.is_initialized():
        return
    with contextlib.suppress(Exception):  # at exit the driver may be gone before us
        torch.cuda.synchronize()  # copies may be under way
        runtime: Any = torch.cuda.cudart()
        for block in blocks:
            runtime.cudaHostUnregister(block.data_ptr())
    blocks.clear()
