"""A layer's store that sends some of its tensors to host memory and has them back in time.

Forward: a layer's copies start at its end, on a stream of their own beside the compute, which goes
on at once. The GPU's memory is let go when the next layer has done its work, and from then on
belongs to whatever comes next, so the compute stream waits for the copies first (they have had that
layer's time to finish).
Backward: a layer's first use of its store starts the fetch of the layer before it, on a second
stream; by the time that layer works, its tensors are back.

    forward     layer i computes, copies of i - 1 leave    | memory of i - 1 let go
    backward    layer i computes, copies of i - 1 come     |

Nothing here waits on the host, and no stream is asked whether it is done: order alone makes it
right. What comes back is what left, bit by bit, in the same strides.

q, k and v are columns of one buffer, as are gate and up if both are stored: the buffer travels as
it is, once. So of tensors that share memory all are offloaded or none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from colab_qlora.activations.host_pool import HostPool
from colab_qlora.layers.saved import SavedTensors

# the end of copies on the stream that made them; None where copies are not asynchronous
Event = Any
Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]


class CopyLane:
    """The streams of one model's copies, and the pool of what they copy into.

    Args:
        device: where the layers are.
        pool: host memory.
    """

    def __init__(self, device: torch.device, pool: HostPool) -> None:
        self.device, self.pool = device, pool
        self._down: Any = None
        self._up: Any = None

    def copy_down(self, copies: Copies) -> Event:
        """Start copies (from, to) to the host, after what is queued now."""
        if self._down is None and self.device.type == "cuda":
            self._down = torch.cuda.Stream(self.device)
        return self._copy(copies, self._down, None)

    def copy_up(self, copies: Copies, after: Event) -> Event:
        """Start copies (from, to) back, after what is queued now and after `after`."""
        if self._up is None and self.device.type == "cuda":
            self._up = torch.cuda.Stream(self.device)
        return self._copy(copies, self._up, after)

    def wait(self, event: Event) -> None:
        """Have the compute stream wait for a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _copy(self, copies: Copies, stream: Any, after: Event) -> Event:
        # a layer's copies together: to change the stream and back costs the host as much as ten
        if stream is None:
            for source, target in copies:
                target.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            for source, target in copies:
                target.copy_(source, non_blocking=True)
            return stream.record_event()

    def __getstate__(self) -> dict[str, Any]:
        return {"device": self.device, "pool": self.pool, "_down": None, "_up": None}


@dataclass
class _Parcel:
    """One piece of memory on its way to the host, there, or back.

    Attributes:
        bytes: its size.
        memory: on the GPU: before it has left, or after it has come back.
        block: on the host, at least as large.
    """

    bytes: int
    memory: torch.Tensor | None
    block: torch.Tensor

    @property
    def host(self) -> torch.Tensor:
        return self.block[: self.bytes]


@dataclass
class _View:
    """How a tensor lies in its piece of memory."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    parcel: _Parcel = field(repr=False)


class OffloadingStore(SavedTensors):
    """The store of one layer in one pass.

    Args:
        keep: names that stay on the GPU.
        offload: names that go to the host. Of those that share memory, all or none.
        lane: how copies travel.
        previous: the store of the layer before in the same pass; None for the first.
    """

    def __init__(
        self,
        keep: frozenset[str],
        offload: frozenset[str],
        lane: CopyLane,
        previous: OffloadingStore | None,
    ) -> None:
        super().__init__(keep | offload)
        self.offload = offload
        self._lane, self._previous = lane, previous
        self._parcels: dict[int, _Parcel] = {}
        self._views: dict[str, _View] = {}
        self._is_fetched = False
        # ends of its copies
        self._left: Event = None
        self._came: Event = None

    def put(self, name: str, tensor: torch.Tensor, *, is_scratch: bool = False) -> None:
        """Keep or send away `tensor` if the plan names it; a view of scratch memory is copied."""
        if name not in self.offload:
            super().put(name, tensor, is_scratch=is_scratch)
            return
        if is_scratch:
            tensor = tensor.clone()
        self._send(name, tensor)

    def end_forward(self) -> None:
        """Send away what was put; the copies of the layer before have had this layer's time."""
        copies = [(p.memory, p.host) for p in self._parcels.values() if p.memory is not None]
        if copies:
            self._left = self._lane.copy_down(copies)
        if self._previous is not None:
            self._previous._let_go()

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor on the GPU, or None: rebuild it."""
        if not self._is_fetched:
            self.fetch()
            self._is_fetched = True
            self._lane.wait(self._came)
            if self._previous is not None:
                self._previous.fetch()
        view = self._views.get(name)
        if view is None:
            return super().get(name)
        memory = view.parcel.memory
        assert memory is not None
        typed = memory.view(view.dtype)
        return typed.as_strided(view.size, view.stride, view.offset)

    def fetch(self) -> None:
        """Start to bring back what is not on the GPU."""
        copies = []
        for parcel in self._parcels.values():
            if parcel.memory is None:
                parcel.memory = torch.empty_like(parcel.host, device=self._lane.device)
                copies.append((parcel.host, parcel.memory))
        if copies:
            self._came = self._lane.copy_up(copies, self._left)

    def release(self) -> None:
        """Let all of them go; the blocks can be used again."""
        super().release()
        self._views.clear()
        # a copy may still read memory that never left, or write what nobody asked for
        self._lane.wait(self._left)
        self._lane.wait(self._came)
        self._left = self._came = None
        for parcel in self._parcels.values():
            parcel.memory = None
            self._lane.pool.give_back(parcel.block)
        self._parcels.clear()
        self._previous = None

    def __del__(self) -> None:
        # a pass whose loss was dropped, or that stopped on an error
        if self.__dict__.get("_parcels"):
            with contextlib.suppress(Exception):  # when Python ends, torch may be gone before
                self.release()

    def _send(self, name: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        parcel = self._parcels.get(storage.data_ptr())
        if parcel is None:
            memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            parcel = _Parcel(memory.numel(), memory, self._lane.pool.take(memory.numel()))
            self._parcels[storage.data_ptr()] = parcel
        self._views[name] = _View(
            tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()), parcel
        )

    def _let_go(self) -> None:
        """Drop the GPU's memory of what has left."""
        if self._is_fetched:
            return
        self._lane.wait(self._left)
        for parcel in self._parcels.values():
            parcel.memory = None
