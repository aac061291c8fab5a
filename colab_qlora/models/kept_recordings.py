"""The recordings of one model by shape of batch: how many are kept, and the memory they share.

All of them are of one device and share one pool of memory there. What a recording that is let go
had of it is for later recordings; the pool itself goes when the last of them has gone.
"""

from __future__ import annotations

import torch

from colab_qlora.layers.gradient_rows import GradientRows
from colab_qlora.layers.graph_recorder import GraphRecorder, Recorder
from colab_qlora.layers.layer_graph import ShapeMemory
from colab_qlora.models.pass_parts import Key, Recorded

# shapes that are kept; one that has not come for so many passes makes way for another
MOST_RECORDED = 16
LONG_UNUSED = 4 * MOST_RECORDED


class KeptRecordings:
    """Recordings by shape of batch; none is let go while a pass through one is under way.

    Args:
        recorder: makes recordings; None: CUDA graphs, of the device that the model is on.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._given, self._recorder = recorder, recorder
        self._device: torch.device | None = None
        self._rows = GradientRows()
        self._by_key: dict[Key, Recorded] = {}
        self._passes = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def items(self) -> list[tuple[Key, Recorded]]:
        """All of them, with what they are of."""
        return list(self._by_key.items())

    def get(self, key: Key) -> Recorded | None:
        """What is recorded of this shape, or None."""
        return self._by_key.get(key)

    def new_pass(self) -> None:
        """A forward pass begins, whether it is recorded or not."""
        self._passes += 1

    def use(self, found: Recorded) -> None:
        """The pass runs from this recording, or makes it."""
        found.memory.new_pass()
        found.last_pass = self._passes
        found.uses += 1

    def has_place(self) -> bool:
        """True if one more can be kept, maybe for one that has not come for long."""
        if len(self._by_key) < MOST_RECORDED:
            return True
        return self._passes - self._by_key[self._oldest()].last_pass > LONG_UNUSED

    def new(self, key: Key) -> Recorded:
        """An empty recording of this shape, for which there is a place."""
        device = key[2]
        if self._device != device:
            # the model was moved: where it was, nothing of it stands any more
            self.drop_all()
            self._device = device
        if len(self._by_key) >= MOST_RECORDED:
            self.drop(self._oldest())
        if self._recorder is None:
            self._recorder = GraphRecorder(device)
        found = self._by_key[key] = Recorded(ShapeMemory(self._recorder, self._rows), device)
        return found

    def drop(self, key: Key) -> None:
        """Let one go."""
        self._wait()
        del self._by_key[key]
        if not self._by_key:
            self.drop_all()

    def drop_all(self) -> None:
        """Let all of them go, with their pool of memory."""
        if self._by_key:
            self._wait()
        self._by_key.clear()
        self._recorder = self._given
        self._rows = GradientRows()

    def pool_bytes(self) -> tuple[int, int]:
        """Of the recordings' memory what no tensor owns, and what one does."""
        return self._recorder.pool_bytes() if self._by_key and self._recorder else (0, 0)

    def _oldest(self) -> Key:
        return min(self._by_key, key=lambda key: self._by_key[key].last_pass)

    def _wait(self) -> None:
        """What is freed was last used on another stream than the one it was made on."""
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
