"""How much of a GPU's memory measuring and placing may take to save time.

    free     what torch can still hand out, less than the GPU has where a cap was set
             (torch.cuda.set_per_process_memory_fraction)
    chunk    numbers of one float32 temporary: a 64th of what is free, 16 MiB to 512 MiB of them;
             some six are there at a time
    room     for what is kept instead of being read or made again: what was never in use so far,
             less 8 GiB. The next forward pass needs as much as the one before, or a little more if
             its rows are longer, which the 8 GiB are for. An 8B leaves none on 16 GB, where nothing
             is kept.

Few large slices instead of many small ones: of 16 MiB, 32 layers of an 8B are 10,000 slices, whose
launches take longer than the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from colab_qlora.quantization.row_chunks import CHUNK, chunks_of

LARGEST_CHUNK = 2**27
# of what is free, for one temporary
CHUNK_SHARE = 1 / 64
RESERVE_BYTES = 8 * 2**30


def free_bytes(device: torch.device) -> int:
    """Bytes that torch can still hand out on a GPU; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    most = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    # asked for once, since each of its short forms looks all of it up
    stats = torch.cuda.memory_stats(device)
    within = min(free + stats.get("reserved_bytes.all.current", 0), most)
    return max(0, within - int(stats.get("allocated_bytes.all.current", 0)))


@contextmanager
def larger_chunks(device: torch.device) -> Iterator[None]:
    """On a GPU, chunks of rows as large as its free memory suggests; elsewhere they stay."""
    if device.type != "cuda":
        yield
        return
    numbers = int(free_bytes(device) * CHUNK_SHARE) // torch.float32.itemsize
    with chunks_of(max(CHUNK, min(numbers, LARGEST_CHUNK))):
        yield


class Room:
    """Bytes for what is kept to save time.

    Args:
        nbytes: how many there are, or what says so at the first claim.
    """

    def __init__(self, nbytes: int | Callable[[], int] = 0) -> None:
        self._nbytes, self._left = nbytes, -1

    @classmethod
    def of(cls, device: torch.device) -> Room:
        """What a GPU has never had in use, less a reserve; nothing on a CPU."""
        return cls(lambda: _never_used(device))

    def claim(self, nbytes: int) -> bool:
        """Whether there is room; if so, it is taken."""
        if self._left < 0:
            self._left = max(0, self._nbytes if isinstance(self._nbytes, int) else self._nbytes())
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """What was claimed is not needed any more."""
        self._left += nbytes


def _never_used(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return free_bytes(device) - peak - RESERVE_BYTES
