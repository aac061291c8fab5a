"""What is known of the shapes of batches that come: how often, and whether they wait for the host.

The second pass of a shape is timed: the host from its first layer to its last one, and the GPU by
events. What was allocated in between tells what a recording would need where no plan does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from colab_qlora.models.pass_parts import Key, Room

# the host's share of the forward pass's time from which a shape is recorded: below it the GPU is
# never kept waiting
HOST_SHARE = 0.5
# the same where full checkpointing was asked for: a recording takes memory (0.24 GiB of an 8B's
# 2 x 2048 tokens), so the GPU has to wait for certain
SAVING_HOST_SHARE = 1.0
# shapes that are remembered; times that a shape has come until when its time is taken, which fails
# where the last layer runs the model's own code
MOST_SEEN, LAST_LOOK = 512, 5
# what a recording may need, against what was measured when the pass ran as ever: the backward
# pass's own tensors come on top of the kept ones
NEED_FACTOR = 1.3
MARGIN_BYTES = 256 * 2**20


@dataclass
class Sight:
    """How often a shape came, what its second pass told, how often it was recorded."""

    count: int = 0
    host_s: float = 0.0
    events: tuple[Any, Any] | None = None
    need_bytes: int = 0
    times_recorded: int = 0
    is_refused: bool = False

    def waits_for_host(self, share: float = HOST_SHARE) -> bool:
        """True if the host needed this share of the time that the GPU was at it."""
        if self.events is None or not all(event.query() for event in self.events):
            return False
        gpu_s = self.events[0].elapsed_time(self.events[1]) / 1e3
        return self.host_s >= share * gpu_s

    def fits(self, room: Room, idle: int, owned: int) -> bool:
        """True if a recording fits beside everything else.

        Args:
            room: what there is.
            idle, owned: bytes of the recordings' memory that no tensor owns, and that one does.
        """
        if room.pass_bytes is not None:
            # the recordings' idle memory is there for this one too
            return room.left_bytes >= room.pass_bytes + owned + room.recording_bytes
        # nothing makes way for passes of other shapes then: room for both
        return room.left_bytes >= 2 * self.need_bytes + MARGIN_BYTES + idle


class PassSights:
    """The sights of one model's shapes, and the clock of the pass that is timed."""

    def __init__(self) -> None:
        self._seen: dict[Key, Sight] = {}
        self.new_pass()

    def new_pass(self) -> None:
        """A forward pass begins."""
        self._now: Sight | None = None
        # of the pass that tells: when it began, by the host and by the GPU, and what was allocated
        self._start: tuple[float, Any, int] | None = None

    def clear(self) -> None:
        """Forget the shapes, but not how often they were recorded.

        Recordings that have to go every time (out of memory, say) are not made for ever.
        """
        seen = {key: sight.times_recorded for key, sight in self._seen.items()}
        self._seen = {key: Sight(times_recorded=times) for key, times in seen.items() if times}
        self.new_pass()

    def of(self, key: Key) -> Sight:
        """The sight of a shape that has come once more."""
        if len(self._seen) >= MOST_SEEN:
            self._seen.clear()
        self._now = self._seen.setdefault(key, Sight())
        self._now.count += 1
        return self._now

    def forgive_times(self, key: Key) -> None:
        """A recording of this shape has served long enough: it may be made again and again."""
        if key in self._seen:
            self._seen[key].times_recorded = 0

    def start_clock(self, hidden: torch.Tensor) -> None:
        """The pass runs as ever: time it if it is the one that tells."""
        sight = self._now
        if not hidden.is_cuda or sight is None or sight.events is not None:
            return
        if not 2 <= sight.count <= LAST_LOOK:
            return
        # a host that has run ahead would be held up by the GPU, and look slow
        torch.cuda.synchronize(hidden.device)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._start = (time.perf_counter(), event, torch.cuda.memory_allocated(hidden.device))

    def stop_clock(self, hidden: torch.Tensor, scratch_bytes: int) -> None:
        """The pass's last layer has run as ever.

        Args:
            hidden: on the model's device.
            scratch_bytes: of the memory that passes share which run as ever.
        """
        sight, start = self._now, self._start
        if sight is None or start is None:
            return
        began, event, before = start
        sight.host_s = time.perf_counter() - began
        sight.events = (event, torch.cuda.Event(enable_timing=True))
        # on the stream where the pass began
        with torch.cuda.device_of(hidden):
            sight.events[1].record()
        grown = torch.cuda.memory_allocated(hidden.device) - before
        sight.need_bytes = int(NEED_FACTOR * max(0, grown)) + 2 * scratch_bytes
